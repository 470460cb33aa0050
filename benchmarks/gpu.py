"""What every benchmark of a GPU shares: times by its own clock, its ceilings measured in the run, and peak memory."""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

# What a candidate calls; the number, which grows by one with each call, says which of its buffers to use.
Call = Callable[[int], object]

_CYCLES_PER_CALL = 200_000


class Timing(NamedTuple):
    """Seconds of one call: the median over the rounds, and the fastest and slowest round."""

    seconds: float
    fastest: float
    slowest: float

    @property
    def spread(self) -> str:
        """The fastest and slowest round as parts of the median."""
        return f"{self.fastest / self.seconds:.2f}-{self.slowest / self.seconds:.2f}"


class Ceilings(NamedTuple):
    """What the GPU at hand can do at best."""

    copy_gb_per_s: float
    """Read and written, of a copy within the GPU's memory."""
    matmul_tflop_per_s: float
    """Of a product of two bfloat16 matrices of 8192 x 8192."""
    to_device_gb_per_s: float
    """From pinned memory of the host."""
    to_host_gb_per_s: float
    """Into pinned memory of the host."""


class Memory(NamedTuple):
    """Peaks since `forget_peaks`, in bytes."""

    allocated: int
    """Of the GPU, in tensors."""
    reserved: int
    """Of the GPU, by torch's allocator."""
    pinned: int
    """Of the host, by torch's allocator of pinned memory, which rounds up to powers of two."""


def require_gpu() -> None:
    """Leave with one sentence and exit code 1 where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU, and torch finds none here: run it on a machine that has one")


def interleaved(
    candidates: Mapping[str, Call], *, rounds: int, calls: int = 1, ahead: bool = False
) -> dict[str, Timing]:
    """Time `calls` calls of each candidate in turn, round after round; two rounds more go before, to warm up.

    By the GPU's events, from an idle GPU on: what the host takes to launch counts where the GPU waits for it. With
    `ahead` the GPU is kept busy while the host launches, so that the GPU's own time is left.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    numbers = dict.fromkeys(candidates, 0)
    for number_of_round in range(-2, rounds):
        for name, call in candidates.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if ahead:
                torch.cuda._sleep(_CYCLES_PER_CALL * calls)
            start.record()
            for number in range(numbers[name], numbers[name] + calls):
                call(number)
            stop.record()
            torch.cuda.synchronize()
            numbers[name] += calls
            if number_of_round >= 0:
                samples[name].append(start.elapsed_time(stop) / 1e3 / calls)
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in samples.items()}


def sets_past_cache(bytes_of_a_set: int) -> int:
    """How many sets of buffers to use in turn, so that the GPU's cache holds none of the next one."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return 1 + math.ceil(3 * cache / bytes_of_a_set)


def ceilings(*, rounds: int = 10) -> Ceilings:
    """Measure them; takes 2 GiB of the GPU's memory and 256 MiB of pinned memory for a few seconds."""
    # Random and not zeros, which cost less power.
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    pinned = torch.randn(1 << 26).pin_memory()
    on_device = torch.empty_like(pinned, device="cuda")
    timings = interleaved(
        {
            "copy": lambda _: target.copy_(source),
            "matmul": lambda _: torch.mm(a, b, out=product),
            "to device": lambda _: on_device.copy_(pinned, non_blocking=True),
            "to host": lambda _: pinned.copy_(on_device, non_blocking=True),
        },
        rounds=rounds,
    )
    return Ceilings(
        2 * source.nbytes / timings["copy"].seconds / 1e9,
        2 * 8192**3 / timings["matmul"].seconds / 1e12,
        pinned.nbytes / timings["to device"].seconds / 1e9,
        pinned.nbytes / timings["to host"].seconds / 1e9,
    )


def forget_peaks() -> None:
    """Count peak memory from here on."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_peak_host_memory_stats()


def peaks() -> Memory:
    """Peak memory since `forget_peaks`."""
    torch.cuda.synchronize()
    return Memory(
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
        torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0),
    )
