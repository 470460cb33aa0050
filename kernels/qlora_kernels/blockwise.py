"""Blockwise 4-bit quantization with double quantization, in plain torch: the meaning of the format.

Bit-identical with bitsandbytes 0.50.2 on a CPU at one thread, both ways; tests/interop proves it, docs/kernels.md says
why each rule is what it is. For the shape legend see quantized.py.
"""

import math
from functools import cache

import torch
from torch import Tensor

from qlora_kernels.levels import LEVELS, Kind, dynamic_map, levels_of, thresholds
from qlora_kernels.quantized import QuantizedTensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
# Cells of the table that codes are looked up in: narrower than the least distance between two cuts, 0.0026 in FP4.
CELLS = 2048
# The scale of a block of zeros, so that its reciprocal is finite.
SMALLEST_SCALE = 1e-38
# Weights whose squared errors are summed apart from others', in LANES running sums.
PIECE = 4096
LANES = 16

NOT_FINITE = "cannot quantize a tensor that holds NaN or infinity"

_SOURCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Steps of the fixed-point position through which the 8-bit codes are looked up.
_POSITIONS = 65535
# Weights handled at once: bounds the temporaries to some 30 MiB, whatever the tensor's size. A multiple of every block
# size, and large enough that starting torch's threads costs little.
_CHUNK = 1 << 20


def quantize(weight: Tensor, *, kind: Kind = "nf4", block_size: int = 64, double_quant: bool = True) -> QuantizedTensor:
    """Quantize a float32, float16 or bfloat16 tensor of any shape to 4 bits, one scale per `block_size` weights.

    The result does not depend on the number of threads. With `double_quant` the scales are stored in 8 bits too (QLoRA,
    arXiv:2305.14314, section 3). Raises ValueError for a weight that is empty, not finite or of another dtype, and for
    a block size not in BLOCK_SIZES.
    """
    check_source(weight, block_size)
    n = weight.numel()
    flat_N = weight.detach().reshape(-1)
    codes_B = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax_S = torch.empty(math.ceil(n / block_size), dtype=torch.float32, device=weight.device)
    cut_of_cell, code_of_side = (table.to(weight.device) for table in lookup(kind))
    code_of_zero = LEVELS[kind].index(0.0)
    for start in range(0, n, _CHUNK):
        chunk = flat_N[start : start + _CHUNK].float()
        absmax = _block_maxima(chunk, block_size)
        if not absmax.isfinite().all():
            raise ValueError(NOT_FINITE)
        scaled = _scaled(chunk, absmax, block_size)
        cell = _cell(scaled)
        side = scaled > cut_of_cell.index_select(0, cell)
        codes = code_of_side.index_select(0, cell.mul_(2).add_(side))
        first_block, first_byte = start // block_size, start // 2
        absmax_S[first_block : first_block + absmax.numel()] = absmax
        packed = _packed(codes, filler=code_of_zero)
        codes_B[first_byte : first_byte + packed.numel()] = packed
    levels = levels_of(kind, device=weight.device)
    shape = tuple(weight.shape)
    if not double_quant:
        return QuantizedTensor(codes_B, absmax_S, levels, None, None, None, block_size, NESTED_BLOCK_SIZE, shape)
    offset = offset_of(absmax_S)
    nested_codes_S, nested_absmax_G, nested_levels = _quantize_to_8_bits(absmax_S - offset)
    return QuantizedTensor(
        codes_B, nested_codes_S, levels, nested_absmax_G, nested_levels, offset, block_size, NESTED_BLOCK_SIZE, shape
    )


def dequantize_reference(q: QuantizedTensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The dense tensor [*q.shape], computed in float32 and then rounded once to `dtype`.

    Every other way to dequantize must equal this one exactly. `out` is written and returned if given; it must be
    contiguous, of that shape and dtype.
    """
    n = math.prod(q.shape)
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    out_N = out.view(-1)
    scales_S = dequantize_absmax(q)
    # Both weights of a byte in one 8-byte element: one gather per byte instead of two shifts and two gathers.
    byte = torch.arange(256, device=q.codes.device)
    pairs = torch.stack((q.levels[byte >> 4], q.levels[byte & 15]), dim=-1).view(torch.int64).view(-1)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        packed = q.codes[start // 2 : (stop + 1) // 2].int()
        values = pairs.index_select(0, packed).view(torch.float32)[: stop - start]
        _scale_blocks(values, scales_S[start // q.block_size : math.ceil(stop / q.block_size)], q.block_size)
        out_N[start:stop] = values
    return out


def dequantize_absmax(q: QuantizedTensor) -> Tensor:
    """The scale of each block, float32 [S]. The product and the sum are rounded each: no fused multiply-add."""
    if q.nested_absmax is None or q.nested_levels is None or q.offset is None:
        return q.absmax
    nested_S = q.nested_absmax.repeat_interleave(q.nested_block_size)[: q.absmax.numel()]
    return q.nested_levels[q.absmax.int()].mul_(nested_S).add_(q.offset)


def squared_error_reference(weight: Tensor, q: QuantizedTensor) -> tuple[float, float]:
    """The sums of (w - w')^2 and of w^2 over all weights w, with w' their dequantized float32 values.

    Summed in float64 and in one order everywhere: LANES running sums through each PIECE of the weights, these added by
    halves, then the pieces without any rounding in between.
    """
    exact_N = weight.detach().reshape(-1)
    approximate_N = dequantize_reference(q, torch.float32).view(-1)
    errors: list[float] = []
    sizes: list[float] = []
    for exact, approximate in zip(torch.split(exact_N, _CHUNK), torch.split(approximate_N, _CHUNK), strict=True):
        errors += _sums_of_squares(exact.double() - approximate.double())
        sizes += _sums_of_squares(exact.double())
    return math.fsum(errors), math.fsum(sizes)


def check_source(weight: Tensor, block_size: int) -> None:
    """Raise ValueError for what the format cannot hold."""
    if weight.dtype not in _SOURCE_DTYPES:
        raise ValueError(f"cannot quantize a tensor of {weight.dtype}: it must be float32, float16 or bfloat16")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"cannot quantize in blocks of {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
    if weight.numel() == 0:
        raise ValueError("cannot quantize a tensor without elements")


def offset_of(absmax_S: Tensor) -> Tensor:
    """The mean of the scales, float32 [], as torch sums it on a CPU with one thread."""
    # With more threads torch adds up parts of a sum, as many as there are threads, and the last bit differs. It never
    # divides one of several rows: so the mean of two equal ones does not depend on the number of threads.
    return checked_offset(absmax_S.cpu().expand(2, -1).mean(dim=1)[0]).to(absmax_S.device)


def checked_offset(mean: Tensor) -> Tensor:
    """Raise ValueError for a mean that is not finite."""
    if not mean.isfinite():
        raise ValueError("cannot apply double quantization: the mean of the block maxima exceeds float32's range")
    return mean


def _block_maxima(chunk: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block [S]; that of a partial last block is at least SMALLEST_SCALE."""
    full = chunk.numel() - chunk.numel() % block_size
    maxima = chunk[:full].view(-1, block_size).abs().amax(dim=-1)
    if full == chunk.numel():
        return maxima
    return torch.cat((maxima, chunk[full:].abs().amax(dim=0, keepdim=True).clamp(min=SMALLEST_SCALE)))


def _scaled(chunk: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """The chunk in units of its blocks' maxima: full blocks times a reciprocal, a partial last one by division."""
    full = chunk.numel() - chunk.numel() % block_size
    reciprocal = 1.0 / absmax[: full // block_size].clamp(min=SMALLEST_SCALE)
    scaled = torch.empty_like(chunk)
    torch.mul(chunk[:full].view(-1, block_size), reciprocal[:, None], out=scaled[:full].view(-1, block_size))
    if full < chunk.numel():
        torch.div(chunk[full:], absmax[-1], out=scaled[full:])
    return scaled


def _cell(scaled: Tensor) -> Tensor:
    """Which of CELLS equal parts of [-1, 1] a scaled weight lies in, int32; never falls as the weight rises."""
    return (scaled + 1.0).mul_(CELLS // 2).int()


@cache
def lookup(kind: Kind) -> tuple[Tensor, Tensor]:
    """The cut within each cell, float32 [CELLS + 1], and the codes on its two sides, uint8 [2 * (CELLS + 1)].

    A cell holds at most one cut, so one comparison tells the code, exactly: as `_cell` is monotone, a cut of a lower
    cell lies below the weight and a cut of a higher cell above it, whatever was rounded. Seven passes over the weights,
    where a comparison with every cut would take thirty.
    """
    cuts, code_of_interval = thresholds(kind)
    cell_of_cut = _cell(cuts)
    assert len(set(cell_of_cut.tolist())) == cuts.numel()
    cut_of_cell = torch.full((CELLS + 1,), math.inf)
    cut_of_cell[cell_of_cut] = cuts
    cuts_below = torch.bucketize(torch.arange(CELLS + 1, dtype=torch.int32), cell_of_cut)
    has_cut = cut_of_cell.isfinite().long()
    return cut_of_cell, code_of_interval[torch.stack((cuts_below, cuts_below + has_cut), dim=-1).flatten()]


def _packed(codes: Tensor, *, filler: int) -> Tensor:
    """Two codes a byte, the first in the high nibble; an odd last one is joined by `filler`."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=filler)
    return (codes[::2] << 4) | codes[1::2]


def _scale_blocks(values: Tensor, scales: Tensor, block_size: int) -> None:
    full = values.numel() - values.numel() % block_size
    values[:full].view(-1, block_size).mul_(scales[: full // block_size, None])
    if full < values.numel():
        values[full:].mul_(scales[-1])


def _quantize_to_8_bits(values_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [S] in the dynamic map, block maxima float32 [G], and the map, float32 [256].

    A value is first rounded to one of 65536 positions in [-1, 1], and the position's code is the answer: near a
    midpoint this is not always the nearest level. Where a group's maximum is zero, or too small for a finite
    reciprocal, zeros have no position and get code 0.
    """
    size = values_S.numel()
    groups = math.ceil(size / NESTED_BLOCK_SIZE)
    padded = torch.nn.functional.pad(values_S, (0, groups * NESTED_BLOCK_SIZE - size)).view(groups, NESTED_BLOCK_SIZE)
    absmax_G = padded.abs().amax(dim=-1)
    scaled = (padded * (1.0 / absmax_G)[:, None]).clamp(-1.0, 1.0).nan_to_num(nan=-1.0)
    nearest = ((scaled + 1.0) * 0.5 * _POSITIONS + 0.5).int()
    codes = code_of_position().to(values_S.device)[nearest]
    return codes.view(-1)[:size].contiguous(), absmax_G, dynamic_map(device=values_S.device)


@cache
def code_of_position() -> Tensor:
    """The dynamic map's code at each of the positions -1 to 1, uint8 [_POSITIONS + 1]."""
    levels = dynamic_map()
    position = torch.arange(_POSITIONS + 1, dtype=torch.float32) * 2.0 / _POSITIONS - 1.0
    return torch.bucketize(position, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def _sums_of_squares(values: Tensor) -> list[float]:
    """Of each PIECE of values, float64."""
    squares = torch.nn.functional.pad(values.square(), (0, -values.numel() % PIECE))
    rows = squares.view(-1, PIECE // LANES, LANES).transpose(0, 1).contiguous()
    lanes = torch.zeros_like(rows[0])
    for row in rows:
        lanes += row
    while lanes.shape[1] > 1:
        lanes = torch.add(*lanes.chunk(2, dim=1))
    return lanes.view(-1).tolist()
