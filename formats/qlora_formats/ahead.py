"""Work done ahead of whoever needs it: in order, by several threads, and never more at once than a budget allows."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    *,
    cost: Callable[[Item], int],
    budget: int,
    threads: int,
) -> Generator[Result, None, None]:
    """Yield `work(item)` for each item in order, while `threads` threads work on those that come next.

    The items begun and not yet let go cost at most `budget` together, or are a single one: the one yielded last counts
    until the next is asked for. What `work` raises is raised when its turn comes, the first item's first; whatever was
    begun is waited for, and no more is begun. Close the iterator if you leave it early.
    """
    coming = deque(items)
    begun: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="ahead") as pool:
        try:
            while coming or begun:
                while coming and (not begun or held + cost(coming[0]) <= budget):
                    item = coming.popleft()
                    held += cost(item)
                    begun.append((cost(item), pool.submit(work, item)))
                cost_of_it, future = begun.popleft()
                result = future.result()
                # The future would keep the result for as long as this generator sleeps.
                del future
                yield result
                del result
                held -= cost_of_it
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
