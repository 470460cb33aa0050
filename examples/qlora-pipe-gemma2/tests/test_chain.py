"""The installed plugin through qlora-pipe's commands, and its adapters in PEFT."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import checkpoint, ours
from peer import theirs
from peft import PeftModel
from torch import Tensor

from qlora_pipe.artifacts import Adapter, Checkpoint
from qlora_pipe.cli import execute
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.stages.load import load
from qlora_pipe_gemma2 import ARCHITECTURE, register_architectures

CPU = torch.device("cpu")


def run(*words: object) -> None:
    assert execute([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its store, a text, and a run on each of both."""
    folder = tmp_path_factory.mktemp("work")
    checkpoint(folder / "base", seed=3)
    (folder / "text.txt").write_text("The fox had one big red ball, and it was happy.\n" * 60)
    run("quantize", folder / "base", folder / "store")
    for base in ("base", "store"):
        settings = "--steps 12 --learning-rate 2e-2 --batch-size 2 --max-tokens 48 --rank 3 --held-out 0.2 --pack"
        data = f"text:{folder / 'text.txt'}"
        run("finetune", folder / base, "--data", data, "--out", folder / f"run-{base}", *settings.split())
    return folder


def some_ids(*shape: int) -> Tensor:
    return torch.randint(ARCHITECTURE.tiny["vocab_size"], shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_adapter(base: Path, adapter: Path) -> LoadedModel:
    opened = Checkpoint.open(base)
    return load(opened, ARCHITECTURE, dtype=torch.float32, device=CPU, adapter=Adapter.open(adapter))


def test_the_entry_point_brings_the_family() -> None:
    assert find_architecture(load_plugins(), "gemma2") == ARCHITECTURE == register_architectures()[0]


def test_training_makes_the_text_likelier(work: Path) -> None:
    for base in ("base", "store"):
        losses = [
            json.loads(line)["loss"] for line in (work / f"run-{base}" / "metrics.jsonl").read_text().splitlines()
        ]
        assert losses[-1] < 0.7 * losses[0]


def test_what_was_merged_goes_on_with_a_prompt(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("merge", work / "store", work / "run-store", work / "merged")
    said = []
    for model in ([work / "merged"], [work / "store", "--adapter", work / "run-store"]):
        capsys.readouterr()
        run("generate", *model, "--prompt", "The fox had one", "--max-new-tokens", 12)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != "\n"


def test_peft_gives_the_logits_of_our_adapter(work: Path) -> None:
    theirs_adapted = PeftModel.from_pretrained(theirs(work / "base", torch.float32), work / "run-base" / "final")
    ids = some_ids(2, 31)
    with torch.inference_mode():
        got = with_adapter(work / "base", work / "run-base").module(ids)
        assert (got - theirs_adapted(ids).logits).abs().max() <= 1e-4
        assert (got - ours(work / "base", torch.float32)(ids)).abs().max() > 0.1, "an adapter that changes nothing"
