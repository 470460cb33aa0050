"""The main job on a GPU: the same commands, close to what a CPU gives."""

import json
from pathlib import Path

import pytest
import torch

from qlora_kernels import dequantize_triton
from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    tiny_checkpoint(folder / "source", intermediate_size=73)
    rows = [{"prompt": f"{n} and one is", "answer": f" {n + 1}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert execute(["quantize", str(folder / "source"), str(folder / "store")]) == 0
    return folder


def losses(work: Path, name: str, *flags: str) -> list[float]:
    settings = ["--steps", "8", "--batch-size", "4", "--rank", "4", "--learning-rate", "1e-2", "--dropout", "0"]
    command = ["finetune", str(work / "store"), "--data", f"jsonl:{work / 'rows.jsonl'}", "--out", str(work / name)]
    assert execute([*command, *settings, *flags]) == 0
    return [json.loads(line)["loss"] for line in (work / name / "metrics.jsonl").read_text().splitlines()]


def test_float32_training_follows_the_cpu(work: Path) -> None:
    on_cpu = losses(work, "cpu", "--device", "cpu")
    on_gpu = losses(work, "gpu", "--device", "cuda", "--dtype", "float32")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_training_lowers_the_loss(work: Path, dtype: str) -> None:
    found = losses(work, dtype, "--device", "cuda", "--dtype", dtype)
    assert found[-1] < found[0]


def test_training_calls_the_kernel(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    launch = dequantize_triton.dequantize_triton
    monkeypatch.setattr(
        dequantize_triton, "dequantize_triton", lambda *args, **kwargs: calls.append(1) or launch(*args, **kwargs)
    )
    losses(work, "counted", "--device", "cuda", "--held-out", "0")
    # 14 quantised layers, forward and backward; the first layer's three projections need no gradient of their input.
    assert len(calls) == 8 * (14 + 14 - 3)


def test_a_stopped_run_goes_on_with_the_same_bytes(work: Path) -> None:
    losses(work, "whole", "--device", "cuda", "--dropout", "0.1", "--save-every", "4")
    losses(work, "again", "--device", "cuda", "--dropout", "0.1", "--save-every", "4")
    for part in ("final", "checkpoints/step-8"):
        for path in (work / "again" / part).iterdir():
            path.unlink()
        (work / "again" / part).rmdir()
    losses(work, "again", "--device", "cuda", "--dropout", "0.1", "--save-every", "4")
    one, two = (work / name / "final" / "adapter_model.safetensors" for name in ("whole", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_greedy_text_equals_the_cpus(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for device in ("cpu", "cuda"):
        command = ["generate", str(work / "store"), "--prompt", "one", "--device", device, "--dtype", "float32"]
        capsys.readouterr()
        assert execute([*command, "--max-new-tokens", "16"]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
