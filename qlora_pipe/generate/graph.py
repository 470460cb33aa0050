"""Steps on a GPU without the host in between: one step captured in a CUDA graph, replayed for each token.

A step is a few hundred short kernels, which a host cannot launch as fast as a GPU runs them. Replayed, they cost one
launch. For that nothing may change from step to step but what memory holds: the token, its place in the cache and the
logits lie where they lay when the step was captured.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qlora_pipe.generate.readers import CausalModel, read
from qlora_pipe.nn.cache import KVCache, StepCache

# New tokens that a cache has room for at first.
AHEAD = 1024
# Kernels are compiled, and libraries choose theirs, before a capture.
_WARM_UPS = 2


class Capture(Protocol):
    """What turns a step into something that replays it. A step that it runs itself, it undoes."""

    def __call__(self, step: Callable[[], None], *, undo: Callable[[], None]) -> Callable[[], None]: ...


def in_a_graph(step: Callable[[], None], *, undo: Callable[[], None]) -> Callable[[], None]:
    """Capture a step in a CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            step()
            undo()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class CapturedSteps:
    """The steps of one model on a GPU, kept from one text to the next: its cache, and one step captured.

    The cache has room for `ahead` new tokens, and doubles when a text outgrows it, which captures the step anew. The
    model has to stay as it is: a step reads the weights where they lay when it was captured.
    """

    def __init__(self, model: CausalModel, *, ahead: int = AHEAD, capture: Capture = in_a_graph) -> None:
        self._model, self._ahead, self._capture = model, ahead, capture
        self._cache: StepCache | None = None
        self._replay: Callable[[], None] | None = None

    @property
    def logits(self) -> Tensor:
        """What comes next, float32 [vocabulary]; overwritten by the next step."""
        return self._logits.float()

    @torch.inference_mode()
    def begin(self, ids: Sequence[int], *, room: int) -> None:
        """Read a text that up to `room` tokens will follow, and forget any other."""
        prompt = self._model.new_cache(1, len(ids))
        self._logits = read(self._model, torch.tensor([ids], device=prompt.stored.device), prompt)[0]
        self._filled = len(ids)
        if self._cache is None:
            device = self._logits.device
            self._top = torch.empty((), dtype=torch.float32, device=device)
            self._token = torch.empty((1, 1), dtype=torch.int64, device=device)
        wanted = len(ids) + min(room, self._ahead)
        if self._cache is None or self._cache.capacity < wanted:
            self._make_room(prompt, wanted)
        else:
            self._cache.take(prompt)
        self._choose(self._logits)

    @torch.inference_mode()
    def go_on(self, token: int) -> None:
        """Read one more token."""
        self._token.fill_(token)
        self._run()

    def likeliest(self, count: int) -> Iterator[tuple[float, int]]:
        """Yield the likeliest token `count` times, each read before the next.

        A step takes its token from where the last one left it. So the next step is launched before the host waits for
        this one's token, and what the caller does with a token costs the GPU no time. A caller who stops has paid for
        one step too many.
        """
        if count < 1:
            return
        # The first is not made to wait for a capture.
        yield float(self._top), int(self._token)
        letters = _Letter(self._token.device), _Letter(self._token.device)
        for number in range(1, count):
            for ahead in (1, 2) if number == 1 else (number + 1,):
                if ahead < count:
                    self._run()
                    letters[ahead % 2].post(self._top, self._token)
            yield letters[number % 2].read()

    @torch.inference_mode()
    def _run(self) -> None:
        assert self._cache is not None, "a text is begun first"
        if self._filled == self._cache.capacity:
            self._make_room(self._cache, 2 * self._filled)
        if self._replay is None:
            position, token = self._cache.position, self._token
            before = position.clone(), token.clone()

            def undo() -> None:
                position.copy_(before[0])
                token.copy_(before[1])

            self._replay = self._capture(self._step, undo=undo)
        self._replay()
        self._filled += 1
        self._logits = self._output

    def _step(self) -> None:
        states = self._model.hidden(self._token, cache=self._cache)
        self._output = self._model.head(states[:, -1])[0]
        self._choose(self._output)

    def _choose(self, logits: Tensor) -> None:
        top, token = logits.max(-1)
        self._top.copy_(top)
        self._token.copy_(token)

    def _make_room(self, start: KVCache | StepCache, wanted: int) -> None:
        """Move to a larger cache, of a whole number of `ahead`, so that the next text finds it large enough."""
        # What was captured writes to the old one.
        self._replay = None
        capacity = math.ceil(wanted / self._ahead) * self._ahead
        self._cache = StepCache(start, capacity=min(capacity, self._model.context))


class _Letter:
    """A token on its way to the host: copied behind the work that made it, read when it has come."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._top = torch.empty((), dtype=torch.float32, pin_memory=on_gpu)
        self._token = torch.empty((1, 1), dtype=torch.int64, pin_memory=on_gpu)
        self._sent = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def post(self, top: Tensor, token: Tensor) -> None:
        """Send the logit and the id of a token, both overwritten afterwards."""
        self._top.copy_(top, non_blocking=True)
        self._token.copy_(token, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def read(self) -> tuple[float, int]:
        """Wait for what was sent last."""
        if self._sent is not None:
            self._sent.synchronize()
        return float(self._top), int(self._token)
