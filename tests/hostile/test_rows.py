"""Malformed rows: each is refused in one sentence that names file, line and field, and never with a traceback."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from qlora_pipe.errors import DataError
from qlora_pipe.rows import MAX_ROW_BYTES, BadRow, Row, json_lines, json_rows
from qlora_plugins.datasets import alpaca, jsonl

GOOD = b'{"prompt": "a", "answer": "b"}\n'


def _reason(read: Callable[[Path], Iterable[object]], path: Path) -> str:
    """What is wrong with the first bad row, whether a file's reader hands it on or a dataset's raises it."""
    try:
        return next(row.reason for row in read(path) if isinstance(row, BadRow))
    except DataError as fault:
        return str(fault)


def _turns(*turns: object) -> bytes:
    return json.dumps({"messages": turns}).encode()


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

JSONL_ROWS = {
    b'{"prompt": "a", "reply": "b"}': 'field "answer" is missing (row has "prompt", "reply")',
    b"{}": 'field "prompt" is missing (row has no fields)',
    b'{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1,"g":1,"h":1,"i":1,"j":1}': (
        'field "prompt" is missing (row has "a", "b", "c", "d", "e", "f", "g", "h", and 2 more)'
    ),
    b'{"\\ud800\\n' + b"k" * 50 + b'": 1}': (
        f'field "prompt" is missing (row has "\\ud800\\n{"k" * 38}...")'
    ),
    b'{"prompt": "a", "answer": ""}': 'field "answer" is empty',
    b'{"prompt": "a", "answer": " \\n"}': 'field "answer" is empty',
    b'{"prompt": "a", "answer": 7}': 'field "answer" is a number, not text',
    b'{"prompt": "a", "answer": 1e999}': 'field "answer" is a number, not text',
    b'{"prompt": "a", "answer": null}': 'field "answer" is null, not text',
    b'{"prompt": "a", "answer": true}': 'field "answer" is true or false, not text',
    b'{"prompt": ["a"], "answer": "b"}': 'field "prompt" is an array, not text',
    b'{"prompt": {}, "answer": "b"}': 'field "prompt" is an object, not text',
    b'{"prompt": "a\\udc00", "answer": "b"}': 'field "prompt" holds a lone surrogate (U+DC00) at character 1',
    b'{"prompt": "a", "answer": "b", "answer": "c"}': 'field "answer" stands twice',
    b'{"prompt": "a", "answer": "b", "x": {"y": 1, "y": 2}}': 'field "y" stands twice',
    b'{"prompt": "a", "answer": "b", "score": NaN}': "NaN is not a JSON number",
    b'{"prompt": "a", "answer": "b", "score": -Infinity}': "-Infinity is not a JSON number",
    b'{"prompt": "a", "answer": "b", "n": ' + b"9" * 5000 + b"}": "a number has too many digits",
    b'{"prompt": "\xff", "answer": "b"}': "not UTF-8: byte 13 of the line is 0xff",
    b'{"prompt": "\xed\xa0\x80", "answer": "b"}': "not UTF-8: byte 13 of the line is 0xed",
    b"[" * 100_000: "more than 32 levels of arrays and objects",
    b'{"x": ' + b"[" * 40 + b"1" + b"]" * 40 + b"}": "more than 32 levels of arrays and objects",
    b'{"x": ' * 33 + b"1" + b"}" * 33: "more than 32 levels of arrays and objects",
    b'["a", "b"]': "a row must be a JSON object, and this is an array",
    b'"a"': "a row must be a JSON object, and this is text",
    b'{"prompt": "a"': "not valid JSON at column 15: Expecting ',' delimiter",
    b'{"prompt": "a': "not valid JSON at column 12: Unterminated string starting",
    b'{"prompt": "a\tb"}': "not valid JSON at column 14: Invalid control character",
    b'{"prompt": "a\x00b"}': "not valid JSON at column 14: Invalid control character",
    b"{'prompt': 'a'}": "not valid JSON at column 2: Expecting property name enclosed in double quotes",
    b'{"prompt": "a", "answer": "b"} {}': "not valid JSON at column 32: more text follows the row",
    b'{"messages": "a"}': 'field "messages" is text, not an array',
    b'{"messages": []}': 'field "messages" is empty',
    b'{"messages": [], "prompt": "a"}': (
        'field "messages" stands beside "prompt" or "answer"; a row has one form'
    ),
    _turns("a"): 'field "messages[0]" is text, not an object',
    _turns(USER, {"role": "assistant"}): 'field "messages[1].content" is missing',
    _turns({"content": "a"}): 'field "messages[0].role" is missing',
    _turns({"role": "bot", "content": "a"}): 'field "messages[0].role" is none of "system", "user", "assistant"',
    _turns({"role": 1, "content": "a"}): 'field "messages[0].role" is a number, not text',
    _turns(USER, {"role": "assistant", "content": None}): 'field "messages[1].content" is null, not text',
    _turns(USER, {"role": "assistant", "content": ""}): 'field "messages[1].content" is empty',
    _turns(USER, ASSISTANT, USER): 'field "messages" ends with the user, and the last word must be the assistant\'s',
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), JSONL_ROWS.items(), ids=[str(number) for number in range(len(JSONL_ROWS))])
def test_malformed_row_is_named_by_file_line_and_field(tmp_path: Path, row: bytes, reason: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD * 36 + row + b"\n" + GOOD)
    assert _reason(jsonl.DATASET.read, path) == f"train.jsonl:37: {reason}"


def test_deepest_row_allowed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"x": ' * 32 + b"1" + b"}" * 32 + b'\n{"y": [' + b"[]," * 99 + b"[]]}\n")
    assert len(list(json_lines(path))) == 2


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"], ids=["none", "unix", "windows"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["bare", "marked"])
def test_row_of_one_mebibyte_is_read_and_a_longer_one_refused(tmp_path: Path, start: bytes, end: bytes) -> None:
    path = tmp_path / "train.jsonl"
    padding = b"x" * (MAX_ROW_BYTES - len(b'{"a": ""}'))
    path.write_bytes(start + b'{"a": "' + padding + b'"}' + end)
    (row,) = json_lines(path)
    assert isinstance(row, Row)
    assert len(row.fields["a"]) == len(padding)
    path.write_bytes(start + b'{"a": "x' + padding + b'"}' + end)
    assert _reason(json_lines, path) == "train.jsonl:1: the row is longer than 1 MiB"
    path.write_bytes(b'[\n{"a": "x' + padding + b'"}]')
    assert _reason(json_rows, path) == "train.jsonl:2: the row is longer than 1 MiB"


def test_line_without_an_end_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        # A sparse file: reading it whole would take 64 GiB.
        file.truncate(64 << 30)
    assert _reason(json_lines, path) == "train.jsonl:1: the row is longer than 1 MiB"


ROW = b'{"instruction": "a", "input": "", "output": "b"}'
ARRAYS = {
    b"[\n" + ROW + b',\n{"instruction": "a",\n "output": "b"}]': (
        'rows.json:3: field "input" is missing (row has "instruction", "output")'
    ),
    b"[\n" + ROW + b",\n\n[1]]": "rows.json:4: a row must be a JSON object, and this is an array",
    b"[" + ROW + b"\n\n" + ROW + b"]": 'rows.json:3: not valid JSON: after a row comes neither "," nor "]"',
    b"[" + ROW + b",\n]": "rows.json:2: not valid JSON at column 1: Expecting value",
    b"[" + ROW + b",\n": "rows.json:2: not valid JSON at column 1: Expecting value",
    b"[" + ROW: 'rows.json:1: not valid JSON: after a row comes neither "," nor "]"',
    b"[\n" + ROW + b"\n]\n]": "rows.json:3: not valid JSON: more text follows the array",
    b"[]\n{}": "rows.json:1: not valid JSON: more text follows the array",
    b"[": "rows.json:1: not valid JSON at column 2: Expecting value",
    b'[\n{"instruction": "a",\n"output" "b"}]': "rows.json:3: not valid JSON at column 10: Expecting ':' delimiter",
    b'[\n{"instruction": "a",\n"input": NaN}]': "rows.json:2: NaN is not a JSON number",
    b'[\n{"instruction": "a",\n"instruction": "b"}]': 'rows.json:2: field "instruction" stands twice',
    b"[\n" + ROW + b',\n{"instruction": "\xff"}]': "rows.json:3: not UTF-8: byte 18 of the line is 0xff",
    b"[\n" + b"[" * 100_000: "rows.json:2: more than 32 levels of arrays and objects",
    b'[\n{"instruction": "", "input": "", "output": "b"}]': 'rows.json:2: field "instruction" is empty',
    b'[\n{"instruction": "a", "input": "", "output": ""}]': 'rows.json:2: field "output" is empty',
    b'[\n{"instruction": "a", "input": null, "output": "b"}]': 'rows.json:2: field "input" is null, not text',
}


@pytest.mark.parametrize(("content", "reason"), ARRAYS.items(), ids=[str(number) for number in range(len(ARRAYS))])
def test_malformed_array_is_named_by_file_line_and_field(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    assert _reason(alpaca.DATASET.read, path) == reason


def test_empty_files_hold_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for content in (b"", b"\n \n", b"[]", b" [ ] \n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        assert list(json_rows(path)) == []


def test_folder_without_a_file_of_the_kind_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"a\n1\n")
    assert _reason(jsonl.DATASET.read, tmp_path) == f"{tmp_path} holds no file that ends in .jsonl or .ndjson"


def _mutated(content: bytes, generator: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5])):
        place = generator.randrange(len(data))
        kind = generator.randrange(4)
        if kind == 0:
            data[place] = generator.randrange(256)
        elif kind == 1:
            del data[place : place + generator.randrange(1, 12)]
        elif kind == 2:
            data[place:place] = generator.choice([b"NaN", b"null", b"[", b"}", b'"', b"\\ud800", b"\xff", b"\n", b","])
        else:
            data[place:place] = data[: generator.randrange(len(data))]
    return bytes(data)


def test_a_thousand_mutated_files_raise_nothing_but_data_errors(tmp_path: Path) -> None:
    generator = random.Random(0)
    lines = b"".join(
        json.dumps(row).encode() + b"\n" for row in ({"prompt": "é\n", "answer": "b"}, {"messages": [USER, ASSISTANT]})
    )
    sources = ((jsonl.DATASET.read, lines), (alpaca.DATASET.read, b"[\n" + ROW + b",\n" + ROW + b"\n]\n"))
    path = tmp_path / "rows.json"
    reasons: list[str] = []
    for _ in range(500):
        for read, content in sources:
            path.write_bytes(_mutated(content, generator))
            try:
                for example in read(path):
                    assert all(message.content.encode() is not None for message in example.messages)
            except DataError as fault:
                reasons.append(str(fault))
    assert 500 < len(reasons) < 1000
    assert all(reason.startswith("rows.json:") and "\n" not in reason for reason in reasons)
