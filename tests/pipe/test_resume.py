"""Whatever stops a run, the same command goes on and ends with the same bytes."""

import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_formats import disk
from qlora_formats.manifest import MANIFEST, Manifest
from qlora_pipe.cli import execute
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.errors import Interrupted
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.plugins import load_plugins
from qlora_pipe.stages.finetune import finetune
from qlora_pipe.train import session
from qlora_pipe.train.request import FinetuneRequest
from qlora_pipe.train.signals import StopFlag, StopRequested
from qlora_pipe.train.state import Progress, TrainingState
from tests.pipe.runs import SETTINGS, finetune_line, outcome, small_checkpoint, write_rows

ROWS = 9


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    # What an fsync protects against is not simulated here, and each takes milliseconds.
    monkeypatch.setattr(disk, "_fsync", lambda _: None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    small_checkpoint(folder / "checkpoint")
    assert execute(["quantize", str(folder / "checkpoint"), str(folder / "store")]) == 0
    return {name: folder / name for name in ("checkpoint", "store")}


@pytest.fixture
def line_to(bases: dict[str, Path], tmp_path: Path) -> Callable[..., list[str]]:
    """The command line that fine-tunes on ROWS rows to a folder."""
    rows = write_rows(tmp_path / "rows.jsonl", count=ROWS)
    return lambda out, **settings: finetune_line(
        settings.pop("base", bases["store"]), rows, out, **{"held_out": 0.3, **settings}
    )


class Places:
    """The places where a run can stop, in their order; it is made to at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caches: Path) -> None:
        self.passed = 0
        self._monkeypatch, self._caches = monkeypatch, (caches / str(number) for number in itertools.count())
        self._stop_at: int | None = None

        def check(_: StopFlag) -> None:
            self.passed += 1
            if self.passed - 1 == self._stop_at:
                raise StopRequested(signal.SIGTERM)

        monkeypatch.setattr(StopFlag, "check", check)

    def run(self, line: list[str], *, stop_at: int | None = None) -> int:
        """Run a command, stop it at a place, and give its exit code."""
        self.passed, self._stop_at = 0, stop_at
        # Each command reads the rows anew, so that the places are the same.
        self._monkeypatch.setenv("QLORA_PIPE_CACHE", str(next(self._caches)))
        return execute(line)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(monkeypatch, tmp_path_factory.mktemp("caches"))


def checkpoints(out: Path) -> list[str]:
    """The names of everything beside the checkpoints, theirs included."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


CELLS = {
    "store, 2 passes a step, dropout": ("store", {"save_every": 3}),
    "checkpoint, 1 pass a step, dropout": ("checkpoint", {"accumulate": 1, "save_every": 1, "eval_every": 3}),
    "store, 3 passes a step, no dropout": ("store", {"steps": 3, "accumulate": 3, "dropout": 0, "warmup_steps": 5}),
    "store, packed": ("store", {"steps": 3, "pack": True, "max_tokens": 64}),
    "store, paged": ("store", {"steps": 4, "optimizer_budget": 0}),
    "store, moments in 8 bits": ("store", {"steps": 4, "optimizer": "adamw-8bit"}),
    "store, moments in 8 bits, paged": ("store", {"steps": 3, "optimizer": "adamw-8bit", "optimizer_budget": 0}),
    "store in float16, scaled": ("store", {"steps": 4, "dtype": "float16", "weight_decay": 0.1}),
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_run_stopped_at_any_place_ends_as_if_it_had_not_been(
    places: Places, line_to: Callable[..., list[str]], bases: dict[str, Path], tmp_path: Path, cell: str
) -> None:
    kind, settings = CELLS[cell]
    settings = {**settings, "base": bases[kind]}
    assert places.run(line_to(tmp_path / "whole", **settings)) == 0
    seen = set()
    # The places before are those of reading the rows, where nothing is there yet to be kept.
    for place in range(ROWS - 1, places.passed):
        out = tmp_path / f"stopped-{place}"
        assert places.run(line_to(out, **settings), stop_at=place) == 143
        if place >= ROWS:
            seen |= {name.partition("-")[2].lstrip("0123456789") for name in checkpoints(out)}
        assert places.run(line_to(out, **settings)) == 0
        assert outcome(out) == outcome(tmp_path / "whole"), place
        assert not [name for name in checkpoints(out) if "damaged" in name]
    assert seen == {"", "-evaluating", *(f"-micro-{n}" for n in range(1, int(settings.get("accumulate", 2))))}


def test_a_run_stopped_again_and_again_ends_as_if_it_had_not_been(
    places: Places, line_to: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert places.run(line_to(tmp_path / "whole")) == 0
    out, stops = tmp_path / "stopped", 0
    # An evaluation of two batches and one forward pass fit in between.
    while places.run(line_to(out), stop_at=ROWS + 3) == 143:
        stops += 1
    assert stops >= int(SETTINGS["steps"])
    assert outcome(out) == outcome(tmp_path / "whole")
    assert len(checkpoints(out)) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_24_steps_with_a_stop_and_another_budget_for_the_optimizer_after_each_end_as_one_run(
    places: Places, line_to: Callable[..., list[str]], tmp_path: Path, optimizer: str
) -> None:
    settings = {"steps": 24, "accumulate": 1, "eval_every": 0, "held_out": 0, "save_every": 0, "optimizer": optimizer}
    assert places.run(line_to(tmp_path / "whole", **settings)) == 0
    out, stops, budgets = tmp_path / "stopped", 0, itertools.cycle(("auto", 0))
    # A look around before the one pass of a step, and one after the step.
    while places.run(line_to(out, **settings, optimizer_budget=next(budgets)), stop_at=ROWS + 1) == 143:
        stops += 1
    assert stops == 24
    assert outcome(out)[0] == outcome(tmp_path / "whole")[0]
    pages = ("pages_in", "pages_out", "page_bytes")
    steps = [{key: value for key, value in step.items() if key not in pages} for step in outcome(out)[1]]
    assert steps == outcome(tmp_path / "whole")[1]
    assert sum("pages_in" in step for step in outcome(out)[1]) == 12


def _forget(what: str, state: TrainingState, progress: Progress) -> None:
    """Lose a part of the training state."""
    if what == "the generator":
        torch.manual_seed(0)
    elif what == "the place in the data":
        state.progress.position = progress.micro_step * int(SETTINGS["batch_size"])
    elif what == "the moments":
        kinds = itertools.chain.from_iterable(state.optimizer.expected(name).items() for name in state.parameters)
        state.optimizer.load({key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in kinds})
    elif what == "the count of updates":
        progress.updates = 0
    elif what == "the open window's gradients":
        state.optimizer.zero_grad()
    else:
        assert what == "nothing"


@pytest.mark.parametrize(
    "what",
    ["nothing", "the generator", "the place in the data", "the moments", "the count of updates",
     "the open window's gradients"],
)  # fmt: skip
def test_a_run_that_forgets_any_part_of_its_state_ends_elsewhere(
    places: Places, line_to: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert places.run(line_to(tmp_path / "whole", eval_every=0)) == 0
    out = tmp_path / "stopped"
    # Two passes and a look around per step: within the third step's window.
    assert places.run(line_to(out, eval_every=0), stop_at=ROWS + 2 + 2 * 3 + 1) == 143
    assert checkpoints(out) == ["step-2-micro-1"]
    restore = TrainingState.restore

    def forgetful(state: TrainingState, tensors: Any, progress: Progress) -> None:
        restore(state, tensors, progress)
        _forget(what, state, progress)

    monkeypatch.setattr(TrainingState, "restore", forgetful)
    assert places.run(line_to(out, eval_every=0)) == 0
    same = outcome(out)[0]["adapter_model.safetensors"] == outcome(tmp_path / "whole")[0]["adapter_model.safetensors"]
    assert same == (what == "nothing")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit in the state": (lambda folder: _flip(folder / "state.safetensors"), "sha256"),
    "a state cut off": (lambda folder: os.truncate(folder / "state.safetensors", 1000), "1,000 bytes"),
    "a state gone": (lambda folder: (folder / "state.safetensors").unlink(), "lacks the file state.safetensors"),
    "a flipped bit in the manifest": (lambda folder: _flip(folder / MANIFEST), MANIFEST),
    "a manifest cut off": (lambda folder: os.truncate(folder / MANIFEST, 100), MANIFEST),
    "a manifest gone": (lambda folder: (folder / MANIFEST).unlink(), f"holds no {MANIFEST}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason_and_kept_aside(
    places: Places, line_to: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    line = line_to(tmp_path / "whole", save_every=1, eval_every=0)
    assert places.run(line) == 0
    out, (inflict, reason) = tmp_path / "damaged", DAMAGE[damage]
    line = line_to(out, save_every=1, eval_every=0)
    assert places.run(line, stop_at=ROWS + 2 + 4 * 3 - 1) == 143
    assert checkpoints(out) == ["step-3", "step-4"]
    inflict(out / "checkpoints" / "step-4")
    capsys.readouterr()
    assert places.run(line) == 0
    notes = [text for text in capsys.readouterr().err.splitlines() if text.startswith("note: ")]
    assert notes[0].startswith("note: passed over the checkpoint step-4, now step-4.damaged: ")
    assert reason in notes[0]
    assert notes[1] == "note: going on from step 3."
    assert outcome(out) == outcome(tmp_path / "whole")
    assert checkpoints(out) == ["step-4.damaged", "step-5", "step-6"]


def test_a_run_whose_checkpoints_are_all_damaged_starts_anew(
    places: Places, line_to: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert places.run(line_to(tmp_path / "whole")) == 0
    out = tmp_path / "damaged"
    assert places.run(line_to(out, save_every=1), stop_at=places.passed - 4) == 143
    assert len(checkpoints(out)) == 2
    for name in checkpoints(out):
        _flip(out / "checkpoints" / name / "state.safetensors")
    capsys.readouterr()
    assert places.run(line_to(out)) == 0
    said = capsys.readouterr().err
    assert said.count("passed over") == 2
    assert "going on" not in said
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["damaged", "with a file of someone else"])
def test_an_older_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(
    places: Places, line_to: Callable[..., list[str]], tmp_path: Path, fault: str
) -> None:
    assert places.run(line_to(tmp_path / "whole", save_every=1, eval_every=0)) == 0
    out = tmp_path / "run"
    line = line_to(out, save_every=1, eval_every=0)
    assert places.run(line, stop_at=ROWS + 2 + 4 * 3 - 1) == 143
    if fault == "damaged":
        (out / "checkpoints" / "step-3" / "state.safetensors").unlink()
    else:
        (out / "checkpoints" / "step-3" / "notes.txt").write_text("do not lose this")
    assert places.run(line) == 0
    assert checkpoints(out) == ["step-3.damaged", "step-5", "step-6"]
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_full_disk_ends_the_run_with_one_sentence_and_loses_nothing(
    line_to: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    written, room = 0, 10**9
    write = disk._write

    def write_while_there_is_room(fd: int, data: memoryview) -> int:
        nonlocal written
        if written == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # As the system does: first as much as fits, then the refusal.
        count = write(fd, data[: room - written])
        written += count
        return count

    monkeypatch.setattr(disk, "_write", write_while_there_is_room)
    monkeypatch.setattr(session, "RETRY_SECONDS", ())
    settings = {"steps": 4, "save_every": 1}
    assert execute(line_to(tmp_path / "whole", **settings)) == 0
    steps = 23
    for number in range(steps):
        out = tmp_path / f"full-{number}"
        room, whole, written = written * number // steps, written, 0
        capsys.readouterr()
        assert execute(line_to(out, **settings)) == 74, room
        errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1
        assert f"cannot write {out}" in errors[0]
        assert "No space left on device" in errors[0]
        assert not (out / "final").exists()
        for checkpoint in out.glob("checkpoints/step-*"):
            Manifest.read(checkpoint).verify(checkpoint)
        room, written = 10**9, 0
        assert execute(line_to(out, **settings)) == 0
        assert outcome(out) == outcome(tmp_path / "whole"), room
        written = whole


def test_training_waits_for_a_disk_that_is_full_for_a_while(
    line_to: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    settings = {"steps": 4, "save_every": 1}
    assert execute(line_to(tmp_path / "whole", **settings)) == 0
    write, calls, refusals = disk._write, 0, 0

    def write_with_bad_spells(fd: int, data: memoryview) -> int:
        nonlocal calls, refusals
        calls += 1
        if calls in {20, 21, 60, 100, 101, 140}:
            refusals += 1
            write(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(disk, "_write", write_with_bad_spells)
    monkeypatch.setattr(session, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    # What is written outside of training is not tried again, so the run may need its command more than once.
    while execute(line_to(tmp_path / "again", **settings)) != 0:
        assert calls < 1000
    assert refusals == 6
    assert "Training waits, nothing is lost" in capsys.readouterr().err
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")


class Sender:
    """Sends signals to this very process when a step is done."""

    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        self.step, self.numbers = step, numbers

    @hookimpl
    def step_finished(self, report: dict[str, Any]) -> None:
        if report["step"] == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def request(line: list[str]) -> FinetuneRequest:
    """What a command line of `line_to` asks for."""
    from qlora_pipe.cli.finetune import finetune as command

    words = command.make_context("finetune", line[1:]).params
    base, data, out = words.pop("base"), words.pop("data"), words.pop("out")
    config = FinetuneConfig(**{name: value for name, value in words.items() if value is not None})
    return FinetuneRequest(base=base, data=data, out=out, config=config)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_is_answered_by_a_checkpoint(
    line_to: Callable[..., list[str]], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(number)
    whole, stopped = request(line_to(tmp_path / "whole")), request(line_to(tmp_path / "stopped"))
    finetune(whole, manager=load_plugins())
    with pytest.raises(Interrupted, match="Run the same command again") as interrupted:
        finetune(stopped, manager=load_plugins(Sender(3, number)))
    assert interrupted.value.exit_code == code
    assert checkpoints(stopped.out) == ["step-3"]
    assert signal.getsignal(number) == before
    finetune(stopped, manager=load_plugins())
    assert outcome(stopped.out) == outcome(whole.out)


def test_a_second_interrupt_leaves_at_once(line_to: Callable[..., list[str]], tmp_path: Path) -> None:
    whole, stopped = request(line_to(tmp_path / "whole")), request(line_to(tmp_path / "stopped"))
    finetune(whole, manager=load_plugins())
    with pytest.raises(KeyboardInterrupt):
        finetune(stopped, manager=load_plugins(Sender(3, signal.SIGINT, signal.SIGINT)))
    assert not (stopped.out / "checkpoints").exists()
    finetune(stopped, manager=load_plugins())
    assert outcome(stopped.out) == outcome(whole.out)


def test_another_number_of_threads_is_said_to_change_the_last_bits(
    places: Places, line_to: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert places.run(line_to(out), stop_at=ROWS + 8) == 143
    capsys.readouterr()
    assert places.run(line_to(out, threads=2)) == 0
    said = capsys.readouterr().err
    assert "this run will not be bit-exact" in said
    assert "threads was 1 and is now 2" in said


def test_lost_metrics_are_mentioned_and_not_made_up(
    places: Places, line_to: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert places.run(line_to(tmp_path / "whole")) == 0
    out = tmp_path / "run"
    assert places.run(line_to(out), stop_at=places.passed - 8) == 143
    lost = len((out / "metrics.jsonl").read_text().splitlines())
    (out / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert places.run(line_to(out)) == 0
    assert "metrics.jsonl lacks lines" in capsys.readouterr().err
    assert outcome(out)[1] == outcome(tmp_path / "whole")[1][lost:]
    assert outcome(out)[0] == outcome(tmp_path / "whole")[0]
