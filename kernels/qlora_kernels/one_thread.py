"""One thread at a time, for arithmetic whose last bits depend on how many there are."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch's setting is partly the process' own: two blocks at once would restore each other's count.
_turn = threading.RLock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread in this block, so that sums do not depend on the number of threads.

    One block runs at a time in a process; others wait for it. Blocks may be nested.
    """
    with _turn:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
