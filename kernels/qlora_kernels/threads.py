"""Share work out among threads that run C code.

They are as many as torch would use in the calling thread, and sleep between calls. ctypes releases Python's lock while
C runs.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Shares for each thread: one that is interrupted for a while leaves the rest of its work to the others.
_SHARES = 4

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None


def in_shares(work: Callable[[int, int], bool], count: int, *, smallest: int) -> bool:
    """Call work(start, stop) until all of 0 to `count` is done; False if one of the calls returned that.

    Every share starts at a multiple of `smallest`; so little work is done in the calling thread alone.
    """
    threads = min(torch.get_num_threads(), -(-count // smallest))
    if threads <= 1:
        return work(0, count)
    size = max(1, count // (threads * _SHARES * smallest)) * smallest
    starts = iter(range(0, count, size))

    def take() -> bool:
        # The threads share one iterator, which gives each of its values once.
        return all(work(start, min(start + size, count)) for start in starts)

    helpers = [_pool().submit(take) for _ in range(threads - 1)]
    done = take()
    # A helper that has not begun by now would find nothing to do.
    return all([done, *(helper.result() for helper in helpers if not helper.cancel())])


def _pool() -> ThreadPoolExecutor:
    global _executor  # noqa: PLW0603
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="qlora-kernels")
        return _executor


def _forget_threads() -> None:
    # A forked child has none of its parent's threads, and a lock may be held by one of them for ever.
    global _lock, _executor
    _lock, _executor = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_threads)
