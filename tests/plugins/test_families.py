"""The plugins of the families beside LLaMA: what they say of themselves, which configs they take, and their windows."""

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
from qlora_pipe.nn.attention import PLAIN
from qlora_pipe.nn.cache import StepCache
from qlora_pipe.nn.decoder import DecoderModel
from qlora_pipe.nn.packing import Packing
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.testing import filled
from tests.families import FAMILIES, architecture_of, drawn_weights, tiny_config

# One of each kind of window: of all layers, of the later ones, of those that are named.
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 5, "num_hidden_layers": 3}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": (
        "qwen3",
        {
            "use_sliding_window": True, "sliding_window": 6, "num_hidden_layers": 3, "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}  # fmt: skip


def in_double(family: str, **overrides: Any) -> DecoderModel:
    config = tiny_config(family, **overrides)
    weights = drawn_weights(family, config, seed=3)
    model = filled(architecture_of(family), config, weights, dtype=torch.float64)
    assert isinstance(model, DecoderModel)
    return model


def windows(family: str, **overrides: Any) -> list[int | None]:
    return [each.window for each in FAMILIES[family].read(tiny_config(family, **overrides)).scores]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plugin_module_imports_no_torch(family: str) -> None:
    check = f"import sys, qlora_plugins.{family}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {check}"], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_found_by_its_model_type(family: str) -> None:
    found = find_architecture(load_plugins(), family)
    assert (found.name, found.kind, found.task_type, found.packs) == (family, "causal", "CAUSAL_LM", True)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_and_adapted_layers_are_exactly_the_linear_layers_of_the_blocks(family: str) -> None:
    architecture = architecture_of(family)
    with torch.device("meta"):
        model = architecture.build(tiny_config(family, attention_bias=True))
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    in_blocks = {path for path in linears if block_of(path, architecture.blocks)}
    assert len(in_blocks) == 7 * 2
    assert {path for path, _ in model.named_modules() if matches(path, architecture.adapt)} == in_blocks
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if matches(name, architecture.quantize)} == {
        f"{path}.weight" for path in in_blocks
    }
    assert {path for path in linears if matches(path, architecture.keep_16bit)} == linears - in_blocks == {"lm_head"}
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("family", "fields", "of_a_block"),
    [
        ("mistral", {"attention_bias": True}, set()),
        ("qwen2", {}, {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}),
        ("qwen3", {}, {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}),
        (
            "qwen3",
            {"attention_bias": True},
            {
                *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
                *(f"self_attn.{name}_proj.bias" for name in "qkvo"),
            },
        ),
    ],
)
def test_parameters_are_those_of_llama_and_the_familys_own(
    family: str, fields: dict[str, Any], of_a_block: set[str]
) -> None:
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = {f"{name}.weight" for name in (*linears, "input_layernorm", "post_attention_layernorm")} | of_a_block
    expected = {f"model.layers.{layer}.{name}" for layer in range(2) for name in names}
    with torch.device("meta"):
        model = architecture_of(family).build(tiny_config(family, **fields))
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(model.state_dict()) == expected | outside


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_tied_only_where_the_config_says_so(family: str) -> None:
    ties = architecture_of(family).ties
    assert ties(tiny_config(family, tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert ties(tiny_config(family, tie_word_embeddings=False)) == ties({"hidden_size": 8}) == {}


def test_mistral_has_the_window_of_its_config_and_without_one_that_of_its_first_version() -> None:
    assert windows("mistral", sliding_window=9) == [9, 9]
    assert windows("mistral", sliding_window=None) == [None, None]
    config = tiny_config("mistral")
    del config["sliding_window"]
    assert [each.window for each in FAMILIES["mistral"].read(config).scores] == [4096, 4096]
    assert FAMILIES["mistral"].read(tiny_config("mistral", sliding_window=None)).scores == (PLAIN, PLAIN)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_has_windows_in_the_layers_that_its_config_names(family: str) -> None:
    on = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 3}
    assert windows(family, **on, max_window_layers=2) == [None, None, 9]
    assert windows(family, **on, max_window_layers=0) == [9, 9, 9]
    assert windows(family, **on, max_window_layers=28) == [None] * 3
    assert windows(family, **on, max_window_layers=None) == [None] * 3
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(family, **on, max_window_layers=2, layer_types=kinds) == [9, None, None]
    assert windows(family, **{**on, "use_sliding_window": False}, layer_types=["full_attention"] * 3) == [None] * 3
    assert windows(family, **{**on, "sliding_window": None}, max_window_layers=2) == [None, None, 4096]


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("mistral", {"sliding_window": 0}, '"sliding_window" is 0; it must be a whole number from 1'),
        ("mistral", {"sliding_window": "4096"}, "\"sliding_window\" is '4096'"),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 2},
            "it must be absent: all layers of a Mistral have the same",
        ),
        ("mistral", {"num_key_value_heads": 3}, '"num_key_value_heads" is 3; it must be a divisor'),
        ("mistral", {"rope_parameters": {"rope_type": "longrope"}}, "\"rope_parameters.rope_type\" is 'longrope'"),
        ("qwen2", {"hidden_size": 33}, '"hidden_size" is 33; it must be a multiple of num_attention_heads (4)'),
        ("qwen2", {"use_sliding_window": "no"}, "\"use_sliding_window\" is 'no'; it must be true or false"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, '"max_window_layers" is -1'),
        ("qwen2", {"use_sliding_window": True, "sliding_window": -4}, '"sliding_window" is -4'),
        (
            "qwen2",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "it must be full_attention throughout, as use_sliding_window is not true",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention"] * 3},
            "it must be a list of 2, each one of full_attention, sliding_attention",
        ),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "each one of full_attention"),
        ("qwen3", {"layer_types": "full_attention"}, "\"layer_types\" is 'full_attention'; it must be a list of 2"),
        ("qwen3", {"layer_types": [1, 2]}, '"layer_types" is [1, 2]; it must be a list of 2'),
        ("qwen3", {"head_dim": 7}, '"head_dim" is 7; it must be even'),
        ("qwen3", {"attention_bias": 1}, '"attention_bias" is 1; it must be true or false'),
        ("qwen3", {"partial_rotary_factor": 0.5}, '"partial_rotary_factor" is 0.5; it must be 1'),
        ("qwen3", {"rope_scaling": {"type": "mrope"}}, "\"rope_scaling.type\" is 'mrope'; it must be one of default"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_by_its_field(family: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        FAMILIES[family].read(tiny_config(family, **fields))
    message = str(refusal.value)
    assert message.startswith("config.json: ")
    assert said in message
    assert len(message) < 250


JUNK = st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | st.text(max_size=5)
KINDS = st.sampled_from(["full_attention", "sliding_attention", "", None])
FIELDS = ["sliding_window", "use_sliding_window", "max_window_layers", "head_dim", "attention_bias", "layer_types"]


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(list(FAMILIES)),
    st.dictionaries(st.sampled_from(FIELDS), JUNK | st.lists(KINDS, max_size=3), max_size=3),
)
def test_any_config_is_either_refused_or_gives_each_layer_a_window_or_none(family: str, fields: dict[str, Any]) -> None:
    try:
        found = windows(family, **fields)
    except ConfigError:
        return
    assert len(found) == 2
    assert all(window is None or window >= 1 for window in found)


def test_qwen3_has_heads_of_128_components_unless_told_otherwise() -> None:
    assert FAMILIES["qwen3"].read(tiny_config("qwen3", head_dim=None)).sizes.head_dim == 128
    assert FAMILIES["qwen2"].read(tiny_config("qwen2")).sizes.head_dim == 8


@pytest.mark.parametrize("pieces", [(11, 1, 1, 1, 7), (1, 5, 1, 14), (3, 18)])
@pytest.mark.parametrize("kind", WINDOWED)
def test_a_sequence_in_pieces_through_the_cache_gives_the_logits_of_the_whole(
    kind: str, pieces: tuple[int, ...]
) -> None:
    family, fields = WINDOWED[kind]
    model = in_double(family, **fields)
    ids = torch.randint(259, (2, 21), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2, 21)
    logits = torch.cat([model(piece, cache=cache) for piece in torch.split(ids, list(pieces), dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "fields"), [("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {"attention_bias": True})]
)
def test_a_step_that_can_be_captured_gives_the_logits_of_the_plain_way(family: str, fields: dict[str, Any]) -> None:
    model = in_double(family, **fields)
    ids = torch.randint(259, (2, 20), generator=torch.Generator().manual_seed(1))
    plain = model.new_cache(2, 20)
    with torch.inference_mode():
        model(ids[:, :11], cache=plain)
        steps = StepCache(plain, capacity=30)
        for position in range(11, 20):
            token = ids[:, position : position + 1]
            torch.testing.assert_close(model(token, cache=steps), model(token, cache=plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", WINDOWED)
def test_samples_in_packed_rows_give_the_hidden_states_that_they_have_alone(kind: str) -> None:
    family, fields = WINDOWED[kind]
    model = in_double(family, **fields)
    rows = ((5, 11, 2), (17,), (1, 1, 13, 3))
    ids = torch.randint(259, (3, 19), generator=torch.Generator().manual_seed(1))
    packed = model.hidden(ids, packing=Packing.of(rows, width=19))
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            alone = model.hidden(ids[row : row + 1, here])
            torch.testing.assert_close(packed[row, here], alone[0], rtol=1e-12, atol=1e-12)
            start += length


@pytest.mark.parametrize("kind", WINDOWED)
def test_what_lies_before_all_windows_changes_nothing(kind: str) -> None:
    family, fields = WINDOWED[kind]
    model = in_double(family, **fields)
    ids = torch.randint(259, (1, 40), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 259
    changed = (model(ids) != model(other)).any(-1)[0]
    # Layers reach back one after the other; a layer without a window reaches all.
    reach = 1 + 3 * (5 - 1) if kind == "mistral" else 40
    assert changed.tolist() == [position < reach for position in range(40)]
