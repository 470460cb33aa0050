"""The values codes stand for: recipes, cuts, and the 8-bit map."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from qlora_kernels.levels import LEVELS, dynamic_map, levels_of, recognise, thresholds

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def test_nf4_is_what_the_recipe_of_normal_quantiles_gives() -> None:
    def quantiles(count: int) -> list[float]:
        step = (0.9677083 - 0.5) / (count - 1)
        return [NormalDist().inv_cdf(0.9677083 - step * i) for i in range(count - 1)]

    values = sorted([*quantiles(9), 0.0, *(-value for value in quantiles(8))])
    assert [value / values[-1] for value in values] == pytest.approx(LEVELS["nf4"], abs=1e-6)


def test_fp4_is_a_sign_two_exponent_bits_and_one_mantissa_bit() -> None:
    # Codes 0 and 1 are the subnormals of this little float; the largest magnitude, code 3, is one.
    magnitudes = [0.0, 1 / 192, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
    assert LEVELS["fp4"][:8] == pytest.approx(magnitudes, abs=1e-12)
    assert LEVELS["fp4"][8:] == pytest.approx([-value for value in magnitudes], abs=1e-12)


def test_the_second_zero_of_fp4_is_positive() -> None:
    assert not torch.signbit(levels_of("fp4")[8])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_type_is_recognised_by_its_levels(kind: str) -> None:
    assert recognise(levels_of(kind)) == kind


@pytest.mark.parametrize("change", [lambda t: t * 1.000001, lambda t: t[:15], lambda t: t.flip(0)])
def test_other_levels_are_not_recognised(change) -> None:
    assert recognise(change(levels_of("nf4"))) is None


def test_the_cuts_of_nf4_are_the_published_ones() -> None:
    published = [-0.8480964, -0.6106329, -0.4599953, -0.3396794, -0.2346074, -0.1379117, -0.0455250]
    published += [0.0397901, 0.1202552, 0.2035213, 0.2920138, 0.3893125, 0.5016634, 0.6427869, 0.8614784]
    cuts, codes = thresholds("nf4")
    assert cuts.tolist() == pytest.approx(published, abs=1e-7)
    assert codes.tolist() == list(range(16))


def test_the_intervals_of_fp4_have_the_codes_of_their_sorted_levels() -> None:
    cuts, codes = thresholds("fp4")
    assert codes.tolist() == [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]
    assert (cuts.diff() > 0).all()


def test_the_dynamic_map_ascends_from_its_lopsided_least_to_one() -> None:
    levels = dynamic_map()
    assert levels.shape == (256,)
    assert (levels.diff() > 0).all()
    assert levels[0].item() == pytest.approx(-0.99296875, abs=1e-7)
    assert levels[-1] == 1.0
    assert levels[127] == 0.0


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_dynamic_map_has_the_same_bits_on_any_instruction_set(capability: str) -> None:
    print_digest = (
        "import hashlib; from qlora_kernels.levels import dynamic_map;"
        "print(hashlib.sha256(dynamic_map().numpy().tobytes()).hexdigest())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(KERNELS)}
    there = subprocess.run(
        [sys.executable, "-c", print_digest], env=environment, check=True, capture_output=True, text=True
    )
    assert there.stdout.strip() == hashlib.sha256(dynamic_map().numpy().tobytes()).hexdigest()
