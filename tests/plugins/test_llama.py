"""The LLaMA plugin: what it says of the family, which configs it takes, and its modules against plain arithmetic."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlora_pipe.architecture import block_of, matches
from qlora_pipe.errors import ConfigError
from qlora_pipe.nn.attention import causal_attention
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.nn.rotary import KINDS
from qlora_pipe.testing import filled, tiny_weights
from qlora_plugins.llama import build, read, register_architectures

LLAMA = register_architectures()[0]
CONFIG: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 71,
    "max_position_embeddings": 64,
}


def on_meta(**overrides: Any) -> DecoderModel:
    with torch.device("meta"):
        return build({**CONFIG, **overrides})


def read_all(**overrides: Any) -> None:
    """Ask the plugin everything that it reads from a config."""
    LLAMA.ties({**CONFIG, **overrides})
    on_meta(**overrides)


def in_double(**overrides: Any) -> DecoderModel:
    config = {**CONFIG, **overrides}
    model = filled(LLAMA, config, tiny_weights(config, seed=3), dtype=torch.float64)
    assert isinstance(model, DecoderModel)
    return model


def test_the_plugin_module_imports_no_torch() -> None:
    check = "import sys, qlora_plugins.llama; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {check}"], check=True)


def test_quantised_and_adapted_layers_are_exactly_the_linear_layers_of_the_blocks() -> None:
    model = on_meta(attention_bias=True, mlp_bias=True)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    in_blocks = {path for path in linears if block_of(path, LLAMA.blocks)}
    assert len(in_blocks) == 7 * 3
    assert {path for path, _ in model.named_modules() if matches(path, LLAMA.adapt)} == in_blocks
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if matches(name, LLAMA.quantize)} == {f"{path}.weight" for path in in_blocks}
    assert {path for path in linears if matches(path, LLAMA.keep_16bit)} == linears - in_blocks == {"lm_head"}


@pytest.mark.parametrize("biases", [False, True])
def test_parameters_are_named_as_in_a_checkpoint_and_nothing_else_is_to_be_loaded(biases: bool) -> None:
    flags = {"attention_bias": biases, "mlp_bias": biases}
    model = on_meta(**flags)
    shapes = {name: tuple(weight.shape) for name, weight in tiny_weights({**CONFIG, **flags}, seed=0).items()}
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == shapes
    assert not list(model.buffers())


def test_a_head_is_tied_only_where_the_config_says_so() -> None:
    assert LLAMA.ties({**CONFIG, "tie_word_embeddings": True}) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert LLAMA.ties({**CONFIG, "tie_word_embeddings": False}) == {}
    assert LLAMA.ties(CONFIG) == {}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", None, '"hidden_size" is missing; it must be a whole number from 1 to 1048576'),
        ("hidden_size", 40.0, '"hidden_size" is 40.0'),
        ("hidden_size", 42, '"hidden_size" is 42; it must be a multiple of num_attention_heads (4)'),
        ("hidden_size", 4, '"head_dim" is missing; it must be even, as rotary embeddings turn pairs (here it is 1)'),
        ("num_attention_heads", 0, '"num_attention_heads" is 0'),
        ("num_attention_heads", True, '"num_attention_heads" is True'),
        ("num_hidden_layers", 10**9, '"num_hidden_layers" is 1000000000; it must be a whole number from 1 to 4096'),
        ("num_key_value_heads", 3, '"num_key_value_heads" is 3; it must be a divisor of num_attention_heads'),
        ("num_key_value_heads", 8, '"num_key_value_heads" is 8; it must be a whole number from 1 to 4'),
        ("head_dim", 7, '"head_dim" is 7; it must be even'),
        ("vocab_size", "many" * 100, '"vocab_size" is \'manymany'),
        ("hidden_act", "tanh", "\"hidden_act\" is 'tanh'; it must be one of silu, gelu, gelu_pytorch_tanh, relu"),
        ("hidden_act", ["silu"], "\"hidden_act\" is ['silu']"),
        ("rms_norm_eps", -1e-5, '"rms_norm_eps" is -1e-05; it must be a finite number above 0 and at most 1'),
        ("rms_norm_eps", math.inf, '"rms_norm_eps" is inf'),
        ("rope_theta", math.nan, '"rope_theta" is nan; it must be a finite number above 1'),
        ("rope_theta", 10**400, '"rope_theta" is 1000'),
        ("attention_bias", "no", "\"attention_bias\" is 'no'; it must be true or false"),
        ("tie_word_embeddings", 1, '"tie_word_embeddings" is 1; it must be true or false'),
        ("sliding_window", 4096, '"sliding_window" is 4096; it must be absent'),
        ("partial_rotary_factor", 0.5, '"partial_rotary_factor" is 0.5; it must be 1'),
        ("max_position_embeddings", -1, '"max_position_embeddings" is -1'),
        ("rope_scaling", "linear", "\"rope_scaling\" is 'linear'; it must be an object"),
        ("rope_scaling", {"type": "linear"}, '"rope_scaling.factor" is missing; it must be a finite number at least 1'),
        ("rope_scaling", {"type": "su"}, "\"rope_scaling.type\" is 'su'; it must be one of default, linear, dynamic"),
        ("rope_scaling", {"type": "linear", "factor": 0.5}, '"rope_scaling.factor" is 0.5'),
        ("rope_scaling", {"type": "llama3", "factor": 8}, '"rope_scaling.low_freq_factor" is missing'),
        (
            "rope_scaling",
            {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            '"rope_scaling.high_freq_factor" is 4; it must be a finite number above 4',
        ),
        ("rope_scaling", {"type": "yarn", "factor": 4, "beta_fast": 0.5}, '"rope_scaling.beta_fast" is 0.5'),
        ("rope_parameters", {"rope_type": "longrope"}, "\"rope_parameters.rope_type\" is 'longrope'"),
        ("rope_parameters", {"rope_theta": math.nan}, '"rope_parameters.rope_theta" is nan'),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, '"rope_parameters.partial_rotary_factor" is 0.5'),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_by_its_field(field: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_all(**{field: value})
    message = str(refusal.value)
    assert message.startswith("config.json: ")
    assert said in message
    assert len(message) < 250


def test_dynamic_scaling_is_refused_where_it_would_divide_by_zero() -> None:
    with pytest.raises(ConfigError, match="divides by head_dim - 2"):
        on_meta(head_dim=2, rope_scaling={"type": "dynamic", "factor": 2.0})


def test_the_two_generations_of_rope_fields_may_stand_together_only_if_they_agree() -> None:
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    old = {"type": "linear", "factor": 2.0}
    on_meta(rope_theta=500.0, rope_scaling=old, rope_parameters=new)
    with pytest.raises(ConfigError, match=r'"rope_scaling" is .* it must be absent, or say the same'):
        on_meta(rope_theta=10000.0, rope_scaling=old, rope_parameters=new)


JUNK = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 4, 8, 2**31, 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
)
ROPE_FIELDS = [
    *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "attention_factor", "truncate", "rope_theta", "partial_rotary_factor"),
]
ROPE = st.builds(
    lambda kind, fields: {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4, **fields},
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(ROPE_FIELDS), JUNK, max_size=3),
)
TOP_FIELDS = [*CONFIG, "head_dim", "rms_norm_eps", "rope_theta", "attention_bias", "hidden_act", "rope_scaling"]


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from(TOP_FIELDS), JUNK, max_size=2), st.none() | JUNK | ROPE)
def test_any_config_is_either_refused_or_gives_finite_tables(fields: dict[str, Any], rope: object) -> None:
    try:
        config = read({**CONFIG, **fields, "rope_parameters": rope})
    except ConfigError:
        return
    cosines, sines = config.rotary.tables(torch.arange(60, 70), length=70, like=torch.empty(0, dtype=torch.float64))
    assert cosines.shape == sines.shape == (10, config.sizes.head_dim)
    assert cosines.isfinite().all()
    assert sines.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 160),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, 256),
        ({"rope_scaling": {"type": "yarn", "factor": 3.0}}, 192),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}, 64),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 16,
                }
            },
            64,
        ),
    ],
)
def test_the_context_is_what_the_scaling_makes_of_the_positions(fields: dict[str, Any], context: int) -> None:
    model = on_meta(**fields)
    assert model.context == context


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (7, 7), (1, 9), (3, 9)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_attention_is_the_softmax_over_what_came_before(n_queries: int, n_keys: int, heads: int, kv_heads: int) -> None:
    draws = torch.Generator().manual_seed(0)
    queries = torch.randn(2, heads, n_queries, 6, dtype=torch.float64, generator=draws)
    keys, values = torch.randn(2, 2, kv_heads, n_keys, 6, dtype=torch.float64, generator=draws)
    expected = torch.empty(2, n_queries, heads, 6, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // kv_heads)
        for position in range(n_queries):
            seen = n_keys - n_queries + position + 1
            scores = torch.einsum("bd,bsd->bs", queries[:, head, position], keys[:, group, :seen]) / 6**0.5
            expected[:, position, head] = torch.einsum("bs,bsd->bd", scores.softmax(-1), values[:, group, :seen])
    torch.testing.assert_close(causal_attention(queries, keys, values), expected.flatten(2), rtol=0, atol=1e-14)


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    model = in_double()
    ids = torch.arange(2, 13)[None]
    padded = torch.cat((ids, torch.zeros(1, 6, dtype=torch.int64)), dim=1)
    torch.testing.assert_close(model.hidden(padded)[:, :11], model.hidden(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [(11, 1, 1, 1), (1, 5, 1, 7), (3, 11)])
def test_a_sequence_in_pieces_through_the_cache_gives_the_logits_of_the_whole(pieces: tuple[int, ...]) -> None:
    model = in_double(attention_bias=True)
    ids = torch.randint(71, (2, 14), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2, 14)
    logits = torch.cat([model(piece, cache=cache) for piece in torch.split(ids, list(pieces), dim=1)], dim=1)
    assert cache.length == 14
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-10)


def test_a_full_cache_refuses_more() -> None:
    model = in_double()
    cache = model.new_cache(1, 4)
    model.hidden(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(ValueError, match="holds 4 positions; 5 were to be stored"):
        model.hidden(torch.tensor([[4, 5]]), cache=cache)


def test_tables_made_in_inference_mode_serve_training_too() -> None:
    config = {**CONFIG, "rope_scaling": {"type": "yarn", "factor": 2.0}}
    model = filled(LLAMA, config, tiny_weights(config, seed=0), dtype=torch.float32).train().requires_grad_()
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        model(ids)
    model(ids).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
