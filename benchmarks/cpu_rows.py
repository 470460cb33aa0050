"""The row-wise operations of a training step on a CPU, forward and backward: `python benchmarks/cpu_rows.py`.

The shape is that of a LLaMA with 110 million parameters (hidden 1024, feed-forward 2816, 16 heads, vocabulary 8192) at
4 x 256 tokens. "plain" is the same formula in plain torch under autograd, whose results are seen to be equal first;
"matmul" is the product of a feed-forward matrix alone, or of the head both ways, for comparison. A product runs before
each timing, since in a step torch's threads are awake.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from report import interleaved, publish
from torch import Tensor

from qlora_kernels import (
    add_rms_norm,
    cpu,
    geglu,
    head_loss,
    rms_norm,
    rms_norm_reference,
    rotate,
    rotate_reference,
    swiglu,
)
from qlora_kernels.frozen_head import head_loss_reference
from qlora_kernels.gated import gated_reference

_BATCH, _LENGTH, _HIDDEN, _FEED_FORWARD, _HEADS, _VOCABULARY = 4, 256, 1024, 2816, 16, 8192
_TOKENS = _BATCH * _LENGTH
_EPS = 1e-6

Formula = Callable[..., "Tensor | tuple[Tensor, ...]"]


def _cases(dtype: torch.dtype) -> dict[str, tuple[Formula, Formula, list[Tensor]]]:
    """Ours, plain torch's, and the inputs that get gradients."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    weight, head = normal(_HIDDEN), (torch.randn(_VOCABULARY, _HIDDEN) * 0.02).to(dtype)
    cosines, sines = normal(_LENGTH, _HIDDEN // _HEADS), normal(_LENGTH, _HIDDEN // _HEADS)
    labels = torch.randint(_VOCABULARY, (_TOKENS,))

    def plain_add(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return x + delta, rms_norm_reference(x + delta, weight, eps=_EPS)

    return {
        "norm": (
            lambda x: rms_norm(x, weight, eps=_EPS),
            lambda x: rms_norm_reference(x, weight, eps=_EPS),
            [normal(_TOKENS, _HIDDEN)],
        ),
        "add and norm": (
            lambda x, delta: add_rms_norm(x, delta, weight, eps=_EPS),
            plain_add,
            [normal(_TOKENS, _HIDDEN), normal(_TOKENS, _HIDDEN)],
        ),
        "rotate": (
            lambda x: rotate(x, cosines, sines),
            lambda x: rotate_reference(x, cosines, sines),
            [normal(_BATCH, _LENGTH, _HEADS, _HIDDEN // _HEADS).transpose(1, 2)],
        ),
        "swiglu": (
            swiglu,
            lambda gate, up: gated_reference(gate, up, activation="silu"),
            [normal(_TOKENS, _FEED_FORWARD), normal(_TOKENS, _FEED_FORWARD)],
        ),
        "geglu tanh": (
            lambda gate, up: geglu(gate, up, approximate="tanh"),
            lambda gate, up: gated_reference(gate, up, activation="gelu_tanh"),
            [normal(_TOKENS, _FEED_FORWARD), normal(_TOKENS, _FEED_FORWARD)],
        ),
        "head": (
            lambda hidden: head_loss(hidden, head, labels),
            lambda hidden: head_loss_reference(hidden, head, labels),
            [normal(_TOKENS, _HIDDEN)],
        ),
    }


def _both_ways(formula: Formula, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        outputs = formula(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])

    return run


def _check_equality(name: str, found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(found, wanted, strict=True):
        difference = (a.float() - b.float()).norm() / b.float().norm()
        assert difference < 2 * torch.finfo(dtype).eps, f"{name}: gradients differ by {difference:.2g}"


def _matmuls(dtype: torch.dtype, outputs: int, *, back: bool) -> Callable[[], object]:
    x, weight = torch.randn(_TOKENS, _HIDDEN).to(dtype), torch.randn(outputs, _HIDDEN).to(dtype)
    y, dx = torch.empty(_TOKENS, outputs, dtype=dtype), torch.empty_like(x)

    def run() -> None:
        torch.mm(x, weight.T, out=y)
        if back:
            torch.mm(y, weight, out=dx)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    arguments = parser.parse_args()
    print(cpu.description())
    rows: list[dict[str, object]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.bfloat16, torch.float32):
            wake = _matmuls(dtype, _FEED_FORWARD, back=False)
            for name, (ours, plain, inputs) in _cases(dtype).items():
                for tensor in inputs:
                    tensor.requires_grad_()
                runs = {"ours": _both_ways(ours, inputs), "plain": _both_ways(plain, inputs)}
                _check_equality(name, runs["ours"](), runs["plain"](), dtype)
                matmul = _matmuls(dtype, _VOCABULARY, back=True) if name == "head" else wake
                candidates = {"wake": wake, "ours": runs["ours"], "again": wake, "plain": runs["plain"], "mm": matmul}
                timings = interleaved(candidates, rounds=arguments.rounds)
                rows.append(
                    {
                        "operation": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "threads": threads,
                        "ours ms": timings["ours"].wall * 1e3,
                        "plain ms": timings["plain"].wall * 1e3,
                        "ratio": timings["plain"].wall / timings["ours"].wall,
                        "ours cpu ms": timings["ours"].cpu * 1e3,
                        "plain cpu ms": timings["plain"].cpu * 1e3,
                        "matmul ms": timings["mm"].wall * 1e3,
                    }
                )
    publish("cpu_rows", rows=rows, peers=())


if __name__ == "__main__":
    main()
