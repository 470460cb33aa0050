"""The optimizer as a user meets it: one result for every budget, pages in the metrics, sentences for bad settings."""

import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_formats import disk
from qlora_formats.tensorfile import TensorFile
from qlora_pipe.cli import execute
from qlora_pipe.train.clip import clip_factor
from tests.pipe.runs import contents, finetune_line, metrics, small_checkpoint, write_rows

KEYS = {"pages_in", "pages_out", "page_bytes"}


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "base")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def train(base: Path, rows: Path, out: Path, **settings: Any) -> Path:
    assert execute(finetune_line(base, rows, out, **{"eval_every": 0, "held_out": 0, **settings})) == 0
    return out


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_a_paged_run_ends_with_the_bytes_of_one_without_pages_and_counts_them(
    base: Path, rows: Path, tmp_path: Path, optimizer: str
) -> None:
    whole = train(base, rows, tmp_path / "whole", optimizer=optimizer)
    paged = train(base, rows, tmp_path / "paged", optimizer=optimizer, optimizer_budget=0)
    assert contents(paged / "final") == contents(whole / "final")
    states = [(run / "checkpoints" / "step-6" / "state.safetensors").read_bytes() for run in (paged, whole)]
    assert states[0] == states[1]
    assert not any(KEYS & step.keys() for step in metrics(whole))
    for step in metrics(paged):
        assert step["pages_in"] == step["pages_out"] > 3
        assert step["page_bytes"] > 0
    strip = [{key: value for key, value in step.items() if key not in KEYS | {"seconds"}} for step in metrics(paged)]
    assert strip == [{key: value for key, value in step.items() if key != "seconds"} for step in metrics(whole)]
    assert not [path for path in paged.iterdir() if path.name.startswith(".")]


def test_the_two_kinds_end_elsewhere_but_not_far_apart(base: Path, rows: Path, tmp_path: Path) -> None:
    def parts(optimizer: str) -> Tensor:
        file = TensorFile.open(
            train(base, rows, tmp_path / optimizer, optimizer=optimizer) / "final/adapter_model.safetensors"
        )
        return torch.cat([file.tensor(name).flatten() for name in file.infos])

    wide, narrow = parts("adamw"), parts("adamw-8bit")
    assert 0 < (wide - narrow).norm() < 0.02 * wide.norm()


def test_the_budget_may_change_between_two_starts_and_the_kind_may_not(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = train(base, rows, tmp_path / "whole", steps=4), tmp_path / "run"
    settings = {"eval_every": 0, "held_out": 0, "steps": 4, "save_every": 2}
    train(base, rows, out, **settings)
    # As if it had been killed within the third step.
    for name in ("final", "checkpoints/step-4"):
        for path in (out / name).iterdir():
            path.unlink()
        (out / name).rmdir()
    capsys.readouterr()
    assert execute(finetune_line(base, rows, out, **settings, optimizer="adamw-8bit")) == 73
    assert "optimizer" in capsys.readouterr().err
    train(base, rows, out, **settings, optimizer_budget=0)
    assert contents(out / "final") == contents(whole / "final")
    assert [step.keys() >= KEYS for step in metrics(out)] == [False, False, True, True]


def test_a_disk_without_room_for_the_states_is_one_sentence(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_fd: int, _n_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_reserve", full)
        settings = {"eval_every": 0, "held_out": 0, "optimizer_budget": 0}
        assert execute(finetune_line(base, rows, out, **settings)) == 74
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert f"cannot write {out / 'optimizer'}: No space left on device" in errors[0]
    whole = train(base, rows, tmp_path / "whole")
    assert contents(train(base, rows, out, optimizer_budget="auto") / "final") == contents(whole / "final")


@pytest.mark.parametrize("given", ["much", "-1", "1.5"])
def test_a_budget_that_is_none_is_named(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    assert execute(finetune_line(base, rows, tmp_path / "run", optimizer_budget=given)) == 78
    said = capsys.readouterr().err
    assert f"optimizer_budget takes a whole number, at least 0, or auto, and was given {given!r}" in said


def test_the_resolved_settings_hold_a_budget_as_it_was_given(base: Path, rows: Path, tmp_path: Path) -> None:
    out = train(base, rows, tmp_path / "run", steps=1, optimizer_budget=3)
    assert "optimizer_budget: 3\n" in (out / "config.resolved.yaml").read_text()
    again = train(base, rows, tmp_path / "again", steps=1)
    assert "optimizer_budget: auto\n" in (again / "config.resolved.yaml").read_text()


@pytest.mark.parametrize("norm", [0.0, 1e-8, 0.1, 0.29999, 0.3, 7.77, 1e6])
@pytest.mark.parametrize("scale", [1.0, 8192.0])
@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_the_factor_has_the_bits_of_the_same_arithmetic_on_the_host(norm: float, scale: float, limit: float) -> None:
    scaled = torch.tensor(norm * scale)
    true = float(scaled) / scale
    wanted = (min(1.0, limit / (true + 1e-6)) if limit else 1.0) / scale
    found = clip_factor(scaled, loss=torch.tensor(1.5), scale=scale, limit=limit)
    assert found.dtype == torch.float32
    assert found.item() == torch.tensor(wanted, dtype=torch.float64).float().item()


@pytest.mark.parametrize(("norm", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_what_is_not_finite_gives_a_factor_that_skips_the_step(norm: float, loss: float, limit: float) -> None:
    assert clip_factor(torch.tensor(norm), loss=torch.tensor(loss), scale=2.0, limit=limit).isnan()
