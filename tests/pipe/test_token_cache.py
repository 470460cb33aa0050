"""Samples that are kept on disk: made once, whole or not at all, and the same as those made anew."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pluggy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_formats.errors import CommitError
from qlora_formats.manifest import Manifest
from qlora_pipe.data.batches import Stream, eval_batches
from qlora_pipe.data.encode import Sample
from qlora_pipe.data.sample_file import INDEX, INDEX_TYPE, RECORDS, InMemory, SampleWriter, StoredSamples, lengths_of
from qlora_pipe.data.samples import SampleSet, load_samples, split_held_out
from qlora_pipe.dataset import Example
from qlora_pipe.errors import DataError
from qlora_pipe.plugins import load_plugins
from tests.pipe.test_data_batches import _equal


class Counting:
    """An encoder of one id a letter that counts what it is asked for."""

    def __init__(self, *, fingerprint: str = "letters") -> None:
        self.fingerprint = fingerprint
        self.examples = 0

    def encode(self, examples: Sequence[Example]) -> Iterator[list[Sample] | DataError]:
        for example in examples:
            self.examples += 1
            prompt, answer = (message.content for message in example.messages)
            if "!" in answer:
                yield DataError(f"{example.origin}: an answer must not shout")
                continue
            ids = np.array([1, *map(ord, prompt + answer), 2], np.int32)
            trained = np.arange(len(ids)) > len(prompt)
            yield [Sample(ids=ids, trained=trained, origin=example.origin, cut="cut" in answer)]


@pytest.fixture(scope="module")
def manager() -> pluggy.PluginManager:
    return load_plugins()


def _write(path: Path, *answers: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{n}:", "answer": each}) + "\n" for n, each in enumerate(answers)))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return _write(tmp_path / "rows.jsonl", *("abcdefghijklmnopqrstuvwxyz"[: 1 + 7 * n % 23] for n in range(700)))


def _load(rows: Path, cache: Path | None, encoder: Counting | None = None, **words: object) -> SampleSet:
    return load_samples(
        f"jsonl:{rows}",
        encoder=encoder or Counting(),
        manager=load_plugins(),
        cache=cache,
        **words,  # type: ignore[arg-type]
    )


def _same(one: Sample, other: Sample) -> bool:
    return (
        np.array_equal(one.ids, other.ids)
        and one.ids.dtype == other.ids.dtype
        and np.array_equal(one.trained, other.trained)
        and one.trained.dtype == other.trained.dtype
        and (one.source is None) == (other.source is None)
        and (one.source is None or np.array_equal(one.source, other.source))  # type: ignore[arg-type]
        and (one.origin, one.cut) == (other.origin, other.cut)
    )


SAMPLES = st.builds(
    lambda ids, source, origin, cut: Sample(
        ids=np.array(ids, np.int32),
        trained=np.array(ids) % 2 == 1,
        origin=origin,
        source=np.array(source, np.int32) if source else None,
        cut=cut,
    ),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9),
    st.lists(st.integers(0, 2**31 - 1), max_size=5),
    st.text(max_size=9),
    st.booleans(),
)


@given(parts=st.lists(st.lists(SAMPLES, max_size=4), max_size=4))
@settings(max_examples=100)
def test_what_is_written_is_read_back(parts: list[list[Sample]]) -> None:
    records, index = InMemory(), InMemory()
    writer = SampleWriter(records, index)
    for part in parts:
        writer.write(part)
    written = [sample for part in parts for sample in part]
    read = StoredSamples(records, np.frombuffer(bytes(index), INDEX_TYPE))
    assert len(read) == len(written)
    assert all(_same(one, other) for one, other in zip(read, written, strict=True))
    assert lengths_of(read).tolist() == lengths_of(written).tolist() == [len(sample.ids) for sample in written]
    assert [sample.origin for sample in read[1::2]] == [sample.origin for sample in written[1::2]]
    if written:
        assert _same(read[-1], written[-1])
    with pytest.raises(IndexError):
        read[len(written)]


def test_a_second_load_tokenises_nothing_and_gives_the_same(rows: Path, tmp_path: Path) -> None:
    encoder = Counting()
    plain = _load(rows, None)
    first = _load(rows, tmp_path / "kept", encoder)
    assert (encoder.examples, first.tokenised) == (700, 700)
    second = _load(rows, tmp_path / "kept", encoder)
    assert (encoder.examples, second.tokenised) == (700, 0)
    for found in (first, second):
        assert found.stats == plain.stats
        assert all(_same(one, other) for one, other in zip(found.samples, plain.samples, strict=True))


def test_batches_of_kept_samples_are_those_of_samples_in_a_list(rows: Path, tmp_path: Path) -> None:
    kept = _load(rows, tmp_path / "kept").samples
    listed = list(kept)
    parts = zip(split_held_out(kept, share=0.1, seed=3), split_held_out(listed, share=0.1, seed=3), strict=True)
    for one, other in parts:
        assert [sample.origin for sample in one] == [sample.origin for sample in other]
        for row_tokens in (None, 40):
            streams = [Stream(list(each), seed=5, row_tokens=row_tokens) for each in (one, other)]
            streams.append(Stream(one, seed=5, row_tokens=row_tokens))
            for position in (0, 600, 77):
                batches = [stream.batch(position, rows=4) for stream in streams]
                assert all(_equal(batches[0], each) for each in batches[1:])
            evaluations = [list(eval_batches(each, batch_size=7, row_tokens=row_tokens)) for each in (one, list(other))]
            assert all(_equal(a, b) for a, b in zip(*evaluations, strict=True))


def test_what_samples_follow_from_decides_whether_they_are_made_anew(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    assert _load(rows, kept).tokenised == 700
    assert _load(rows, kept, Counting(fingerprint="other")).tokenised == 700
    assert _load(rows, kept, fields={"answer": "prompt"}).tokenised == 700
    rows.write_text(rows.read_text() + json.dumps({"prompt": "", "answer": "b"}) + "\n")
    assert _load(rows, kept).tokenised == 701
    monkeypatch.setattr("qlora_pipe.data.source.ROWS_VERSION", -1)
    assert _load(rows, kept).tokenised == 701
    # A dataset whose code has changed may make other examples of the same rows.
    monkeypatch.setattr("qlora_plugins.datasets.jsonl.__file__", str(rows))
    assert _load(rows, kept).tokenised == 701
    assert [_load(rows, kept).tokenised, len(list((kept / "samples").iterdir()))] == [0, 6]


@pytest.mark.parametrize("file", [RECORDS, INDEX, "qlora_pipe.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_set_aside_and_made_anew(rows: Path, tmp_path: Path, file: str, damage: str) -> None:
    kept, notes = tmp_path / "kept", []
    good = list(_load(rows, kept).samples)
    (folder,) = (kept / "samples").iterdir()
    path = folder / file
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "flip" else data[: len(data) // 2])
    found = _load(rows, kept, note=notes.append)
    assert found.tokenised == 700
    assert len(notes) == 1
    assert notes[0].startswith("kept samples are made anew, since ")
    assert (kept / "samples" / f"{folder.name}.damaged").is_dir()
    assert all(_same(one, other) for one, other in zip(found.samples, good, strict=True))
    assert _load(rows, kept).tokenised == 0


def test_a_foreign_folder_in_its_place_is_set_aside(rows: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    _load(rows, kept)
    (folder,) = (kept / "samples").iterdir()
    for name in ("README", RECORDS):
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_bytes(b"mine")
        assert _load(rows, kept).tokenised == 700
    assert (folder.with_name(f"{folder.name}.damaged") / "README").read_bytes() == b"mine"
    assert (folder.with_name(f"{folder.name}.damaged-2") / RECORDS).read_bytes() == b"mine"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, CommitError("no room", reason="disk")])
def test_a_build_that_is_stopped_leaves_nothing(rows: Path, tmp_path: Path, fault: BaseException) -> None:
    kept, asked = tmp_path / "kept", iter(range(10**6))

    def check() -> None:
        if next(asked) == 600:
            raise fault

    kind = fault if isinstance(fault, type) else type(fault)
    with pytest.raises(kind, match="QLORA_PIPE_CACHE can name another folder" if kind is CommitError else None):
        _load(rows, kept, check=check)
    assert list((kept / "samples").iterdir()) == []
    assert _load(rows, kept).tokenised == 700


CHILD = """
import sys, time
from pathlib import Path
from qlora_pipe.plugins import load_plugins
from qlora_pipe.data.samples import load_samples
from tests.pipe.test_token_cache import Counting
rows, cache, slow = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
calls = iter(range(10**6))
def check():
    number = next(calls)
    if number % 64 == 63:
        print(number, flush=True)
        time.sleep(slow)
encoder = Counting()
found = load_samples(f"jsonl:{rows}", encoder=encoder, manager=load_plugins(), cache=cache, check=check)
print("made" if found.tokenised else "found", len(found.samples), encoder.examples, flush=True)
"""


def _child(rows: Path, cache: Path, *, slow: float) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", textwrap.dedent(CHILD), str(rows), str(cache), str(slow)]
    return subprocess.Popen(words, env={"PYTHONPATH": ":".join(sys.path)}, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_never_taken_for_whole(rows: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    child = _child(rows, kept, slow=0.05)
    assert child.stdout is not None
    while child.stdout.readline() != "575\n":
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    (left,) = (kept / "samples").iterdir()
    assert left.name.endswith(".partial")
    found = _load(rows, kept)
    assert (found.tokenised, len(found.samples)) == (700, 700)
    (folder,) = (kept / "samples").iterdir()
    Manifest.read(folder).verify(folder)


def test_processes_that_want_the_same_wait_for_the_first(rows: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    children = [_child(rows, kept, slow=0.02) for _ in range(2)]
    said = sorted(child.communicate()[0].splitlines()[-1] for child in children)
    assert said == ["found 700 0", "made 700 700"]
    assert len(list((kept / "samples").iterdir())) == 1


def test_one_that_waits_can_be_stopped_and_goes_on_where_the_first_gives_up(rows: Path, tmp_path: Path) -> None:
    kept, notes = tmp_path / "kept", []
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        leave.wait()
        raise KeyboardInterrupt

    def first() -> None:
        with pytest.raises(KeyboardInterrupt):
            _load(rows, kept, check=hold)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _load(rows, kept, check=stop, note=notes.append)
    assert notes == ["another process is tokenising the same rows; waiting for it."]
    found = _load(rows, kept, check=leave.set)
    thread.join()
    assert found.tokenised == 700


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    peaks = []
    for count in (64, 256):
        rows = _write(tmp_path / f"{count}.jsonl", *("x" * 40_000 for _ in range(count)))
        tracemalloc.start()
        for _ in range(2):
            samples = _load(rows, tmp_path / "kept").samples
            train, held_out = split_held_out(samples, share=0.1, seed=0)
            stream = Stream(train, seed=0, row_tokens=50_000)
            for position in range(0, 64, 2):
                stream.batch(position, rows=2)
            for _ in eval_batches(held_out, batch_size=2):
                pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Four times the text, 8 MB more of it.
    assert peaks[1] < peaks[0] + 200_000


BAD = "".join(
    line + "\n"
    for line in (
        '{"prompt": "a", "answer": "b"}', '{"prompt": "a"}', '{"prompt": "a", "answer": "shout!"}', "{",
        '{"prompt": "c", "answer": "d"}',
    )
)  # fmt: skip
REASONS = [
    'rows.jsonl:2: field "answer" is missing (row has "prompt")',
    "rows.jsonl:3: an answer must not shout",
    "rows.jsonl:4: not valid JSON at column 2: Expecting property name enclosed in double quotes",
    "rows.jsonl:5: not UTF-8: byte 1 of the line is 0xff",
]


@pytest.mark.parametrize("on_disk", [True, False])
def test_bad_rows_are_counted_and_kept_with_the_reason(tmp_path: Path, on_disk: bool) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = BAD.encode().splitlines()
    rows.write_bytes(b"\n".join([*lines[:4], b"\xff\xfe", lines[4]]))
    kept = tmp_path / "kept" if on_disk else None
    with pytest.raises(DataError) as caught:
        _load(rows, kept)
    assert str(caught.value) == REASONS[0]
    for again in (False, True):
        found = _load(rows, kept, on_bad_row="skip")
        assert (found.stats.rows, found.stats.bad, found.stats.samples) == (2, 4, 2)
        assert [sample.origin for sample in found.samples] == ["rows.jsonl:1", "rows.jsonl:6"]
        kept_rows = [json.loads(line) for line in found.quarantine()]
        assert [row["reason"] for row in kept_rows] == REASONS
        assert [row.get("row", row.get("row_base64")) for row in kept_rows] == [
            *(line.decode() for line in lines[1:4]),
            "//4=",
        ]
        assert found.tokenised == (0 if again and on_disk else 6)
    # What was kept while bad rows were skipped does not hide them from a run that is to fail.
    with pytest.raises(DataError) as caught:
        _load(rows, kept)
    assert str(caught.value) == REASONS[0]


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_file_of_bad_rows_alone_is_an_error_even_where_they_are_skipped(tmp_path: Path, on_disk: bool) -> None:
    rows = _write(tmp_path / "rows.jsonl", "no!", "oh no!")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            _load(rows, tmp_path / "kept" if on_disk else None, on_bad_row="skip")
        assert str(caught.value) == "all 2 rows are bad; the first: rows.jsonl:1: an answer must not shout"
