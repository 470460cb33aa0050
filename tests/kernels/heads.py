"""The head's samples, its bound and its memory, for every way that it goes."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from qlora_kernels import frozen_head
from tests.kernels.rows import assert_within, normal, rounding, wide

_UNIT = torch.finfo(torch.float32).eps


def sample(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, *, device: object = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, head and labels, with logits of about one."""
    hidden = normal(rows, width, dtype=dtype, seed=1, device=device)
    head = normal(vocabulary, width, seed=2).mul_(width**-0.5).to(device=device, dtype=dtype)
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    return hidden, head, labels.to(device)


def assert_rows_are_exact(rows: int, vocabulary: int, dtype: torch.dtype, *, device: object = "cpu") -> None:
    """Losses and gradients as close to float64 as float32's sums allow, and one rounding to the dtype."""
    spread = torch.tensor([0.1, 1.0, 20.0]).repeat(rows)[:rows, None]
    logits = (normal(rows, vocabulary) * spread).to(device=device, dtype=dtype)
    _, _, labels = sample(rows, vocabulary, 1, dtype)
    (exact,) = wide(logits)
    # A number's own error, those of the difference in the exponent, and those of the sum.
    most = exact.amax(-1, keepdim=True)
    share = torch.softmax(exact, -1)
    in_sums = (vocabulary + 32) * _UNIT
    for scale in (1.0, 64.0):
        for has_gradient in (False, True):
            mine = logits.clone()
            losses = torch.full((rows,), torch.nan, device=device)
            frozen_head.cross_entropy(mine, labels.to(device), losses, scale=scale, has_gradient=has_gradient)
            wanted = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
            assert_within(losses, wanted, in_sums + 4 * _UNIT * (wanted.abs() + most[:, 0].abs()))
            if has_gradient:
                gradient = scale * (share - torch.nn.functional.one_hot(labels, vocabulary))
                relative = in_sums + 4 * _UNIT * (most - exact)
                allowed = scale * (share * relative + 2 * _UNIT) + rounding(dtype, gradient)
                assert_within(mine, gradient, allowed)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that torch held beyond what it held before, on the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
