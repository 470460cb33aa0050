"""The commit protocol: the old state or the new one, whatever happens in between."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_formats import commit, disk
from qlora_formats.commit import AppendFile, commit_folder, write_file
from qlora_formats.errors import CommitError, FormatError
from qlora_formats.manifest import MANIFEST, Manifest
from qlora_formats.removal import finish_removal, remove_folder, set_aside
from qlora_formats.target import finished, require_space

INPUTS = {"source": {"sha256": "ab" * 32}, "settings": {"block_size": 64, "kinds": ["nf4", "fp4"]}}
EFFECTS = (
    (commit, "_open"),
    *((disk, name) for name in ("_write", "_fsync", "_rename", "_unlink", "_mkdir", "_rmdir")),
)


class Stop(BaseException):
    """The process is gone."""


class World:
    """Counts the moments before, within and after every effect on the disk, and breaks at the chosen one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moment = 0
        self.break_at = -1
        self.error: Callable[[], BaseException] = Stop
        # What an fsync protects against is not simulated here, and each takes milliseconds.
        monkeypatch.setattr(disk, "_fsync", lambda _: None)
        for module, name in EFFECTS:
            monkeypatch.setattr(module, name, self._watched(getattr(module, name), torn=name == "_write"))

    def arm(self, break_at: int, error: Callable[[], BaseException] = Stop) -> None:
        self.moment, self.break_at, self.error = 0, break_at, error

    def _watched(self, effect: Callable[..., Any], *, torn: bool) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            self._pass()
            if torn and self.moment == self.break_at:
                effect(args[0], args[1][: len(args[1]) // 2])
            if torn:
                self._pass()
            result = effect(*args)
            self._pass()
            return result

        return watched

    def _pass(self) -> None:
        if self.moment == self.break_at:
            self.break_at = -1
            raise self.error()
        self.moment += 1


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def make(target: Path) -> Manifest:
    """What a stage does: nothing if it is finished, else write what is not there yet."""
    done = finished(target, kind="store", inputs=INPUTS)
    if done is not None:
        return done
    with commit_folder(target, kind="store", inputs=INPUTS) as folder:
        if "one.bin" not in folder.done:
            with folder.create("one.bin") as writer:
                writer.write(b"first half, ")
                writer.write(memoryview(b"second half"))
                writer.facts["tensors"] = {"w": {"rmse": 0.25}}
        if "two.txt" not in folder.done:
            folder.write("two.txt", b"two\n" * 3)
        return folder.finish({"tensors": 2})


def make_from_parts(target: Path) -> int:
    """What a stage does whose result is one file of parts that are expensive: gives how many it had to make."""
    made = 0
    if finished(target, kind="adapter", inputs=INPUTS) is not None:
        return made
    with commit_folder(target, kind="adapter", inputs=INPUTS) as folder:
        parts = [f"part-{number}" for number in range(3)]
        if "whole.bin" not in folder.done:
            for part in parts:
                if part not in folder.done:
                    folder.write(part, part.encode())
                    made += 1
            folder.write("whole.bin", b"".join((folder.path / part).read_bytes() for part in parts))
        for part in parts:
            if part in folder.done:
                folder.discard(part)
        folder.finish()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    make(tmp_path / "reference" / "out")
    return contents(tmp_path / "reference" / "out")


def all_moments(world: World, scratch: Path) -> int:
    world.arm(-1)
    make(scratch / "counted" / "deep" / "out")
    return world.moment


def test_a_stop_before_within_and_after_every_effect_leaves_the_old_state_or_the_new_one(
    world: World, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    moments = all_moments(world, tmp_path)
    assert moments > 70
    for moment in range(moments):
        target = tmp_path / f"stopped-{moment}" / "deep" / "out"
        world.arm(moment)
        with pytest.raises(Stop):
            make(target)
        if target.exists():
            assert contents(target) == expected, moment
        make(target)
        assert contents(target) == expected, moment
        assert [path.name for path in target.parent.iterdir()] == ["out"], moment


def test_a_second_stop_while_continuing_is_no_worse(world: World, tmp_path: Path, expected: dict[str, bytes]) -> None:
    moments = all_moments(world, tmp_path)
    stopped_twice = 0
    for moment in range(moments):
        target = tmp_path / f"stopped-{moment}" / "deep" / "out"
        world.arm(moment)
        with pytest.raises(Stop):
            make(target)
        world.arm(7 * moment % 60)
        try:
            make(target)
        except Stop:
            stopped_twice += 1
        world.arm(-1)
        make(target)
        assert contents(target) == expected, moment
    assert stopped_twice > moments // 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_a_refusal_of_the_system_at_any_effect_is_one_sentence_and_can_be_continued(
    world: World, tmp_path: Path, expected: dict[str, bytes], code: int
) -> None:
    for moment in range(all_moments(world, tmp_path)):
        target = tmp_path / f"refused-{moment}" / "deep" / "out"
        world.arm(moment, lambda: OSError(code, os.strerror(code)))
        with pytest.raises(CommitError, match=rf"cannot write {tmp_path}.*{os.strerror(code)}.*MiB are free") as caught:
            make(target)
        assert caught.value.reason == "disk"
        make(target)
        assert contents(target) == expected, moment


def test_what_is_finished_is_not_written_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with commit_folder(target, kind="store", inputs=INPUTS) as folder:
        folder.write("one.bin", b"1")
    with commit_folder(target, kind="store", inputs=INPUTS) as folder:
        assert list(folder.done) == ["one.bin"]
        assert not target.exists()
        folder.finish()
    assert finished(target, kind="store", inputs=INPUTS) == Manifest.read(target)


@pytest.mark.parametrize("damage", [b"", b"2", b"11"], ids=["emptied", "changed", "longer"])
def test_a_finished_file_that_was_damaged_is_not_taken_over(tmp_path: Path, damage: bytes) -> None:
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        folder.write("one.bin", b"1")
        (folder.path / "one.bin").write_bytes(damage)
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        assert not folder.done
        folder.write("one.bin", b"1")
        folder.finish()
    assert (tmp_path / "out" / "one.bin").read_bytes() == b"1"


def test_a_torn_journal_line_counts_as_never_written(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        folder.write("one.bin", b"1")
        folder.write("two.bin", b"2")
        journal = folder.path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        assert list(folder.done) == ["one.bin"]
        folder.write("two.bin", b"2")
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        assert list(folder.done) == ["one.bin", "two.bin"]


def test_an_unfinished_folder_of_other_inputs_is_a_conflict_that_names_the_difference(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        folder.write("one.bin", b"1")
    other = {**INPUTS, "settings": {"block_size": 128, "kinds": ("nf4", "fp4")}}
    with (
        pytest.raises(CommitError, match=r"settings\.block_size was 64 and is now 128; rerun") as caught,
        commit_folder(tmp_path / "out", kind="store", inputs=other),
    ):
        pass
    assert caught.value.reason == "conflict"
    assert "kinds" not in str(caught.value)


def test_parts_are_made_once_and_are_gone_in_the_end_wherever_the_process_stops(world: World, tmp_path: Path) -> None:
    world.arm(-1)
    assert make_from_parts(tmp_path / "reference") == 3
    expected, moments = contents(tmp_path / "reference"), world.moment
    assert set(expected) == {"whole.bin", MANIFEST}
    assert moments > 90
    for moment in range(moments):
        target = tmp_path / str(moment) / "out"
        world.arm(moment)
        with pytest.raises(Stop):
            make_from_parts(target)
        there = {path.name for path in target.parent.glob("*out*/*")}
        kept = 3 if "whole.bin" in there else sum(name.startswith("part-") for name in there)
        assert make_from_parts(target) == 3 - kept, moment
        assert contents(target) == expected, moment


def test_a_discarded_file_can_be_written_again(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        folder.write("one.bin", b"1")
        folder.discard("one.bin")
        assert not folder.done
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        assert not folder.done
        folder.write("one.bin", b"22")
        folder.finish()
    assert (tmp_path / "out" / "one.bin").read_bytes() == b"22"


def test_restart_drops_what_a_run_stopped_anywhere_has_left(world: World, tmp_path: Path) -> None:
    def attempt(target: Path, n: int) -> None:
        with commit_folder(target, kind="training", inputs={"attempt": n}, restart=True) as folder:
            assert not folder.done
            folder.write(f"weights-{n}.bin", b"%d" % n)
            folder.write(f"state-{n}.bin", b"%d" % n)
            folder.finish()

    world.arm(-1)
    attempt(tmp_path / "counted" / "out", 1)
    stopped = 0
    for moment in range(world.moment):
        target = tmp_path / str(moment) / "out"
        world.arm(moment)
        with pytest.raises(Stop):
            attempt(target, 1)
        if not target.exists():
            attempt(target, 2)
            assert set(contents(target)) == {"weights-2.bin", "state-2.bin", MANIFEST}
            stopped += 1
    assert stopped > 50


@pytest.mark.parametrize("finishing", [False, True])
def test_what_is_abandoned_is_gone_and_a_stop_on_the_way_can_be_restarted(
    world: World, tmp_path: Path, finishing: bool
) -> None:
    def give_up(target: Path, moment: int) -> None:
        world.arm(-1)
        with commit_folder(target, kind="samples", inputs=INPUTS, restart=True) as folder:
            folder.write("one.bin", b"1")
            with contextlib.suppress(Stop), folder.create("two.bin") as writer:
                writer.write(b"2")
                raise Stop
            if finishing:
                # As where the last step of all is refused.
                manifest = Manifest.build(kind="samples", inputs=INPUTS, files=folder.done, fields={})
                (folder.path / MANIFEST).write_bytes(manifest.to_bytes())
                (folder.path / "journal.jsonl").unlink()
            world.arm(moment)
            folder.abandon()

    give_up(tmp_path / "whole" / "out", -1)
    assert list((tmp_path / "whole").iterdir()) == []
    for moment in range(world.moment):
        target = tmp_path / str(moment) / "out"
        with pytest.raises(Stop):
            give_up(target, moment)
        give_up(target, -1)
        assert list(target.parent.iterdir()) == []


def test_restart_itself_can_be_stopped_anywhere(world: World, tmp_path: Path) -> None:
    def run(target: Path, inputs: dict[str, int]) -> None:
        with commit_folder(target, kind="training", inputs=inputs, restart=True) as folder:
            folder.write("state.bin", b"2")
            folder.finish()

    for moment in range(12):
        target = tmp_path / str(moment) / "out"
        world.arm(-1)
        with commit_folder(target, kind="training", inputs={"n": 1}) as folder:
            folder.write("old.bin", b"1")
            # As after a crash between the removal of the journal and the final rename.
            manifest = Manifest.build(kind="training", inputs={"n": 1}, files=folder.done, fields={})
            (folder.path / MANIFEST).write_bytes(manifest.to_bytes())
            (folder.path / "journal.jsonl").unlink()
        world.arm(moment)
        with pytest.raises(Stop):
            run(target, {"n": 2})
        run(target, {"n": 2})
        assert set(contents(target)) == {"state.bin", MANIFEST}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_existing_target_is_a_conflict_and_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    sentence = r"out already exists.*: choose another name or move it away"
    with pytest.raises(CommitError, match=sentence) as caught:
        finished(target, kind="store", inputs=INPUTS)
    assert caught.value.reason == "conflict"
    with pytest.raises(CommitError, match=sentence) as caught:
        begin(target)
    assert caught.value.reason == "conflict"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def begin(target: Path) -> None:
    with commit_folder(target, kind="store", inputs=INPUTS):
        pass


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        (tmp_path / "out").mkdir()
        with pytest.raises(CommitError, match="already exists"):
            folder.finish()
    assert not list((tmp_path / "out").iterdir())


def test_finished_names_what_differs_and_refuses_a_damaged_folder(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(
        CommitError, match=r"made from other inputs or settings: kind was \"store\" and is now \"adapter\""
    ):
        finished(tmp_path / "out", kind="adapter", inputs=INPUTS)
    (tmp_path / "out" / "one.bin").unlink()
    with pytest.raises(CommitError, match=r"is in the way: .*lacks the file one\.bin"):
        finished(tmp_path / "out", kind="store", inputs=INPUTS)


def test_two_writers_of_one_target_exclude_each_other(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out", kind="store", inputs=INPUTS) as folder:
        with pytest.raises(CommitError, match="another process is writing it") as caught:
            begin(tmp_path / "out")
        assert caught.value.reason == "locked"
        folder.write("one.bin", b"1")
        folder.finish()


@pytest.mark.parametrize("name", ["mine.txt", ".hidden"])
def test_a_folder_that_only_looks_like_ours_is_left_alone(tmp_path: Path, name: str) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / name).write_text("mine")
    with pytest.raises(CommitError, match=f"holds '{name}' and no journal"):
        begin(tmp_path / "out")
    assert contents(partial) == {name: b"mine"}


@pytest.mark.parametrize("journal", [b"[]\n", b"{}\n", b"not json\n", b"\xff\n"])
def test_a_journal_that_is_not_ours_is_a_conflict(tmp_path: Path, journal: bytes) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "journal.jsonl").write_bytes(journal)
    with pytest.raises(CommitError, match="cannot continue what lies in") as caught:
        begin(tmp_path / "out")
    assert caught.value.reason == "conflict"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_is_in_the_way_of_the_partial_folder_is_a_conflict(tmp_path: Path, kind: str) -> None:
    partial = tmp_path / ".out.partial"
    if kind == "file":
        partial.write_text("mine")
    else:
        partial.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(CommitError, match="is in the way and is not a folder") as caught:
        begin(tmp_path / "out")
    assert caught.value.reason == "conflict"


def test_finish_refuses_files_that_nobody_noted_until_they_are_adopted(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "out", kind="adapter", inputs={}) as folder:
        (folder.path / "by_a_library.bin").write_bytes(b"x" * 5)
        with pytest.raises(CommitError, match=r"by_a_library\.bin lies in a folder"):
            folder.finish()
        folder.adopt("by_a_library.bin")
        manifest = folder.finish()
    assert manifest.files["by_a_library.bin"].bytes == 5
    manifest.verify(tmp_path / "out")


def test_files_and_folders_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        make(tmp_path / "out")
        write_file(tmp_path / "settings.yaml", b"a: 1\n")
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, *tmp_path.rglob("*"))}
    assert {modes[name] for name in ("one.bin", "two.txt", MANIFEST, "settings.yaml")} == {0o640}
    assert modes["out"] == 0o750


def test_copy_takes_the_bytes_as_they_are_and_names_a_source_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bytes(range(256)) * 9)
    with commit_folder(tmp_path / "out", kind="checkpoint", inputs={}) as folder:
        folder.copy(tmp_path / "tokenizer.json", "tokenizer.json")
        with pytest.raises(FormatError, match=r"cannot read .*absent\.json: No such file"):
            folder.copy(tmp_path / "absent.json", "absent.json")
        folder.finish()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == bytes(range(256)) * 9
    assert set(contents(tmp_path / "out")) == {"tokenizer.json", MANIFEST}


def test_write_file_shows_the_old_bytes_or_the_new_ones_at_every_stop(world: World, tmp_path: Path) -> None:
    for moment in range(15):
        path = tmp_path / str(moment) / "file"
        world.arm(-1)
        write_file(path, b"old")
        world.arm(moment)
        try:
            write_file(path, b"newer")
        except Stop:
            assert path.read_bytes() in {b"old", b"newer"}
            write_file(path, b"newer")
        assert contents(path.parent) == {"file": b"newer"}


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[AppendFile]:
    with AppendFile.open(tmp_path / "run" / "metrics.jsonl") as file:
        yield file


def test_an_append_file_grows_is_cut_back_and_goes_on(metrics: AppendFile, tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for line in (b"1\n", b"22\n", b"333\n"):
        metrics.append(line)
    metrics.sync()
    assert metrics.size == 9
    metrics.truncate(5)
    metrics.append(b"4\n")
    with AppendFile.open(path) as again:
        again.append(b"5\n")
    assert path.read_bytes() == b"1\n22\n4\n5\n"


def test_remove_folder_deletes_only_what_the_manifest_names(tmp_path: Path) -> None:
    make(tmp_path / "step-1")
    (tmp_path / "step-1" / "notes.txt").write_text("mine")
    with pytest.raises(CommitError, match=r"also holds 'notes\.txt'"):
        remove_folder(tmp_path / "step-1")
    assert len(contents(tmp_path / "step-1")) == 4
    (tmp_path / "step-1" / "notes.txt").unlink()
    remove_folder(tmp_path / "step-1")
    assert not list(tmp_path.iterdir())


def test_a_stopped_removal_is_never_seen_and_is_cleared_by_the_next(world: World, tmp_path: Path) -> None:
    for moment in range(18):
        old, new = (tmp_path / str(moment) / name for name in ("step-1", "step-2"))
        world.arm(-1)
        make(old)
        make(new)
        world.arm(moment)
        try:
            remove_folder(old)
        except Stop:
            if old.exists():
                Manifest.read(old).verify(old)
                remove_folder(old)
        world.arm(-1)
        remove_folder(new)
        assert not list(old.parent.iterdir())


def test_a_stopped_removal_can_be_finished_for_one_folder(world: World, tmp_path: Path) -> None:
    for moment in range(18):
        folder = tmp_path / str(moment) / "scratch"
        world.arm(-1)
        make(folder)
        world.arm(moment)
        with contextlib.suppress(Stop):
            remove_folder(folder)
        world.arm(-1)
        finish_removal(folder)
        # Only before its renaming is it still whole.
        assert [path.name for path in folder.parent.iterdir()] in ([], ["scratch"])
        assert not folder.exists() or Manifest.read(folder)


def test_a_folder_of_a_stranger_that_looks_discarded_stays(tmp_path: Path) -> None:
    make(tmp_path / "step-1")
    (tmp_path / ".mine.discarded").mkdir()
    (tmp_path / ".mine.discarded" / "notes.txt").write_text("mine")
    (tmp_path / ".file.discarded").write_text("mine")
    remove_folder(tmp_path / "step-1")
    finish_removal(tmp_path / "mine")
    finish_removal(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".file.discarded", ".mine.discarded", "notes.txt"]


def test_a_damaged_folder_is_set_aside_under_the_next_free_name(tmp_path: Path) -> None:
    for name in ("step-1.damaged", "step-1.damaged-2"):
        make(tmp_path / "step-1")
        assert set_aside(tmp_path / "step-1") == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1.damaged", "step-1.damaged-2"]


def test_require_space_says_how_much_is_missing(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", needed=1)
    with pytest.raises(CommitError, match=r"needs about 1,\d{3},.* MiB and .* MiB are free there") as caught:
        require_space(tmp_path / "out", needed=2**80)
    assert caught.value.reason == "disk"
