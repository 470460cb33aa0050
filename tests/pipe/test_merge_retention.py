"""How much of an adapter outlives the rounding of a merge, and what is refused for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint
from tests.pipe.adapters import DOWN, GATE, make_adapter, save_adapter


def run(*words: object) -> int:
    return execute([str(word) for word in words])


def with_weight(checkpoint: Path, name: str, weight: Tensor) -> Path:
    file = checkpoint / "model.safetensors"
    save_file({**load_file(file), name: weight}, file, metadata={"format": "pt"})
    return checkpoint


def retention(merged: Path) -> dict[str, float | None]:
    found: dict[str, float | None] = json.loads((merged / "qlora_pipe.json").read_text())["retention"]
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_that_rounding_would_erase_is_refused_unless_told_to_go_on(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A change of far less than half of the last digit that the type has at 1.
    base = with_weight(tiny_checkpoint(tmp_path / "base"), f"{GATE}.weight", torch.ones(72, 32))
    adapter, out = make_adapter(tmp_path / "adapter", {DOWN: 0.02, GATE: 1e-5}), tmp_path / "merged"
    assert run("merge", base, adapter, out, "--dtype", dtype) == 65
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {GATE}: rounding to {dtype} would keep 0.0% of the adapter, less than 50%."
        " Merge with a wider --dtype, or go on with --min-retention 0."
    )
    assert not out.exists()
    assert run("merge", base, adapter, out, "--dtype", dtype, "--min-retention", 0) == 0
    assert "at least 0.0% of the adapter kept" in capsys.readouterr().out
    assert retention(out) == {DOWN: pytest.approx(1, abs=0.01), GATE: 0.0}
    assert torch.equal(load_file(out / "model.safetensors")[f"{GATE}.weight"].float(), torch.ones(72, 32))
    assert run("merge", base, adapter, tmp_path / "wide", "--dtype", "float32") == 0
    assert retention(tmp_path / "wide") == {DOWN: pytest.approx(1, abs=1e-5), GATE: pytest.approx(1, abs=1e-3)}


@pytest.mark.parametrize(("below", "code"), [(True, 0), (False, 65)])
def test_the_least_share_to_keep_is_the_users_choice(
    below: bool, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At 1, bfloat16 counts in steps of 2**-7: of these changes, in parts of a step, the first alone leaves a trace.
    step, parts = 2.0**-7, torch.tensor([0.6] + 15 * [0.45] + 16 * [0.4])
    base = with_weight(tiny_checkpoint(tmp_path / "base"), f"{DOWN}.weight", torch.ones(32, 72))
    adapter = save_adapter(tmp_path / "adapter", {DOWN: (torch.ones(1, 72), step * parts[:, None])})
    kept = 0.6 / float(parts.square().sum())
    least = kept + (-0.001 if below else 0.001)
    assert run("merge", base, adapter, tmp_path / "merged", "--min-retention", least) == code
    assert f"{kept:.1%} of the adapter" in "".join(capsys.readouterr())
    assert (tmp_path / "merged").exists() == below


@pytest.mark.parametrize("name", [f"{DOWN}.weight", "model.norm.weight"])
def test_values_that_the_type_does_not_hold_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    weight = load_file(base / "model.safetensors")[name]
    weight.view(-1)[5] = 1e5
    with_weight(base, name, weight)
    adapter = make_adapter(tmp_path / "adapter", {DOWN: 0.02, GATE: 0.02})
    assert run("merge", base, adapter, tmp_path / "merged", "--dtype", "float16", "--min-retention", 0) == 65
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {name} would hold values that float16 does not;"
        " merge with a wider --dtype, or look into the base and the adapter."
    )
    assert not (tmp_path / "merged").exists()
    assert run("merge", base, adapter, tmp_path / "wide", "--dtype", "float32") == 0


def test_an_adapter_that_changes_nothing_is_merged(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", {DOWN: 0.0})
    assert run("merge", base, adapter, tmp_path / "merged") == 0
    assert retention(tmp_path / "merged") == {DOWN: None}
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", {DOWN: (torch.ones(1, 72), torch.full((32, 1), float("nan")))})
    assert run("merge", base, adapter, tmp_path / "merged", "--dtype", "float32", "--min-retention", 0) == 65
    assert f"error: {DOWN}.weight is not finite;" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
