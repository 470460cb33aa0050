"""Loading a model: what is refused and in which words, and that packed weights are neither copied nor kept dense."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_formats.target import partial_path
from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(params=["checkpoint", "store"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of either kind whose manifest, if any, no longer watches over what a test does to it."""
    source = tiny_checkpoint(tmp_path / "checkpoint")
    if request.param == "store":
        assert execute(["quantize", str(source), str(tmp_path / "store")]) == 0
        (tmp_path / "store" / "qlora_pipe.json").unlink()
    return tmp_path / str(request.param)


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """The exit code and the one sentence of a `generate` that must not get to its first token."""
    capsys.readouterr()
    code = execute(["generate", str(folder), "--prompt", "x", "--max-new-tokens", "1", *more])
    said = capsys.readouterr()
    assert said.out == ""
    (sentence,) = said.err.splitlines()
    assert sentence.startswith("error: ")
    return code, sentence.removeprefix("error: ")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_missing_tensor_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(model, lambda tensors: tensors.pop(NORM))
    assert refusal(model, capsys) == (65, f"{model.name} lacks the tensor {NORM} of a llama model.")
    rewrite(model, lambda tensors: tensors.pop("model.norm.weight"))
    code, sentence = refusal(model, capsys)
    assert code == 65
    assert sentence.endswith("of a llama model (and 1 more).")


def test_an_unknown_tensor_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    rewrite(model, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert refusal(model, capsys) == (
        65,
        f"{model.name} holds the tensor {name}, which a llama model with this config does not have.",
    )


def test_a_tensor_of_another_shape_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(model, lambda tensors: tensors.update({NORM: torch.ones(31)}))
    assert refusal(model, capsys) == (65, f"{model.name}: {NORM} has shape [31], and its config asks for [32].")


def test_a_config_of_other_sizes_than_the_weights_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reconfigure(model, intermediate_size=73)
    code, sentence = refusal(model, capsys)
    assert code == 65
    assert re.fullmatch(
        rf"{model.name}: model\.layers\.\d\.mlp\.\w+_proj\.weight has shape \[(32, 72|72, 32)\],"
        r" and its config asks for \[(32, 73|73, 32)\]\.",
        sentence,
    )
    reconfigure(model, intermediate_size=72, num_hidden_layers=1)
    code, sentence = refusal(model, capsys)
    assert code == 65
    assert re.search(
        r"holds the tensor model\.layers\.1\.\S+, which a llama model .* does not have \(and 8 more\)\.", sentence
    )


def test_tables_that_older_checkpoints_carry_are_passed_over(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for _ in range(2):
        capsys.readouterr()
        assert execute(["generate", str(model), "--prompt", "x", "--max-new-tokens", "5"]) == 0
        said.append(capsys.readouterr().out)
        rewrite(model, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert said[0] == said[1] != "\n"


@pytest.mark.parametrize("left", [0, 7, 300, -1])
def test_a_truncated_file_is_refused(model: Path, capsys: pytest.CaptureFixture[str], left: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    code, sentence = refusal(model, capsys)
    assert code == 65
    assert str(file) in sentence


@pytest.mark.parametrize("model_type", ["no-such-family", None, ["llama"], 5])
def test_an_unknown_architecture_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], model_type: object
) -> None:
    reconfigure(model, model_type=model_type)
    code, sentence = refusal(model, capsys)
    assert code == 78
    assert sentence.startswith(f"no installed plugin reads model_type {model_type!r} (installed: ")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_act": "swish9"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused_by_its_field(
    model: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], says: str
) -> None:
    reconfigure(model, **fields)
    code, sentence = refusal(model, capsys)
    assert code == 78
    assert says in sentence


def test_a_missing_tokenizer_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "tokenizer.json").unlink()
    code, sentence = refusal(model, capsys)
    assert code == 66
    assert sentence.startswith(f"{model} has neither tokenizer.json nor a SentencePiece model")


def test_a_missing_or_empty_or_half_written_folder_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(tmp_path / "nowhere", capsys) == (66, f"there is no folder '{tmp_path}/nowhere': check the path.")
    (tmp_path / "empty").mkdir()
    code, sentence = refusal(tmp_path / "empty", capsys)
    assert code == 65
    assert sentence.startswith(f"{tmp_path}/empty is not a model: it has no config.json")
    # What an interrupted `quantize` leaves.
    partial = model.rename(partial_path(model))
    code, sentence = refusal(model, capsys)
    assert code == 66
    assert sentence == (
        f"'{model}' is unfinished, its files lie in '{partial}':"
        " run the command that was making it again, and it goes on from there."
    )
    assert refusal(partial, capsys)[0] == 66


def test_a_store_whose_files_were_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert execute(["quantize", str(tiny_checkpoint(tmp_path / "source")), str(store)]) == 0
    (store / "generation_config.json").write_text("{}")
    code, sentence = refusal(store, capsys)
    assert code == 65
    assert str(store / "generation_config.json") in sentence
    (store / "generation_config.json").unlink()
    code, sentence = refusal(store, capsys)
    assert code == 65
    assert f"{store} lacks the file generation_config.json" in sentence


def test_a_folder_without_weights_and_an_adapter_alone_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").unlink()
    code, sentence = refusal(model, capsys)
    assert code == 65
    assert "holds no weights: neither model.safetensors nor model.safetensors.index.json" in sentence
    (model / "config.json").rename(model / "adapter_config.json")
    code, sentence = refusal(model, capsys)
    assert code == 65
    assert "it is an adapter, which is used together with its base model" in sentence


def test_levels_of_another_type_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    assert execute(["quantize", str(tiny_checkpoint(tmp_path / "source")), str(store)]) == 0
    (store / "qlora_pipe.json").unlink()
    rewrite(store, lambda tensors: tensors[f"{DOWN}.quant_map"].mul_(0.5))
    assert refusal(store, capsys) == (
        65,
        f"{DOWN}: its quant_map is not nf4's table of levels; the file is of another format.",
    )


def test_a_gpu_that_is_not_there_is_said(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, sentence = refusal(model, capsys, "--device", "cuda")
    assert code == 78
    assert sentence == "device cuda was asked for, and torch sees no GPU here; use --device cpu."
