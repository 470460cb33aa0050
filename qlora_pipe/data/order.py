"""Orders drawn from a seed: pure functions, equal on every machine and with every version of numpy."""

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# One seed serves several purposes, whose draws must not be the same.
_PURPOSES = {"held-out": 0, "epoch": 1, "rows": 2}


def held_out_order(count: int, *, seed: int) -> NDArray[np.int64]:
    """Give the indices [count] in the order in which they are taken for evaluation."""
    return _permutation(count, purpose="held-out", seed=seed, epoch=0)


# A loop asks for the same epoch again and again, and for two at their border.
@lru_cache(maxsize=2)
def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Give the indices [count] in the order in which one epoch visits them; read-only."""
    order = _permutation(count, purpose="epoch", seed=seed, epoch=epoch)
    order.flags.writeable = False
    return order


def row_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Give the indices [count] of an epoch's packed rows in the order in which they are visited."""
    return _permutation(count, purpose="rows", seed=seed, epoch=epoch)


def _permutation(
    count: int, *, purpose: Literal["held-out", "epoch", "rows"], seed: int, epoch: int
) -> NDArray[np.int64]:
    # numpy keeps raw bits and SeedSequence the same for ever, but not what Generator.permutation makes of them.
    keys = np.random.PCG64(np.random.SeedSequence([seed, _PURPOSES[purpose], epoch])).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
