"""Loss scaling for float16: small gradients would vanish, so the loss is multiplied and the gradients divided."""

from dataclasses import dataclass

import torch

_GROW_AFTER = 1000
_LARGEST = 2.0**24


@dataclass
class LossScale:
    """A power of two that halves when gradients overflow and doubles after 1,000 steps in which none did.

    1.0, and never changing, unless the model computes in float16.
    """

    value: float
    clean_steps: int = 0
    dynamic: bool = False

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        """Choose the scale to begin with."""
        return cls(value=2.0**13, dynamic=True) if dtype == torch.float16 else cls(value=1.0)

    def overflowed(self) -> bool:
        """Note an overflow; say whether a smaller scale may help."""
        if not self.dynamic or self.value <= 1.0:
            return False
        self.value, self.clean_steps = self.value / 2, 0
        return True

    def stepped(self) -> None:
        """Note a step without overflow."""
        self.clean_steps += 1
        if self.dynamic and self.clean_steps >= _GROW_AFTER:
            self.value, self.clean_steps = min(self.value * 2, _LARGEST), 0
