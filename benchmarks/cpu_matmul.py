"""A few rows times a 4-bit weight on a CPU, as in generation: `python benchmarks/cpu_matmul.py`.

`quantized_matmul` on each path against what it replaces (our dequantise and a dense product), against a dense product
alone, of a weight that is dense already, and against bitsandbytes. "peer" is its `matmul_4bit`; "peer packed" is what
its layers do in inference on processors with AVX512-BF16: weights brought into another order beforehand, products of
values rounded to bfloat16 whatever the dtype. The layers are those of a model of 110 million parameters and of an 8B
model. The weights are in turn of several matrices, together larger than the second cache; the third may hold them.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from itertools import product

import bitsandbytes.functional as peer
import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from report import Timing, interleaved, publish
from torch import Tensor

from qlora_kernels import QuantizedTensor, cpu, dequantize, quantize, quantized_matmul, serves

# [out, in] of one layer's projections.
_LAYERS = {
    "110M": {"q, k, v or o": (1024, 1024), "gate or up": (2816, 1024), "down": (1024, 2816)},
    "8B": {"q or o": (4096, 4096), "gate or up": (14336, 4096), "down": (4096, 14336)},
}
_GROUPS = {"110M": {"q, k, v": ((1024, 1024),) * 3}, "8B": {"q, k, v": ((4096, 4096), (1024, 4096), (1024, 4096))}}
_DTYPES = (torch.float32, torch.bfloat16)
# Bytes of packed weights that are gone through in turn.
_TURN = 8 << 20
# Seconds for which torch's threads may look for more work.
_PAUSE = 0.02


def _in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """All of them, one after another: the timing is divided by their number."""

    def run() -> None:
        for call in calls:
            call()

    return run


def _through(path: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        os.environ[cpu.VARIABLE] = path
        return call()

    return run


def _theirs(q: QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, peer.QuantState]:
    """Our packed weight as the peer takes it; its bytes are the same."""
    nested = peer.QuantState(
        absmax=q.nested_absmax, code=q.nested_levels, blocksize=q.nested_block_size, dtype=torch.float32
    )
    state = peer.QuantState(
        absmax=q.absmax,
        shape=torch.Size(q.shape),
        dtype=dtype,
        blocksize=q.block_size,
        code=q.levels,
        quant_type="nf4",
        offset=q.offset,
        state2=nested,
    )
    return q.codes.view(-1, 1), state


def _candidates(
    shapes: tuple[tuple[int, int], ...], rows: int, dtype: torch.dtype, *, paths: tuple[str, ...]
) -> tuple[dict[str, Callable[[], object]], int]:
    """What is timed, and how often each call does it."""
    generator = torch.Generator().manual_seed(0)
    packed_bytes = sum(out * length for out, length in shapes) // 2
    turns = max(1, _TURN // packed_bytes)
    sets = [[quantize(torch.randn(shape, generator=generator).mul_(0.02)) for shape in shapes] for _ in range(turns)]
    x = torch.randn(rows, shapes[0][1], generator=generator).to(dtype)
    dense = [[dequantize(q, dtype) for q in weights] for weights in sets]
    theirs = [[_theirs(q, dtype) for q in weights] for weights in sets]
    for weights, states in zip(sets, theirs, strict=True):
        for y, (codes, state) in zip(quantized_matmul(x, weights), states, strict=True):
            error = (y - matmul_4bit(x, codes.t(), quant_state=state)).abs().max() / y.abs().max()
            assert error < 0.03, f"the peer's product is another: {error}"
    calls: dict[str, Callable[[], object]] = {}
    for path in paths:
        os.environ[cpu.VARIABLE] = path
        if serves(x, sets[0]):
            ours = [lambda weights=weights: quantized_matmul(x, weights) for weights in sets]
            calls[path] = _through(path, _in_turn(ours))
    calls["dequantise + mm"] = _through(
        paths[0], _in_turn([lambda q=q: x @ dequantize(q, dtype).T for weights in sets for q in weights])
    )
    calls["mm alone"] = _in_turn([lambda w=w: x @ w.T for weights in dense for w in weights])
    calls["peer"] = _in_turn(
        [lambda c=c, s=s: matmul_4bit(x, c.t(), quant_state=s) for states in theirs for c, s in states]
    )
    if has_avx512bf16():
        # It changes the state that it is given.
        packed = [_convert_weight_packed_for_cpu(*_theirs(q, dtype)) for weights in sets for q in weights]
        calls["peer packed"] = _in_turn([lambda c=c, s=s: matmul_4bit(x, c, quant_state=s) for c, s in packed])
        error = (matmul_4bit(x, packed[0][0], quant_state=packed[0][1]) - quantized_matmul(x, sets[0])[0]).abs().max()
        assert error < 0.03 * quantized_matmul(x, sets[0])[0].abs().max(), "the peer's product is another"
    return calls, turns


def _row(weights: int, timings: Mapping[str, Timing]) -> dict[str, object]:
    best = next((path for path in cpu.paths() if path in timings), None)
    peers = [timings[name].wall for name in ("peer", "peer packed") if name in timings]
    row: dict[str, object] = {}
    for name in (*cpu.paths()[:-1], "dequantise + mm", "mm alone", "peer", "peer packed"):
        row[f"{name} Gw/s"] = round(weights / timings[name].wall / 1e9, 3) if name in timings else "-"
    replaced, dense = timings["dequantise + mm"].wall, timings["mm alone"].wall
    for name, other in (("dequantise + mm", replaced), ("mm alone", dense), ("peer's best", min(peers))):
        row[f"over {name}"] = round(other / timings[best].wall, 2) if best else "-"
    if best:
        timing = timings[best]
        row["CPU s"] = round(timing.cpu, 4)
        row["spread"] = f"{timing.fastest / timing.wall:.2f}-{timing.slowest / timing.wall:.2f}"
    else:
        row["CPU s"] = row["spread"] = "-"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="rows of x (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side (default: %(default)s)")
    arguments = parser.parse_args()
    all_threads = torch.get_num_threads()
    print(f"NF4, double quantization, blocks of 64; here: {cpu.description()}")
    rows = []
    for model, dtype, m, threads in product(_LAYERS, _DTYPES, arguments.rows, sorted({1, all_threads})):
        torch.set_num_threads(threads)
        layers = {name: (shape,) for name, shape in _LAYERS[model].items()} | _GROUPS[model]
        for layer, shapes in layers.items():
            with torch.no_grad():
                calls, turns = _candidates(shapes, m, dtype, paths=cpu.paths()[:-1])
                timings = interleaved(calls, rounds=arguments.rounds, pause=_PAUSE)
            name = str(dtype).removeprefix("torch.")
            what = {"model": model, "layer": layer, "dtype": name, "rows": m, "threads": threads}
            rows.append(what | _row(turns * sum(out * length for out, length in shapes), timings))
    print("Gw/s: 1e9 weights a second")
    publish("cpu_matmul", rows=rows, peers=["bitsandbytes"])


if __name__ == "__main__":
    main()
