"""NF4 with double quantization on a CPU, both ways, against bitsandbytes and a copy: `python benchmarks/cpu_nf4.py`.

Every path that the processor has is timed, once its bits are seen to be the peer's. The peer quantizes in plain torch.
It dequantizes in C with AVX-512 where there is that and the length of a row is a multiple of 16, else in plain C: "peer
plain" are the same weights in rows of another length, and so what it runs on other processors.

"dequantize" makes a new tensor each time, as a call without `out` does: most of that is the system giving out memory.
"dequantize into" fills one that is there; on the peer's side that is its C function alone, called with float32 scales.
A copy of a tensor of the result's dtype shows what the memory allows. The smaller size fits into the caches.
"""

import argparse
import ctypes
import os
from collections.abc import Callable, Mapping
from itertools import product

import bitsandbytes.functional as peer
import torch
from bitsandbytes.cextension import lib
from report import Timing, interleaved, publish
from torch import Tensor

from qlora_kernels import cpu, dequantize, quantize
from qlora_kernels.blockwise import dequantize_absmax

# The peer's two ways: rows of a multiple of 16 weights, and not.
_COLUMNS, _OTHER_COLUMNS = 1024, 8
# Seconds for which torch's threads may look for more work.
_PAUSE = 0.03
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _through(path: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        os.environ[cpu.VARIABLE] = path
        return call()

    return run


def _theirs(weight: Tensor) -> tuple[Tensor, peer.QuantState]:
    return peer.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def _in_other_rows(weight: Tensor) -> tuple[Tensor, peer.QuantState]:
    codes, state = _theirs(weight)
    state.shape = (weight.numel() // _OTHER_COLUMNS, _OTHER_COLUMNS)
    return codes, state


def _check_identity(weight: Tensor) -> None:
    """On every path, both ways; the peer's offset depends on the number of threads, so under one."""
    codes, state = _theirs(weight)
    dense = peer.dequantize_4bit(codes, state)
    assert torch.equal(dense.view(-1), peer.dequantize_4bit(*_in_other_rows(weight)).view(-1))
    wanted = (codes.view(-1), state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    for path in cpu.paths():
        os.environ[cpu.VARIABLE] = path
        ours = quantize(weight)
        assert all(torch.equal(a, b) for a, b in zip(ours[:6], wanted, strict=True)), path
        assert torch.equal(dequantize(ours, weight.dtype), dense), path


def _quantizers(weight: Tensor) -> dict[str, Callable[[], object]]:
    return {path: _through(path, lambda: quantize(weight)) for path in cpu.paths()} | {"peer": lambda: _theirs(weight)}


def _dequantizers(weight: Tensor) -> dict[str, Callable[[], object]]:
    ours = quantize(weight)
    codes, state = _theirs(weight)
    _, other_state = _in_other_rows(weight)
    paths = {path: _through(path, lambda: dequantize(ours, weight.dtype)) for path in cpu.paths()}
    return paths | {
        "peer": lambda: peer.dequantize_4bit(codes, state),
        "peer plain": lambda: peer.dequantize_4bit(codes, other_state),
    }


def _dequantizers_into(weight: Tensor) -> dict[str, Callable[[], object]]:
    ours = quantize(weight)
    out, source = torch.empty_like(weight), weight.clone()
    paths = {path: _through(path, lambda: dequantize(ours, weight.dtype, out=out)) for path in cpu.paths()}
    scales = dequantize_absmax(ours)
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[weight.dtype]
    function = getattr(lib, f"cdequantize_blockwise_cpu_nf4_{name}")

    def theirs(columns: int) -> Callable[[], object]:
        sizes = [ctypes.c_longlong(size) for size in (ours.block_size, weight.numel() // columns, columns)]
        # The tensors themselves, and not only where they lie, are kept for as long as the call is.
        return lambda: function(*(ctypes.c_void_p(part.data_ptr()) for part in (ours.codes, scales, out)), *sizes)

    for columns in (_COLUMNS, _OTHER_COLUMNS):
        theirs(columns)()
        assert torch.equal(out, dequantize(ours, weight.dtype))
    return paths | {
        "peer": theirs(_COLUMNS),
        "peer plain": theirs(_OTHER_COLUMNS),
        "copy": lambda: out.copy_(source),
    }


def _row(weights: int, timings: Mapping[str, Timing]) -> dict[str, object]:
    speeds = {name: weights / timing.wall / 1e9 for name, timing in timings.items()}
    best = cpu.paths()[0]
    others = ("peer", "peer plain", "copy")
    row: dict[str, object] = {}
    for name in (*cpu.paths(), *others):
        row[f"{name} Gw/s"] = round(speeds[name], 3) if name in speeds else "-"
    for name in others:
        row[f"{best}/{name}"] = round(speeds[best] / speeds[name], 2) if name in speeds else "-"
    for name in (best, "peer"):
        timing = timings[name]
        row[f"{name} CPU s"] = round(timing.cpu, 4)
        row[f"{name} spread"] = f"{timing.fastest / timing.wall:.2f}-{timing.slowest / timing.wall:.2f}"
    return row


_OPERATIONS = {"quantize": _quantizers, "dequantize": _dequantizers, "dequantize into": _dequantizers_into}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=int, nargs="+", default=[1 << 20, 1 << 26], help="sizes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each side (default: %(default)s)")
    arguments = parser.parse_args()
    all_threads = torch.get_num_threads()
    print(f"blocks of 64; here: {cpu.description()}")
    rows = []
    for dtype, weights, threads in product(_DTYPES, arguments.weights, sorted({1, all_threads})):
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(weights // _COLUMNS, _COLUMNS, generator=generator).mul_(0.02).to(dtype)
        _check_identity(weight)
        for operation, candidates in _OPERATIONS.items():
            torch.set_num_threads(1)
            calls = candidates(weight)
            torch.set_num_threads(threads)
            timings = interleaved(calls, rounds=arguments.rounds, pause=_PAUSE)
            name = str(dtype).removeprefix("torch.")
            what = {"operation": operation, "dtype": name, "weights": weight.numel(), "threads": threads}
            rows.append(what | _row(weight.numel(), timings))
    print("identical bits on every path; Gw/s: 1e9 weights a second")
    publish("cpu_nf4", rows=rows, peers=["bitsandbytes"])


if __name__ == "__main__":
    main()
