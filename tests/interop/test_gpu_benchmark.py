"""What the benchmarks of a GPU hand to the peer is what ours gets."""

import importlib
from pathlib import Path

import pytest
import torch

peer = pytest.importorskip("bitsandbytes.functional", reason="the peer is not installed")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_peer_dequantizes_the_same_codes_and_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu_nf4 = importlib.import_module("gpu_nf4")
    q = gpu_nf4.quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    theirs = peer.dequantize_4bit(q.codes.view(-1, 1), gpu_nf4._peers_state(q))
    assert torch.equal(theirs, gpu_nf4.dequantize(q, torch.bfloat16))
