"""NF4 with double quantization on a CPU, both ways, against bitsandbytes: `python benchmarks/nf4.py`.

Every comparison is checked for identical bits before it is timed.
"""

import argparse
from collections.abc import Callable, Iterator

import bitsandbytes.functional as peer
import torch
from report import interleaved, publish

from qlora_kernels import dequantize_reference, quantize

# Columns of the matrix: a multiple of the block size, for which the peer has vector code.
_COLUMNS = 1024


def _comparisons(weights: int) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, ours, theirs."""
    rows = weights // _COLUMNS
    source = torch.randn(rows, _COLUMNS, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for dtype in (torch.bfloat16, torch.float32):
        weight = source.to(dtype)
        ours = quantize(weight)
        codes, state = peer.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(ours.codes, codes.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(dequantize_reference(ours, dtype), peer.dequantize_4bit(codes, state))
        name = str(dtype).removeprefix("torch.")
        yield (
            f"quantize {name}",
            lambda weight=weight: quantize(weight),
            lambda weight=weight: peer.quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
        )
        yield (
            f"dequantize {name}",
            lambda ours=ours, dtype=dtype: dequantize_reference(ours, dtype),
            lambda codes=codes, state=state: peer.dequantize_4bit(codes, state),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=1 << 22, help="weights in the matrix (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each side (default: %(default)s)")
    arguments = parser.parse_args()
    all_threads = torch.get_num_threads()
    rows = []
    for threads in sorted({1, all_threads}):
        # The comparisons are made under one thread, where both sides' offsets have the same bits.
        torch.set_num_threads(1)
        for name, ours, theirs in _comparisons(arguments.weights):
            torch.set_num_threads(threads)
            timings = interleaved({"ours": ours, "peer": theirs}, rounds=arguments.rounds)
            torch.set_num_threads(1)
            row: dict[str, object] = {"operation": name, "threads": threads, "weights": arguments.weights}
            for side, timing in timings.items():
                row[f"{side} Mweights/s"] = round(arguments.weights / timing.wall / 1e6, 1)
                row[f"{side} CPU s"] = round(timing.cpu, 4)
                row[f"{side} spread"] = f"{timing.fastest / timing.wall:.2f}-{timing.slowest / timing.wall:.2f}"
            row["ours/peer"] = round(timings["peer"].wall / timings["ours"].wall, 2)
            rows.append(row)
    publish("nf4", rows=rows, peers=["bitsandbytes"])


if __name__ == "__main__":
    main()
