"""NF4 with double quantization on a GPU, both ways, against bitsandbytes and a copy: `python benchmarks/gpu_nf4.py`.

Before anything is timed, ours is compared with our C kernels on the CPU, both ways, and what bitsandbytes' GPU kernel
makes of the same codes and scales with what ours does.

"called" is the time of one call after the other from Python, the host's included where the GPU waits for it; "GPU
alone" that of the GPU while the host is ahead.
"dequantize" fills a bfloat16 tensor that is there, from codes and 8-bit scales. "quantize" makes codes and float32
scales: one kernel each side. "quantize both levels" is a whole call, with what it says to the host: ours sees to
NaN and infinity, and takes the scales to the CPU, where the stored offset has its definition.

"of copy" is the bandwidth, all bytes that must be read and written over the time, as a part of that of a copy which
reads and writes as many.
"""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import gpu
import torch
from report import publish
from torch import Tensor

from qlora_kernels import QuantizedTensor, dequantize, quantize

_SIZES = (1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 500_000_768)
_QUICK = (1 << 20, 1 << 24, 1 << 26)
_COLUMNS = 1024


class Task(NamedTuple):
    """What is timed, the bytes that it must move, and its goals for tensors small and large."""

    name: str
    bytes_per_weight: float
    candidates: Mapping[str, gpu.Call]
    of_copy: float
    """The goal from 50 million weights on, as a part of a copy's bandwidth."""
    of_peer: tuple[float, float]
    """The goal as a multiple of the peer's speed: up to 16 million weights, and from 50 million on."""


def _peers_state(q: QuantizedTensor) -> Any:
    from bitsandbytes.functional import QuantState

    nested = QuantState(absmax=q.nested_absmax, blocksize=256, code=q.nested_levels, dtype=torch.float32)
    return QuantState(
        absmax=q.absmax,
        shape=torch.Size(q.shape),
        code=q.levels,
        blocksize=q.block_size,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=q.offset,
        state2=nested,
    )


def _check_identity(weight: Tensor) -> int:
    """Assert that CPU and GPU have the same bits, and return how many weights bitsandbytes' kernel makes otherwise."""
    from bitsandbytes.functional import dequantize_4bit

    ours, on_cpu = quantize(weight), quantize(weight.cpu())
    for name, found, wanted in zip(ours._fields, ours, on_cpu, strict=True):
        same = torch.equal(found.cpu(), wanted) if isinstance(wanted, Tensor) else found == wanted
        assert same, f"{name} of {weight.numel()} weights differs between CPU and GPU"
    dense = dequantize(ours, torch.bfloat16)
    assert torch.equal(dense.cpu(), dequantize(on_cpu, torch.bfloat16)), f"{weight.numel()} weights dequantized"
    theirs = dequantize_4bit(ours.codes.view(-1, 1), _peers_state(ours))
    return int((theirs.view(torch.int16) != dense.view(torch.int16)).sum())


def _dequantize(weight: Tensor) -> Task:
    from bitsandbytes.functional import dequantize_4bit

    q = quantize(weight)
    bytes_per_weight = 2 + 0.5 + 1 / 64 + 4 / (64 * 256)
    sets = gpu.sets_past_cache(int(bytes_per_weight * weight.numel()))
    stored = [q._replace(codes=q.codes.clone(), absmax=q.absmax.clone()) for _ in range(sets)]
    theirs = [(each.codes.view(-1, 1), _peers_state(each)) for each in stored]
    outs = [torch.empty_like(weight) for _ in range(sets)]
    return Task(
        "dequantize",
        bytes_per_weight,
        {
            "ours": lambda i: dequantize(stored[i % sets], torch.bfloat16, out=outs[i % sets]),
            "peer": lambda i: dequantize_4bit(*theirs[i % sets], out=outs[i % sets]),
            "copy": _copy(bytes_per_weight, weight.numel()),
        },
        0.92,
        (2.0, 1.3),
    )


def _quantize(weight: Tensor) -> Task:
    # Registers the operator.
    import bitsandbytes  # noqa: F401

    from qlora_kernels.quantize_triton import quantize_blocks

    bytes_per_weight = 2 + 0.5 + 4 / 64
    weights = _rotated(weight, bytes_per_weight)
    peers_kernel = torch.ops.bitsandbytes.quantize_4bit.default
    return Task(
        "quantize",
        bytes_per_weight,
        {
            "ours": lambda i: quantize_blocks(weights[i % len(weights)], kind="nf4", block_size=64),
            "peer": lambda i: peers_kernel(weights[i % len(weights)], 64, "nf4", torch.uint8),
            "copy": _copy(bytes_per_weight, weight.numel()),
        },
        0.85,
        (0.0, 0.0),
    )


def _quantize_both_levels(weight: Tensor) -> Task:
    from bitsandbytes.functional import quantize_4bit

    bytes_per_weight = 2 + 0.5 + 1 / 64 + 4 / (64 * 256)
    weights = _rotated(weight, bytes_per_weight)
    return Task(
        "quantize both levels",
        bytes_per_weight,
        {
            "ours": lambda i: quantize(weights[i % len(weights)]),
            "peer": lambda i: quantize_4bit(weights[i % len(weights)], quant_type="nf4", compress_statistics=True),
            "copy": _copy(bytes_per_weight, weight.numel()),
        },
        0.0,
        (0.0, 0.0),
    )


def _rotated(weight: Tensor, bytes_per_weight: float) -> list[Tensor]:
    return [weight.clone() for _ in range(gpu.sets_past_cache(int(bytes_per_weight * weight.numel())))]


def _copy(bytes_per_weight: float, n: int) -> gpu.Call:
    """Read half of the bytes and write the other half."""
    size = int(bytes_per_weight * n / 4)
    sets = gpu.sets_past_cache(4 * size)
    sources, targets = ([torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(sets)] for _ in range(2))
    return lambda i: targets[i % sets].copy_(sources[i % sets])


def row(task: Task, n: int, timings: Mapping[str, gpu.Timing], *, how: str) -> dict[str, object]:
    """One line of the table; a goal that does not apply to this size or way of timing is left open."""
    ours, peer, copy = (timings[name] for name in ("ours", "peer", "copy"))
    of_copy, of_peer = copy.seconds / ours.seconds, peer.seconds / ours.seconds
    large, small = n >= 50e6, n <= 1 << 24
    goals = []
    if how == "GPU alone" and large and task.of_copy:
        goals.append((f">= {task.of_copy} of copy", of_copy >= task.of_copy))
    if how == "called" and (large or small) and task.of_peer[large]:
        goals.append((f">= {task.of_peer[large]} x peer", of_peer >= task.of_peer[large]))
    return {
        "operation": task.name,
        "weights": n,
        "timed": how,
        "ours us": round(ours.seconds * 1e6, 2),
        "peer us": round(peer.seconds * 1e6, 2),
        "copy us": round(copy.seconds * 1e6, 2),
        "GB/s": round(task.bytes_per_weight * n / ours.seconds / 1e9),
        "of copy": round(of_copy, 3),
        "x peer": round(of_peer, 2),
        "goal": ", ".join(goal for goal, _ in goals) or "-",
        "met": "-" if not goals else "yes" if all(met for _, met in goals) else "no",
        "spread": f"{ours.spread} / {peer.spread} / {copy.spread}",
    }


def main() -> None:
    gpu.require_gpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes and a third of the rounds")
    quick = parser.parse_args().quick
    rounds = 10 if quick else 30
    torch.manual_seed(0)
    ceilings = gpu.ceilings(rounds=5 if quick else 10)
    rows = []
    otherwise = 0
    for n in _QUICK if quick else _SIZES:
        weight = torch.randn(n // _COLUMNS, _COLUMNS, device="cuda").mul_(0.02).to(torch.bfloat16)
        otherwise += _check_identity(weight)
        for prepare in (_dequantize, _quantize, _quantize_both_levels):
            task = prepare(weight)
            for how, ahead in (("called", False), ("GPU alone", True)):
                # A whole call waits for the GPU, so that the host cannot be ahead of it.
                if not (ahead and prepare is _quantize_both_levels):
                    calls = max(2, min(50, (1 << 30) // n))
                    timings = gpu.interleaved(task.candidates, rounds=rounds, calls=calls, ahead=ahead)
                    rows.append(row(task, n, timings, how=how))
            del task
    print("CPU and GPU have the same bits;", f"bitsandbytes' GPU kernel dequantizes {otherwise} weights otherwise")
    publish("gpu_nf4", rows=rows, peers=["bitsandbytes", "triton"], ceilings=ceilings._asdict())


if __name__ == "__main__":
    main()
