"""Rotary position embeddings (arXiv 2104.09864) and the ways of stretching them to longer contexts.

Component pair i of a head turns by position * frequency[i]. Every stretch changes the frequencies, and nothing else
but YaRN's magnitude of the result. Frequencies are computed on the CPU, whatever device a model is built on; tables in
float32, rounded to the compute type at the end, as they are when a checkpoint is trained.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qlora_pipe.nn.fields import Fields
from qlora_pipe.nn.packing import Packing
from qlora_pipe.nn.sizes import MOST_POSITIONS

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
_MOST = 1e6
_MOST_THETA = 1e18


def _growth(head_dim: int, theta: float | Tensor) -> Tensor:
    exponents: Tensor = theta ** (torch.arange(0, head_dim, 2, device="cpu").to(torch.float32) / head_dim)
    return exponents


def default_frequencies(head_dim: int, theta: float | Tensor) -> Tensor:
    """Give theta^(-2i / head_dim) for each of the head_dim / 2 pairs."""
    return 1.0 / _growth(head_dim, theta)


def dynamic_frequencies(length: int, *, head_dim: int, theta: float, factor: float, max_positions: int) -> Tensor:
    """Raise theta as a sequence of this length outgrows the positions trained on ("dynamic NTK" scaling).

    A token met later turns by other frequencies than one cached earlier, so beyond max_positions the result with a
    key-value cache is not the result without. That is the method, not an error in it.
    """
    power = head_dim / (head_dim - 2)
    if length <= max_positions:
        return default_frequencies(head_dim, theta * (factor * max_positions / max_positions - (factor - 1)) ** power)
    # Checkpoints are run with a theta rounded to float32 here; in double the tables would differ in their last bits.
    stretched = torch.tensor(length, dtype=torch.float32, device="cpu") * factor / max_positions - (factor - 1)
    return default_frequencies(head_dim, theta * stretched**power)


def llama3_frequencies(
    head_dim: int, theta: float, *, factor: float, low: float, high: float, original_positions: int
) -> Tensor:
    """Divide the low frequencies by the factor, keep the high ones, and blend between (Llama 3.1).

    A frequency is low where fewer than `low` of its turns fit in the original context, high where more than `high` do.
    """
    frequencies = default_frequencies(head_dim, theta)
    wavelengths = 2 * math.pi / frequencies
    is_low = wavelengths > original_positions / low
    is_high = wavelengths < original_positions / high
    kept = (original_positions / wavelengths - low) / (high - low)
    blended = (1 - kept) * frequencies / factor + kept * frequencies
    return torch.where(is_low, frequencies / factor, torch.where(is_high, frequencies, blended))


def yarn_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_positions: int,
    truncate: bool,
) -> Tensor:
    """Divide the frequencies by the factor along a ramp over the pairs (YaRN, arXiv 2309.00071).

    Pairs that turn more than beta_fast times in the original context are kept, those that turn fewer than beta_slow
    times are divided; truncate widens the ramp to whole pairs.
    """

    def pair_turning(turns: float) -> float:
        return head_dim * math.log(original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(beta_fast), pair_turning(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    # A ramp of no width would divide by zero.
    width = last - first or 0.001
    kept = 1 - ((torch.arange(head_dim // 2, device="cpu").to(torch.float32) - first) / width).clamp(0, 1)
    growth = _growth(head_dim, theta)
    return 1.0 / (factor * growth) * (1 - kept) + 1.0 / growth * kept


def yarn_magnitude(factor: float, *, weight: float = 1.0) -> float:
    """Give what YaRN multiplies queries and keys by, so that attention stays as sharp over a longer context."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


class Rotary:
    """The tables of one model: frequencies [head_dim / 2], or a rule that gives them for a sequence's length.

    It is no module: it has nothing to load, so a model built on the meta device computes with it all the same.
    `context` is the longest sequence that the config vouches for, its stretch included.
    """

    def __init__(self, frequencies: Tensor | Callable[[int], Tensor], *, context: int, magnitude: float = 1.0) -> None:
        self.context = context
        self._frequencies = frequencies
        self._magnitude = magnitude
        self._placed: dict[torch.device, Tensor] = {}

    def tables(self, positions: Tensor, *, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give cosines and sines [..., head_dim] of positions [...] in a sequence that is `length` tokens long by now.

        They have the type of `like` and lie, as the positions do, on its device.
        """
        return self._turned(positions, self._for_length(length, like.device), like.dtype)

    def step_tables(self, end: int, *, like: Tensor) -> Tensor:
        """Give each position below `end` its cosines and sines in a sequence that ends there: [end, 2, head_dim]."""
        positions = torch.arange(end, device=like.device)
        if not callable(self._frequencies):
            return torch.stack(self.tables(positions, length=end, like=like), dim=1)
        rule = self._frequencies
        each = torch.stack([rule(position + 1) for position in range(end)]).to(like.device)
        return torch.stack(self._turned(positions, each, like.dtype), dim=1)

    def packed_tables(self, packing: Packing, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give cosines and sines [B, T, head_dim] of packed rows, in which the positions of each sample begin at 0.

        Where frequencies depend on a sequence's length, a sample's depend on its own, and on none beside it.
        """
        if not callable(self._frequencies):
            return self._turned(packing.positions, self._for_length(packing.longest, like.device), like.dtype)
        each_N = torch.stack([self._frequencies(length) for length in packing.spans]).to(like.device)
        # The size is given so that a GPU need not be asked for the sum.
        each_BT = each_N.repeat_interleave(packing.boundaries.diff(), dim=0, output_size=packing.positions.numel())
        return self._turned(packing.positions, each_BT.view(*packing.positions.shape, -1), like.dtype)

    def _turned(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions.to(torch.float32)[..., None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos() * self._magnitude, angles.sin() * self._magnitude
        return cosines.to(dtype), sines.to(dtype)

    def _for_length(self, length: int, device: torch.device) -> Tensor:
        if callable(self._frequencies):
            return self._frequencies(length).to(device)
        # A copy to a GPU in every forward pass would wait for it.
        if device not in self._placed:
            self._placed[device] = self._frequencies.to(device)
        return self._placed[device]


def rotary_from(config: Fields, *, head_dim: int, positions: int = 2048) -> Rotary:
    """Make the tables that a config.json asks for; `positions` is the context of one that says nothing of it.

    It reads both generations of the format: `rope_parameters`, and `rope_theta` with `rope_scaling`. ConfigError names
    a field that is absurd, of an unknown kind, or says otherwise in one generation than in the other.
    """
    max_positions = config.integer("max_position_embeddings", most=MOST_POSITIONS, default=positions)
    if config.number("partial_rotary_factor", default=1.0) != 1.0:
        raise config.error("partial_rotary_factor", "1: heads are turned as a whole")
    theta = config.number("rope_theta", above=1, at_most=_MOST_THETA, default=10_000.0)
    section = _the_section(config)
    if section is None:
        return Rotary(default_frequencies(head_dim, theta), context=max_positions)
    for name, value in section.values.items():
        if isinstance(value, dict):
            raise section.error(name, "a single value: layers of different kinds are not built here")
    theta = section.number("rope_theta", above=1, at_most=_MOST_THETA, default=theta)
    kind = section.choice("rope_type" if section.has("rope_type") else "type", KINDS, default="default")
    if section.number("partial_rotary_factor", default=1.0) != 1.0:
        raise section.error("partial_rotary_factor", "1: heads are turned as a whole")
    if kind == "default":
        return Rotary(default_frequencies(head_dim, theta), context=max_positions)

    original = section.integer("original_max_position_embeddings", most=MOST_POSITIONS, default=max_positions)
    # Some checkpoints keep it beside the section, where it then counts.
    original = config.integer("original_max_position_embeddings", most=MOST_POSITIONS, default=original)
    implied = max_positions / original if kind == "yarn" else None
    factor = section.number("factor", at_least=1, at_most=MOST_POSITIONS, default=implied)
    stretched = original if kind in {"llama3", "yarn"} else max_positions
    context = max(max_positions, int(factor * stretched))
    if kind == "linear":
        return Rotary(default_frequencies(head_dim, theta) / factor, context=context)
    if kind == "dynamic":
        if head_dim == 2:
            raise section.error("rope_type", "another kind where head_dim is 2: this one divides by head_dim - 2")
        by_length = partial(
            dynamic_frequencies, head_dim=head_dim, theta=theta, factor=factor, max_positions=max_positions
        )
        return Rotary(by_length, context=context)
    if kind == "yarn":
        return _yarn(section, head_dim=head_dim, theta=theta, factor=factor, original=original, context=context)
    low = section.number("low_freq_factor", above=0, at_most=_MOST)
    high = section.number("high_freq_factor", above=low, at_most=_MOST)
    frequencies = llama3_frequencies(head_dim, theta, factor=factor, low=low, high=high, original_positions=original)
    return Rotary(frequencies, context=context)


def _the_section(config: Fields) -> Fields | None:
    """Find the section on rotary embeddings, refusing two that differ: which one counts would be a guess."""
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if new is None or old is None:
        return new or old
    ours, theirs = (
        {
            "rope_theta": config.values.get("rope_theta"),
            "rope_type": section.values.get("type", "default"),
            **section.values,
        }
        for section in (new, old)
    )
    if any(ours.get(key) != theirs.get(key) for key in (ours.keys() | theirs.keys()) - {"type"}):
        raise config.error("rope_scaling", "absent, or say the same as rope_parameters")
    return new


def _yarn(section: Fields, *, head_dim: int, theta: float, factor: float, original: int, context: int) -> Rotary:
    beta_slow = section.number("beta_slow", at_least=1 / _MOST, at_most=_MOST, default=1.0)
    frequencies = yarn_frequencies(
        head_dim,
        theta,
        factor=factor,
        beta_fast=section.number("beta_fast", at_least=beta_slow, at_most=_MOST, default=32.0),
        beta_slow=beta_slow,
        original_positions=original,
        truncate=section.flag("truncate", default=True),
    )
    queries = section.number("mscale", at_least=0, at_most=_MOST, default=0.0)
    all_heads = section.number("mscale_all_dim", at_least=0, at_most=_MOST, default=0.0)
    magnitude = yarn_magnitude(factor)
    if queries and all_heads:
        magnitude = yarn_magnitude(factor, weight=queries) / yarn_magnitude(factor, weight=all_heads)
    magnitude = section.number("attention_factor", above=0, at_most=_MOST, default=magnitude)
    return Rotary(frequencies, context=context, magnitude=magnitude)
