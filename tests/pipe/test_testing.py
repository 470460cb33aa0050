"""What plugin authors are given for their tests."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_pipe.architecture import Architecture
from qlora_pipe.data.tokenizer import Tokenizer
from qlora_pipe.errors import ConfigError
from qlora_pipe.plugins import architectures, load_plugins
from qlora_pipe.testing import TOY, RunCli, byte_tokenizer, drawn_weights, tiny_checkpoint
from tests.pipe.seq2seq_toy import PAIR

pytest_plugins = ["qlora_pipe.testing.fixtures"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_tiny_checkpoint_is_the_same_each_time_and_another_for_another_seed(tmp_path: Path) -> None:
    one, same, other = (
        contents(tiny_checkpoint(tmp_path / name, seed=seed)) for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    )
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tiny_checkpoint_holds_the_type_and_the_fields_it_was_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_checkpoint(tmp_path, dtype=dtype, tie_word_embeddings=True, head_dim=6, num_key_value_heads=None)
    config = json.loads((folder / "config.json").read_text())
    assert f"torch.{config['torch_dtype']}" == str(dtype)
    assert "num_key_value_heads" not in config
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert "lm_head.weight" not in weights
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (4 * 6, 32)


def test_the_tokenizer_of_a_tiny_checkpoint_reads_any_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(tiny_checkpoint(tmp_path))
    text = "Zoë  saw\n日本 🐈 </s>"
    ids, _ = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode([1, *ids, 2]) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 259)


@pytest.mark.parametrize("family", ["llama", TOY, PAIR], ids=["llama", "toy", "pair"])
def test_every_family_has_a_tiny_checkpoint_that_is_the_same_each_time(
    tmp_path: Path, family: str | Architecture
) -> None:
    one, same, other = (
        contents(tiny_checkpoint(tmp_path / name, family=family, seed=seed))
        for name, seed in [("a", 3), ("b", 3), ("c", 4)]
    )
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}


def test_a_weight_does_not_depend_on_the_others() -> None:
    small = drawn_weights(TOY, TOY.tiny, seed=1)
    large = drawn_weights(TOY, {**TOY.tiny, "num_hidden_layers": 3}, seed=1)
    assert len(large) == len(small) + 5
    assert all(torch.equal(large[name], weight) for name, weight in small.items())
    assert len({float(weight.flatten()[0]) for weight in large.values()}) == len(large)


def test_weights_are_near_one_where_they_scale_and_of_size_one_where_they_multiply() -> None:
    weights = drawn_weights(TOY, {**TOY.tiny, "hidden_size": 256}, seed=1)
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert abs(float(weight.mean()) - 1) < 0.1, name
        else:
            assert abs(float(weight.std()) * weight.shape[1] ** 0.5 - 1) < 0.1, name


def test_a_tied_weight_is_not_in_the_checkpoint() -> None:
    tied = replace(TOY, ties=lambda _: {"lm_head.weight": "embed_tokens.weight"})
    assert drawn_weights(TOY, TOY.tiny, seed=0).keys() - drawn_weights(tied, TOY.tiny, seed=0).keys() == {
        "lm_head.weight"
    }


def test_an_encoder_decoders_tokenizer_is_like_t5s(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a", family=PAIR)
    tokenizer = Tokenizer.open(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 1, 280)
    inner = byte_tokenizer("seq2seq", extra_ids=21)
    assert inner.to_str(pretty=True) == (folder / "tokenizer.json").read_text()
    assert inner.encode("a").ids[1:] == [1]
    assert [inner.token_to_id(f"<extra_id_{number}>") for number in (0, 20)] == [279, 259]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 1, "pad_token_id": 0}
    fewer = Tokenizer.open(tiny_checkpoint(tmp_path / "b", family=PAIR, extra_ids=5))
    assert fewer.vocab_size == 259 + 5
    # Text is never a sentinel.
    assert len(tokenizer.encode("<extra_id_0>")[0]) == len("<extra_id_0>")


def test_a_family_that_there_is_not_or_that_has_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model family 'gpt' \(installed: .*llama"):
        tiny_checkpoint(tmp_path, family="gpt")
    with pytest.raises(ConfigError, match=r"the family toy gives no config .* set its Architecture's tiny"):
        tiny_checkpoint(tmp_path, family=replace(TOY, tiny={}))


def test_every_built_in_family_has_a_tiny_config() -> None:
    for family in architectures(load_plugins()).values():
        assert family.tiny.get("model_type") in family.model_types, family.name


def test_run_cli_gives_what_a_command_printed_and_how_it_ended(
    run_cli: RunCli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_cli("inspect", tiny_checkpoint(tmp_path / "model"))
    assert done.exit_code == 0
    assert "llama" in done.stdout
    assert done.stderr == ""
    refused = run_cli("inspect", tmp_path / "nothing")
    assert (refused.exit_code, refused.stdout) == (66, "")
    assert refused.stderr.startswith("error: ")
    assert capsys.readouterr() == ("", "")
