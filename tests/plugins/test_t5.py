"""The T5 plugin: what it says of the family, which configs it takes, and decoding with a cache and without."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora_pipe.architecture import block_of, matches, names_part
from qlora_pipe.errors import ConfigError
from qlora_pipe.nn.language import Inputs
from qlora_pipe.testing import filled
from qlora_plugins.t5 import build, register_architectures, ties
from qlora_plugins.t5.config import T5Config
from qlora_plugins.t5.model import T5
from tests.t5_checkpoints import TINY_T5, t5_config, t5_weights

FAMILY = register_architectures()[0]
BIAS = "SelfAttention.relative_attention_bias.weight"
KINDS = pytest.mark.parametrize("kind", ["t5", "umt5"])


def on_meta(**fields: Any) -> nn.Module:
    with torch.device("meta"):
        return build(t5_config(**fields))


def in_double(**fields: Any) -> T5:
    config = t5_config(**fields)
    model = filled(FAMILY, config, t5_weights(config, seed=3), dtype=torch.float64)
    assert isinstance(model, T5)
    return model


def some_ids(*shape: int) -> Tensor:
    return torch.randint(259, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_plugin_module_imports_no_torch() -> None:
    check = "import sys, qlora_plugins.t5; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {check}"], check=True)


@pytest.mark.parametrize(("feed_forward", "matrices"), [("relu", 2), ("gated-gelu", 3)])
def test_quantised_and_adapted_layers_are_exactly_the_linear_layers_of_the_blocks(
    feed_forward: str, matrices: int
) -> None:
    model = on_meta(feed_forward_proj=feed_forward, num_layers=2, num_decoder_layers=3)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    in_blocks = {path for path in linears if block_of(path, FAMILY.blocks)}
    assert len(in_blocks) == 2 * (4 + matrices) + 3 * (8 + matrices)
    assert {path for path, _ in model.named_modules() if matches(path, FAMILY.adapt)} == in_blocks
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if matches(name, FAMILY.quantize)} == {f"{path}.weight" for path in in_blocks}
    wo = {path for path in in_blocks if path.endswith(".wo")}
    kept = {path for path in linears if any(names_part(pattern, path) for pattern in FAMILY.keep_16bit)}
    assert kept == {"lm_head"} | wo


@pytest.mark.parametrize(("kind", "tables"), [("t5", 1), ("mt5", 1), ("umt5", 3)])
def test_tables_of_biases_lie_in_the_first_block_or_in_each_and_no_block_has_them_for_itself(
    kind: str, tables: int
) -> None:
    names = {name for name, _ in on_meta(model_type=kind, num_layers=3, num_decoder_layers=3).named_parameters()}
    found = {name for name in names if name.endswith(BIAS)}
    stacks = [f"{stack}.block.{number}" for stack in ("encoder", "decoder") for number in range(tables)]
    assert found == {f"{block}.layer.0.{BIAS}" for block in stacks}
    assert {name for name in names if matches(name, FAMILY.shared)} == found


def test_a_head_is_tied_unless_the_config_or_the_checkpoint_has_one_of_its_own() -> None:
    embeddings = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")
    head = {"lm_head.weight": "shared.weight"}
    assert ties(TINY_T5) == ties(t5_config(tie_word_embeddings=True)) == embeddings | head
    assert ties(t5_config(tie_word_embeddings=False)) == embeddings
    # Old checkpoints carry the stacks' embeddings too, which are never apart.
    assert FAMILY.ties_of(TINY_T5, {"shared.weight", *embeddings}) == embeddings | head
    assert FAMILY.ties_of(TINY_T5, {"shared.weight", "lm_head.weight"}) == embeddings


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 32**-0.5),
        ({"tie_word_embeddings": False}, 1.0),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, 1.0),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, 32**-0.5),
        ({"model_type": "mt5"}, 1.0),
        ({"model_type": "umt5", "tie_word_embeddings": False}, 32**-0.5),
    ],
)
def test_the_output_is_scaled_where_the_config_asks_for_it(fields: dict[str, Any], scale: float) -> None:
    assert T5Config.read(t5_config(**fields)).output_scale == scale


def test_a_decoder_begins_with_the_id_that_is_named_for_it_or_else_with_the_padding() -> None:
    assert T5Config.read(t5_config(decoder_start_token_id=7)).start_id == 7
    assert T5Config.read(t5_config(decoder_start_token_id=None, pad_token_id=5)).start_id == 5
    with pytest.raises(
        ConfigError, match='"decoder_start_token_id" is missing; it must be a whole number from 0 to 258'
    ):
        T5Config.read(t5_config(decoder_start_token_id=None, pad_token_id=None))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("d_model", None, '"d_model" is missing; it must be a whole number from 1 to 1048576'),
        ("num_heads", 0, '"num_heads" is 0'),
        ("num_layers", 10**9, '"num_layers" is 1000000000; it must be a whole number from 1 to 4096'),
        ("num_decoder_layers", 0, '"num_decoder_layers" is 0'),
        ("d_kv", True, '"d_kv" is True'),
        (
            "relative_attention_num_buckets",
            3,
            '"relative_attention_num_buckets" is 3; it must be a whole number from 4',
        ),
        (
            "relative_attention_max_distance",
            4,
            '"relative_attention_max_distance" is 4; it must be a whole number from 5',
        ),
        ("layer_norm_epsilon", 0, '"layer_norm_epsilon" is 0; it must be a finite number above 0 and at most 1'),
        ("feed_forward_proj", "gated", "\"feed_forward_proj\" is 'gated'; it must be one of gelu"),
        ("feed_forward_proj", "gated-gated-gelu", "\"feed_forward_proj\" is 'gated-gated-gelu'"),
        ("feed_forward_proj", ["relu"], "\"feed_forward_proj\" is ['relu']"),
        ("feed_forward_proj", "prelu", "\"feed_forward_proj\" is 'prelu'"),
        ("dense_act_fn", "xielu", "\"dense_act_fn\" is 'xielu'"),
        ("is_gated_act", 1, '"is_gated_act" is 1; it must be true or false'),
        ("tie_word_embeddings", "no", "\"tie_word_embeddings\" is 'no'; it must be true or false"),
        ("scale_decoder_outputs", 0, '"scale_decoder_outputs" is 0; it must be true or false'),
        ("decoder_start_token_id", 259, '"decoder_start_token_id" is 259; it must be a whole number from 0 to 258'),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_by_its_field(field: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        on_meta(**{field: value})
    message = str(refusal.value)
    assert message.startswith("config.json: ")
    assert said in message


JUNK = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 4, 8, 2**31, 10**400, "relu", "gated-silu", "umt5"])
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from([*TINY_T5, "dense_act_fn", "is_gated_act", "tie_word_embeddings"]), JUNK))
def test_any_config_is_either_refused_or_read(fields: dict[str, Any]) -> None:
    config = {**TINY_T5, **fields}
    try:
        read = T5Config.read(config)
        ties(config)
    except ConfigError:
        return
    assert 0 <= read.start_id < read.vocabulary


@KINDS
def test_padding_of_either_side_changes_nothing(kind: str) -> None:
    model = in_double(model_type=kind)
    source, ids = some_ids(1, 11), some_ids(1, 7)
    padded = Inputs(
        torch.cat((ids, some_ids(1, 5)), dim=1),
        source=torch.cat((source, some_ids(1, 6)), dim=1),
        source_lengths=torch.tensor([11]),
    )
    alone = model.hidden_of(Inputs(ids, source=source, source_lengths=torch.tensor([11])))
    torch.testing.assert_close(model.hidden_of(padded)[:, :7], alone, rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("pieces", [(11, 1, 1, 1), (1, 5, 1, 7), (14,)], ids=str)
def test_a_target_in_pieces_through_the_cache_gives_the_hidden_states_of_the_whole(
    kind: str, pieces: tuple[int, ...]
) -> None:
    model = in_double(model_type=kind, num_decoder_layers=3)
    source, lengths, ids = some_ids(3, 10), torch.tensor([10, 1, 6]), some_ids(3, 14)
    cache = model.new_cache(model.encode(source, lengths), lengths, capacity=14)
    hidden = torch.cat([model.decode(piece, cache=cache) for piece in torch.split(ids, list(pieces), dim=1)], dim=1)
    assert cache.length == 14
    whole = model.hidden_of(Inputs(ids, source=source, source_lengths=lengths))
    torch.testing.assert_close(hidden, whole, rtol=0, atol=1e-12)


@KINDS
def test_rows_of_a_cache_go_on_from_those_that_they_were_given(kind: str) -> None:
    model = in_double(model_type=kind)
    source, lengths, ids = some_ids(3, 9), torch.tensor([9, 4, 7]), some_ids(3, 5)
    rows, following = torch.tensor([2, 2, 0]), some_ids(3, 1)
    # Before the first token, and in the middle.
    for read in (0, 5):
        cache = model.new_cache(model.encode(source, lengths), lengths, capacity=8)
        if read:
            model.decode(ids, cache=cache)
        cache.reorder(rows)
        found = model.decode(following, cache=cache)
        target = torch.cat((ids[rows, :read], following), dim=1)
        wanted = model.hidden_of(Inputs(target, source=source[rows], source_lengths=lengths[rows]))[:, -1:]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_keys_and_values_of_the_source_are_computed_once() -> None:
    model = in_double()
    made: list[int] = []
    for block in model.decoder.block:
        block.get_submodule("layer.1.EncDecAttention.k").register_forward_hook(lambda *_: made.append(1))
    lengths = torch.tensor([9])
    cache = model.new_cache(model.encode(some_ids(1, 9), lengths), lengths, capacity=8)
    for _ in range(5):
        model.decode(some_ids(1, 1), cache=cache)
    assert len(made) == 2


def test_a_full_cache_refuses_more() -> None:
    model = in_double()
    lengths = torch.tensor([3])
    cache = model.new_cache(model.encode(some_ids(1, 3), lengths), lengths, capacity=4)
    model.decode(some_ids(1, 3), cache=cache)
    with pytest.raises(ValueError, match="holds 4 target tokens; 5 were to be stored"):
        model.decode(some_ids(1, 2), cache=cache)


def test_biases_are_laid_out_by_distance_once_for_all_layers_of_a_stack() -> None:
    model = in_double(num_layers=3, num_decoder_layers=4)
    inputs = Inputs(some_ids(1, 9), source=some_ids(1, 12), source_lengths=torch.tensor([12]))
    _, told = model.begin(inputs)
    assert [bias.shape for bias in (*told.encoder_biases, *told.decoder_biases)] == [(4, 23)] * 3 + [(4, 17)] * 4
    assert len({id(bias) for bias in (*told.encoder_biases, *told.decoder_biases)}) == 2
