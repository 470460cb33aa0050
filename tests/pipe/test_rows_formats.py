"""Rows of every kind of file: what they become, packed and unpacked, and what is said of those that can't be used."""

import gzip
import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_pipe.errors import DataError
from qlora_pipe.rows import (
    MAX_ROW_BYTES,
    BadRow,
    Row,
    csv_rows,
    documents,
    json_array,
    json_rows,
    parquet_rows,
    separated_rows,
    table_rows,
)

Reader = Callable[[Path], Iterator[Row | BadRow]]


def _read(reader: Reader, path: Path) -> list[tuple[str, object]]:
    """Origin and fields of each row, or "bad" and the reason."""
    return [("bad", row.reason) if isinstance(row, BadRow) else (row.origin, row.fields) for row in reader(path)]


def _fault(path: Path) -> str:
    try:
        return f"{len(_read(table_rows, path))} rows"
    except DataError as fault:
        return str(fault)


ROWS = [{"prompt": 'é, "q"', "answer": "1\r\n2"}, {"prompt": "b", "answer": "c"}]
CSV = b'prompt,answer\r\n"\xc3\xa9, ""q""","1\r\n2"\r\nb,c\r\n'
CONTENTS = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "rows.csv": CSV,
}
ORIGINS = {"rows.jsonl": (":1", ":2"), "rows.json": (":2", ":6"), "rows.csv": (":2", ":4")}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_table_reads_the_same_packed_or_not(tmp_path: Path, name: str, ending: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    # Two packed parts, one after the other, are one file to the programs that make them.
    content = CONTENTS[name]
    half = len(content) // 2
    path = tmp_path / (name + ending)
    path.write_bytes(pack(content[:half]) + pack(content[half:]))
    expected = [(path.name + place, row) for place, row in zip(ORIGINS[name], ROWS, strict=True)]
    assert _read(table_rows, path) == expected


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_file_that_is_damaged_or_cut_off_is_named(tmp_path: Path, ending: str) -> None:
    draws = random.Random(0)
    content = b"".join(json.dumps({"a": draws.randbytes(40).hex()}).encode() + b"\n" for _ in range(5000))
    packed = (
        gzip.compress(content) if ending == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(content)
    )
    path = tmp_path / f"rows.jsonl{ending}"
    for spoilt in (packed[:-1], packed[: len(packed) // 2], packed[:5], packed + b"junk", b"no such thing"):
        path.write_bytes(spoilt)
        with pytest.raises(DataError, match=rf"^rows\.jsonl{ending} cannot be unpacked after [\d,]+ bytes of rows: "):
            _read(table_rows, path)
    for place in range(0, len(packed), max(1, len(packed) // 50)):
        path.write_bytes(packed[:place] + bytes([packed[place] ^ 0x10]) + packed[place + 1 :])
        # A few bytes of a header say nothing about the rows, such as the time of packing.
        assert _fault(path).startswith((f"rows.jsonl{ending} cannot be unpacked after ", "5000 rows"))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_small_file_that_unpacks_to_a_huge_line_takes_little_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    if ending == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(128):
                file.write(bytes(1 << 20))
    else:
        path.write_bytes(zstandard.compress(bytes(1 << 28)))
    tracemalloc.start()
    assert _read(table_rows, path) == [("bad", f"rows.jsonl{ending}:1: the row is longer than 1 MiB")]
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_zst_and_parquet_without_their_library_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.zst").write_bytes(zstandard.compress(CSV))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; from pathlib import Path; from qlora_pipe.rows import table_rows\n"
        "loaded = {'torch', 'numpy', 'pyarrow', 'zstandard'} & sys.modules.keys(); assert not loaded, loaded\n"
        "sys.modules.update(zstandard=None, pyarrow=None)\n"
        "for name in ('rows.csv.zst', 'rows.parquet'):\n"
        f"    try: list(table_rows(Path({str(tmp_path)!r}) / name))\n"
        "    except Exception as fault: print(type(fault).__name__, fault)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"ConfigError {name} is read by the {library} library: pip install 'qlora-pipe[data]'"
        for name, library in (("rows.csv.zst", "zstandard"), ("rows.parquet", "pyarrow"))
    ]


def test_a_folder_gives_its_tables_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.jsonl.gz").write_bytes(gzip.compress(b'{"a": "2"}\n{"a"'))
    (tmp_path / "a.csv").write_bytes(b"a\n1\n")
    (tmp_path / "c.tsv").write_bytes(b'a\n"3"\n')
    (tmp_path / ".d.csv").write_bytes(b"a\n4\n")
    (tmp_path / "README.md").write_bytes(b"a\n5\n")
    assert _read(table_rows, tmp_path) == [
        ("a.csv:2", {"a": "1"}),
        ("b/one.jsonl.gz:1", {"a": "2"}),
        ("bad", "b/one.jsonl.gz:2: not valid JSON at column 5: Expecting ':' delimiter"),
        ("c.tsv:2", {"a": '"3"'}),
    ]
    with pytest.raises(DataError, match=r"holds no file that ends in \.parquet$"):
        _read(parquet_rows, tmp_path)
    with pytest.raises(DataError, match=r"^README\.md ends in none of \.jsonl, \.ndjson, "):
        _read(table_rows, tmp_path / "README.md")


BAD_CSV = {
    b"1,2,3": "rows.csv:3: the row has 3 cells, and there are 2 columns",
    b"1": "rows.csv:3: the row has 1 cells, and there are 2 columns",
    b'1,"2': "rows.csv:3: text follows the closing quote of cell 2",
    b'1,"2"x': "rows.csv:3: text follows the closing quote of cell 2",
    b'1,2"x"': (
        "rows.csv:3: cell 2 holds a quote and does not begin with one: put it in quotes, and each quote in it twice"
    ),
    b'"1\n\n2",3,4': "rows.csv:3: the row has 3 cells, and there are 2 columns",
    b"1,\xff": "rows.csv:3: not UTF-8: byte 3 of the line is 0xff",
    b'"1\n",\xff': "rows.csv:4: not UTF-8: byte 3 of the line is 0xff",
    b"1," + b"x" * MAX_ROW_BYTES: "rows.csv:3: the row is longer than 1 MiB",
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD_CSV.items(), ids=[str(number) for number in range(len(BAD_CSV))])
def test_a_bad_row_of_a_csv_is_named_and_the_others_are_read(tmp_path: Path, row: bytes, reason: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\nx,y\n" + row + b'\nz,"w,\n"\n')
    before, bad, after = csv_rows(path)
    assert isinstance(before, Row)
    assert isinstance(bad, BadRow)
    assert isinstance(after, Row)
    assert (before.fields, after.fields) == ({"a": "x", "b": "y"}, {"a": "z", "b": "w,\n"})
    assert (bad.reason, bad.raw) == (reason, row[:MAX_ROW_BYTES])
    assert after.origin == f"rows.csv:{4 + row.count(bytes([10]))}"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"a,,b", "column 2 has no name; the first line must name the columns"),
        (b"a,b,a", 'two columns are named "a"'),
        (b'a,"b', "the quotes of cell 2 do not close"),
    ],
)
def test_a_header_that_names_no_columns_is_a_data_error(tmp_path: Path, header: bytes, reason: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\n" + header + b"\n1,2,3\n")
    with pytest.raises(DataError) as caught:
        _read(csv_rows, path)
    assert str(caught.value) == f"rows.csv:2: {reason}"


def test_columns_may_be_named_where_a_file_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(b'Claim: "x"\\n?\tno\r\n\r\none cell\n')
    found = list(separated_rows(path, separator="\t", columns=("inputs", "targets")))
    assert [row.reason if isinstance(row, BadRow) else row.fields for row in found] == [
        {"inputs": 'Claim: "x"\\n?', "targets": "no"},
        "rows.tsv:3: the row has 1 cells, and there are 2 columns",
    ]


CELLS = st.lists(st.lists(st.text(alphabet='ab",\n\ré', max_size=6), min_size=2, max_size=2), max_size=8)


@given(rows=CELLS)
@settings(max_examples=200)
def test_what_a_csv_writer_writes_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    written = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    path.write_text("\n".join(["x,y", *written, ""]), newline="")
    assert [fields for _, fields in _read(csv_rows, path)] == [{"x": x, "y": y} for x, y in rows]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3), max_size=5),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
)
@settings(max_examples=200)
def test_any_array_comes_back_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only))
    assert [fields for _, fields in _read(json_array, path)] == rows


@pytest.mark.parametrize("read_bytes", [1, 7, 64])
def test_an_array_reads_the_same_however_little_is_in_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    rows = (
        b'[ {"a": "}\\"]"} , {"b": [1, {"c": "\\\\"}]},\n  17,{"d" 1}, "x]", {"e": "\xff"}, [[]],nul,{"f":"'
        + b"x" * 99
        + b'\\"]"}, {"g": 1}]\n'
    )
    path = tmp_path / "rows.json"
    path.write_bytes(rows)
    monkeypatch.setattr("qlora_pipe.rows.array_scan._READ_BYTES", read_bytes)
    monkeypatch.setattr("qlora_pipe.rows.array_scan._SIGHT_BYTES", 40)
    monkeypatch.setattr("qlora_pipe.rows.array_scan.MAX_ROW_BYTES", 39)
    assert _read(json_rows, path) == [
        ("rows.json:1", {"a": '}"]'}),
        ("rows.json:1", {"b": [1, {"c": "\\"}]}),
        ("bad", "rows.json:2: a row must be a JSON object, and this is a number"),
        ("bad", "rows.json:2: not valid JSON at column 11: Expecting ':' delimiter"),
        ("bad", "rows.json:2: a row must be a JSON object, and this is text"),
        ("bad", "rows.json:2: not UTF-8: byte 28 of the line is 0xff"),
        ("bad", "rows.json:2: a row must be a JSON object, and this is an array"),
        ("bad", "rows.json:2: not valid JSON at column 38: Expecting value"),
        ("bad", "rows.json:2: the row is longer than 1 MiB"),
        ("rows.json:2", {"g": 1}),
    ]


def test_an_array_of_a_hundred_mebibytes_is_read_in_a_few(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = json.dumps({"a": "x" * 100_000})
    with path.open("w") as file:
        file.write("[" + ",\n".join([row] * 1000) + "]")
    tracemalloc.start()
    assert sum(isinstance(row, Row) for row in json_rows(path)) == 1000
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
    tracemalloc.stop()


def test_parquet_gives_json_like_values_and_numbered_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table(
        {
            "text": ["a", None, "é"],
            "turns": [[{"role": "user", "n": 1}], [], None],
            "day": pyarrow.array([0, 1, None], pyarrow.date32()),
            "price": pyarrow.array(["1.50", None, None]).cast(pyarrow.decimal128(4, 2)),
            "data": [b"\x00", None, b""],
            "kind": pyarrow.array(["x", "y", "x"]).dictionary_encode(),
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert _read(parquet_rows, path) == [
        (f"rows.parquet:row {number}", dict(zip(table.column_names, values, strict=True)))
        for number, values in enumerate(
            [
                ("a", [{"role": "user", "n": 1}], "1970-01-01", "1.50", "AA==", "x"),
                (None, [], "1970-01-02", None, None, "y"),
                ("é", None, None, None, "", "x"),
            ],
            start=1,
        )
    ]


def test_a_row_group_of_any_size_is_read_in_a_few_mebibytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = [random.Random(number).randbytes(2000).hex() for number in range(8000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    assert path.stat().st_size > 30 << 20
    code = (
        "from pathlib import Path; import pyarrow; from qlora_pipe.rows import parquet_rows\n"
        f"count = sum(1 for _ in parquet_rows(Path({str(path)!r})))\n"
        "print(count, pyarrow.default_memory_pool().max_memory())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True
    )
    count, peak = map(int, done.stdout.split())
    assert count == 8000
    assert peak < 16 << 20


def test_a_bad_row_of_a_parquet_file_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = pyarrow.array([b"a", b"\xc3(", b"b" * (MAX_ROW_BYTES + 1), b"c"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    assert _read(parquet_rows, path) == [
        ("rows.parquet:row 1", {"text": "a"}),
        ("bad", "rows.parquet:row 2: a text is not UTF-8: its byte 1 is 0xc3"),
        ("bad", "rows.parquet:row 3: the row is longer than 1 MiB"),
        ("rows.parquet:row 4", {"text": "c"}),
    ]


def test_what_is_no_parquet_file_or_a_damaged_one_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [str(number) for number in range(5000)]}), path)
    whole = path.read_bytes()
    for spoilt in (b"", b"PAR1", whole[:-1], whole[100:], whole[:50] + bytes(200) + whole[250:]):
        path.write_bytes(spoilt)
        with pytest.raises(DataError, match=r"^rows\.parquet cannot be read as parquet after row \d+: "):
            _read(parquet_rows, path)
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"a parquet file is packed inside and is not read from a packed one"):
        _read(parquet_rows, tmp_path / "rows.parquet.gz")


def test_a_large_text_is_cut_at_line_ends_into_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_pipe.rows.plain_text.DOCUMENT_BYTES", 10)
    path = tmp_path / "tale.txt"
    smile = "\U0001f600"
    for content, expected in {
        "123456789\n": [("tale.txt", "123456789\n")],
        "12\n3\r\n567\nabc\nd": [("tale.txt:1", "12\n3\r\n567\n"), ("tale.txt:4", "abc\nd")],
        "éééééé\nx": [("tale.txt:1", "éééé"), ("tale.txt:1", "éé\nx")],
        smile * 5: [("tale.txt:1", smile * 2), ("tale.txt:1", smile * 2), ("tale.txt:1", smile)],
        "12345678\n         \nabcdef\n": [
            ("tale.txt:1", "12345678\n"),
            ("bad", "tale.txt:2: the document holds no text"),
            ("tale.txt:3", "abcdef\n"),
        ],
    }.items():  # fmt: skip
        path.write_bytes(content.encode())
        found = [(origin, fields if origin == "bad" else fields["text"]) for origin, fields in _read(documents, path)]  # type: ignore[index]
        assert found == expected
    path.write_bytes(b"1234567\n\xff\nabc\nde")
    assert _read(documents, path) == [
        ("bad", "tale.txt:2: not UTF-8: byte 1 of the line is 0xff"),
        ("tale.txt:3", {"text": "abc\nde"}),
    ]


def test_fields_are_renamed_from_what_the_file_calls_them() -> None:
    row = Row(fields={"q": "a", "prompt": "b", "r": "c"}, origin="x:1", raw=b"x")
    swapped = row.renamed({"prompt": "q", "q": "prompt", "answer": "s"})
    assert swapped.fields == {"q": "b", "prompt": "a", "r": "c"}
    assert (swapped.origin, swapped.raw) == ("x:1", b"x")


def test_a_frame_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    wide = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    path.write_bytes(packer.compress(CONTENTS["rows.jsonl"]) + packer.flush())
    with pytest.raises(DataError, match=r"^rows\.jsonl\.zst cannot be unpacked after 0 bytes of rows: "):
        _read(table_rows, path)
