"""Non-finite steps: skipped and counted, never averaged away, and never endless."""

from collections.abc import Sequence

from qlora_pipe.errors import NonFiniteError

_IN_A_ROW = 3
WINDOW = 500
_SHARE = 0.01


def check_skipped(skipped: Sequence[int], *, step: int, what: str, origins: Sequence[str]) -> None:
    """Raise NonFiniteError after more than 3 skipped steps in a row, or more than 1 % of the last 500.

    `skipped` are the steps that were not finite, the present one last; `origins` are the rows that were in it.
    """
    recent = {earlier for earlier in skipped if earlier > step - WINDOW}
    in_a_row = all(step - back in recent for back in range(_IN_A_ROW + 1))
    if in_a_row or len(recent) > WINDOW * _SHARE:
        raise NonFiniteError(
            f"step {step}: the {what} is not finite, in {len(recent)} of the last {min(step, WINDOW)} steps."
            f" The rows were {', '.join(dict.fromkeys(origins))}."
            " Look at them, or lower --learning-rate; the last checkpoint is whole."
        )
