"""LoftQ: 4-bit weights Q and a low-rank pair A, B whose sum Q + B A lies close to W (Li et al., arXiv 2310.08659).

Shape legend: a weight W [out, in], A [rank, in], B [out, rank]. Everything is float32, and no bit of it depends on the
number of threads.
"""

import math

import torch
from torch import Tensor

from qlora_kernels.dispatch import dequantize, quantize
from qlora_kernels.levels import Kind
from qlora_kernels.one_thread import one_thread
from qlora_kernels.quantized import QuantizedTensor

# A matrix with no more rows or columns than this is decomposed exactly.
_SMALL = 512
# The subspace that a large matrix is projected on: so many columns beyond the rank, and so many further blocks. What
# is left of rounding is noise of nearly equal singular values; with these, 99.5 % of the best is found there.
_OVERSAMPLING = 8
_FURTHER_BLOCKS = 8
_SEED = 0
# Singular values below this share of the largest are what float32 has rounded.
_NOISE = 10 * torch.finfo(torch.float32).eps
# Elements whose squares are summed at once: bounds the copies in float64 to 32 MiB.
_PIECE = 1 << 22


def low_rank(residual: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product B A is about the best of that rank to `residual` [out, in].

    With residual = U S V^T they are B = U sqrt(S) and A = sqrt(S) V^T, the largest element of each row of A positive.
    Directions that the residual does not have are zeros in both: those beyond its numerical rank. A small matrix is
    decomposed exactly, a large one within a block Krylov subspace (Musco and Musco, arXiv 1504.05477). Memory: one copy
    of the residual and what is proportional to the rank. ValueError for what is no matrix or not finite, and for a rank
    below 1.
    """
    _check(residual, rank)
    rows, columns = residual.shape
    a, b = (torch.zeros(shape, device=residual.device) for shape in ((rank, columns), (rows, rank)))
    largest = torch.stack(residual.aminmax()).abs().max().float()
    if not largest.isfinite():
        raise ValueError("cannot find a low-rank pair for a matrix that holds NaN or infinity")
    # Squares of the elements must neither overflow nor vanish. What can't be divided by is nothing, too.
    if largest < torch.finfo(torch.float32).tiny:
        return a, b
    scaled = residual.float() / largest
    with one_thread():
        if rows <= columns:
            u, s, v = _truncated_svd(scaled, rank)
        else:
            v, s, u = _truncated_svd(scaled.T, rank)
        root = (s.sqrt() * largest.double().sqrt()).float()
        sign = v.gather(0, v.abs().argmax(dim=0, keepdim=True)).sign()
        a[: s.numel()] = (v * sign * root).T
        b[:, : s.numel()] = u * sign * root
    return a, b


def starting_pair(residual: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """As `low_rank`, with LoRA's ordinary start in the directions that the residual does not have.

    Zeros in A and B alike would never get a gradient. There A is drawn uniformly from +-1/sqrt(in), the same for the
    same shape, and B stays zero, so the product is the same.
    """
    a, b = low_rank(residual, rank=rank)
    unused = ~b.any(dim=0)
    bound = 1 / math.sqrt(a.shape[1])
    drawn = torch.empty(a.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(_SEED))
    a[unused] = drawn.to(a.device)[unused]
    return a, b


def loftq_quantize(
    weight: Tensor,
    *,
    kind: Kind = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    rank: int,
    iterations: int,
) -> QuantizedTensor:
    """Quantize a weight [out, in] for a pair of this rank beside it: the Q of `iterations` rounds of LoftQ.

    A round quantizes W less the pair before it, and takes the pair from what is left. One round is `quantize`, for a
    tensor of any shape. Further ones come closer to W as a rule and not by any law, so the round whose Q + B A is the
    closest counts, the first of equal ones. Raises ValueError as `quantize` and `low_rank` do, and for less than one
    iteration. Memory: about three float32 copies of the weight.
    """
    if iterations < 1:
        raise ValueError(f"cannot do {iterations} iterations of LoftQ: at least one is needed")
    if iterations > 1:
        _check(weight, rank)
    best = quantize(weight, kind=kind, block_size=block_size, double_quant=double_quant)
    # A pair of full rank makes up for any error, so there is nothing to gain.
    if iterations == 1 or rank >= min(weight.shape):
        return best
    exact = weight.detach().float()
    a, b, least = _pair_and_distance(exact, best, rank)
    for _ in range(iterations - 1):
        with one_thread():
            target = torch.addmm(exact, b, a, alpha=-1)
        q = quantize(target, kind=kind, block_size=block_size, double_quant=double_quant)
        del target
        a, b, distance = _pair_and_distance(exact, q, rank)
        if distance < least:
            best, least = q, distance
    return best


def squared_norm(t: Tensor) -> float:
    """The sum of the squares of all elements, in float64."""
    with one_thread():
        return sum(float(piece.double().square().sum()) for piece in torch.split(t.flatten(), _PIECE))


def _pair_and_distance(exact: Tensor, q: QuantizedTensor, rank: int) -> tuple[Tensor, Tensor, float]:
    residual = dequantize(q, torch.float32)
    torch.sub(exact, residual, out=residual)
    a, b = low_rank(residual, rank=rank)
    with one_thread():
        residual.addmm_(b, a, alpha=-1)
    return a, b, squared_norm(residual)


def _check(matrix: Tensor, rank: int) -> None:
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"cannot find a low-rank pair for a tensor of shape {list(matrix.shape)}: it must be a matrix")
    if rank < 1:
        raise ValueError(f"cannot find a pair of rank {rank}: the rank must be at least 1")


def _truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [rows, k], S float64 [k] and V [columns, k] of a matrix that is no higher than wide.

    k is `rank`, or as many singular values as stand out from the rounding of the largest.
    """
    basis = None
    if matrix.shape[0] > max(_SMALL, (rank + _OVERSAMPLING) * (1 + _FURTHER_BLOCKS)):
        basis = _krylov_basis(matrix, rank + _OVERSAMPLING)
    core = matrix if basis is None else basis.T @ matrix
    # The squares of the singular values are exact enough in float64, and take a tenth of the time of an SVD.
    gram = torch.zeros(core.shape[0], core.shape[0], dtype=torch.float64, device=core.device)
    for piece in torch.split(core, max(1, _PIECE // core.shape[0]), dim=1):
        wide = piece.double()
        gram.addmm_(wide, wide.T)
    squares, vectors = torch.linalg.eigh(gram)
    s = squares.clamp(min=0).sqrt().flip(0)[:rank]
    s = s[s > s[0] * _NOISE]
    u = vectors.flip(1)[:, : s.numel()].float()
    v = (core.T @ u) / s.float()
    return u if basis is None else basis @ u, s, v


def _krylov_basis(matrix: Tensor, size: int) -> Tensor:
    """Orthonormal columns that span M X, (M M^T) M X, (M M^T)^2 M X ... of a random X with `size` columns."""
    start = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(_SEED))
    blocks = [torch.linalg.qr(matrix @ start.to(matrix.device)).Q]
    for _ in range(_FURTHER_BLOCKS):
        known = torch.cat(blocks, dim=1)
        following = matrix @ (matrix.T @ blocks[-1])
        following -= known @ (known.T @ following)
        blocks.append(torch.linalg.qr(following).Q)
    # Rounding leaves the blocks a little short of orthogonal to each other, and a matrix of low rank much.
    basis: Tensor = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    return basis
