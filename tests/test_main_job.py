"""The main job on the embedded model, so that nothing essential hangs on data a user may not have."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from qlora_pipe.artifacts import Adapter, open_model
from qlora_pipe.cli import execute
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.demo import chain
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.stages.load import load


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main-job")
    text = "".join(json.dumps(row) + "\n" for row in chain.skill_rows()[:200])
    (folder / "rows.jsonl").write_text(text)
    assert execute(["quantize", str(chain.demo_base()), str(folder / "store")]) == 0
    return folder


def finetuned(work: Path, base: Path, name: str, *flags: str) -> list[dict[str, float]]:
    settings = ["--steps", "25", "--batch-size", "8", "--rank", "8", "--learning-rate", "3e-3", "--max-grad-norm", "1"]
    command = ["finetune", str(base), "--data", f"jsonl:{work / 'rows.jsonl'}", "--out", str(work / name)]
    assert execute([*command, *settings, *flags]) == 0
    return [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["store", "checkpoint"])
def test_a_fine_tune_lowers_the_held_out_loss(work: Path, kind: str) -> None:
    base = work / "store" if kind == "store" else chain.demo_base()
    steps = finetuned(work, base, f"run-{kind}")
    assert len(steps) == 25
    assert steps[-1]["eval_loss"] < 0.4 * steps[0]["eval_loss_start"]


def test_merging_keeps_what_was_trained(work: Path) -> None:
    finetuned(work, work / "store", "run-merge")
    command = ["merge", str(work / "store"), str(work / "run-merge"), str(work / "merged"), "--dtype", "float32"]
    assert execute(command) == 0
    manager, ids = load_plugins(), torch.arange(3, 60)[None]
    logits = []
    for name, adapter in (("store", Adapter.open(work / "run-merge")), ("merged", None), ("store", None)):
        model = open_model(work / name)
        architecture = find_architecture(manager, model.config["model_type"])
        loaded = load(model, architecture, dtype=torch.float32, device=torch.device("cpu"), adapter=adapter)
        logits.append(loaded.causal.head(loaded.causal.hidden(ids)))
    adapted, merged, plain = logits
    assert (adapted - merged).abs().max() < 1e-4
    assert (adapted - plain).abs().max() > 1


def test_the_adapter_changes_what_is_generated(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetuned(work, work / "store", "run-text")
    texts = []
    for flags in ([], ["--adapter", str(work / "run-text")]):
        capsys.readouterr()
        prompt = chain.skill_rows()[-1]["prompt"]
        assert execute(["generate", str(work / "store"), *flags, "--prompt", prompt, "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out.strip())
    # The base goes on with the tale; the fine-tuned one has learnt to answer with a word or two and to stop.
    assert len(texts[1].split()) < len(texts[0].split())


def test_the_demo_computes_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = chain.finetune_config

    def short(*, seed: int, eval_data: str) -> FinetuneConfig:
        return dataclasses.replace(full(seed=seed, eval_data=eval_data), steps=6, batch_size=4)

    monkeypatch.setattr(chain, "finetune_config", short)
    monkeypatch.setattr(chain, "HELD_OUT_ROWS", 6)
    stories = []
    for seed in (0, 1):
        lines = list(chain.run_demo(tmp_path, seed=seed, manager=load_plugins()))
        assert [line[:3] for line in lines[:7]] == ["1/6", "2/6", "3/6", "4/6", "4/6", "5/6", "6/6"]
        stories.append([line.split("tok/s")[0].rsplit("  ", 1)[0] for line in lines[3:5]])
    assert all(one != other for one, other in zip(*stories, strict=True)), "another seed gives other losses"
