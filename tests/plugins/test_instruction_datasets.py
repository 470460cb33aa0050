"""What a row of each of the instruction datasets becomes, and what is said of one that can't be used: made-up rows."""

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.dataset import Dataset, Example
from qlora_pipe.errors import DataError
from qlora_pipe.rows import BadRow, Row
from qlora_plugins.datasets import (
    alpaca,
    chip2,
    flan_v2,
    hh_rlhf,
    longform,
    oasst1,
    self_instruct,
    unnatural_instructions,
)
from tests.hostile.fuzzed_sources import SOURCES
from tests.plugins.table_files import write_table

# An example as tests write it: where it stands, its form, and who says what.
Told = tuple[str, str | None, list[tuple[str, str]]]


def told(examples: Iterable[Example]) -> list[Told]:
    return [(item.origin, item.form, [(turn.role, turn.content) for turn in item.messages]) for item in examples]


def read(folder: Path, dataset: Dataset, *rows: object) -> list[Told]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return told(dataset.read(path))


def pair(origin: str, prompt: str, answer: str) -> Told:
    return origin, "plain", [("user", prompt), ("assistant", answer)]


def refused(folder: Path, dataset: Dataset, row: object) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, dataset, row)
    return str(caught.value)


def test_alpaca_asks_the_instruction_with_its_input_under_it(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add {them}.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Wave.", "input": " \n", "output": "o/", "text": "Below is an instruction"},
    ]
    for dataset in (alpaca.DATASET, alpaca.CLEANED):
        assert read(tmp_path, dataset, *rows) == [
            ("rows.jsonl:1", "alpaca", [("user", "Add {them}.\n\n### Input:\n1 2"), ("assistant", "3")]),
            ("rows.jsonl:2", "alpaca", [("user", "Greet."), ("assistant", "Hi")]),
            ("rows.jsonl:3", "alpaca", [("user", "Wave."), ("assistant", "o/")]),
        ]


@pytest.mark.parametrize(("indent", "lines"), [(None, (1, 1)), (1, (2, 7)), (4, (2, 7))])
def test_an_array_gives_what_its_rows_give_apart(tmp_path: Path, indent: int | None, lines: tuple[int, int]) -> None:
    rows = [{"input": "Tell a tale.", "output": f"Once.\n{n}", "subset": "a"} for n in range(2)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent))
    assert told(longform.DATASET.read(path)) == [
        pair(f"rows.json:{line}", "Tell a tale.", f"Once.\n{n}") for n, line in enumerate(lines)
    ]


def test_flan_takes_inputs_and_targets(tmp_path: Path) -> None:
    row = {"inputs": " Is it?\n", "targets": " yes", "task": "boolq"}
    assert read(tmp_path, flan_v2.DATASET, row) == [pair("rows.jsonl:1", " Is it?\n", " yes")]


def test_flans_thoughts_end_with_the_answer_that_follows_from_them(tmp_path: Path) -> None:
    path = tmp_path / "quiz_train.tsv"
    path.write_text(
        'Is it "odd"?\\nOptions:\\n- yes\\n- no\tno\tEight is \\neven.\n"Quoted\tyes\tA \\\\sqrt.\none\ttwo\n'
    )
    row, other, bad = flan_v2.DATASET.rows(path)
    assert isinstance(bad, BadRow)
    assert bad.reason == "quiz_train.tsv:3: the row has 2 cells, and there are 3 columns"
    assert isinstance(row, Row)
    assert isinstance(other, Row)
    assert told(map(flan_v2.example, (row, other))) == [
        pair(
            "quiz_train.tsv:1",
            'Is it "odd"?\nOptions:\n- yes\n- no',
            "Eight is \neven. So the final answer is no.",
        ),
        pair("quiz_train.tsv:2", '"Quoted', "A \\\\sqrt. So the final answer is yes."),
    ]


def test_flans_folder_may_hold_both_forms(tmp_path: Path) -> None:
    (tmp_path / "cot").mkdir()
    (tmp_path / "cot" / "b.tsv.gz").write_bytes(gzip.compress(b"Q\tA\tE\n"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"inputs": "I", "targets": "T"}))
    assert told(flan_v2.DATASET.read(tmp_path)) == [
        pair("a.jsonl:1", "I", "T"),
        pair("cot/b.tsv.gz:1", "Q", "E So the final answer is A."),
    ]


def test_longform_takes_input_and_output(tmp_path: Path) -> None:
    row = {"input": "Tell a tale.", "output": "Once.\n\nThe end.", "source": "C4", "subset": "corpus_extracted"}
    assert read(tmp_path, longform.DATASET, row) == [pair("rows.jsonl:1", "Tell a tale.", "Once.\n\nThe end.")]


def test_self_instruct_takes_the_end_of_text_off_a_completion(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Red or blue?\n", "completion": " blue<|endoftext|>"},
        {"prompt": "One?", "completion": "<|endoftext|> is a token.<|endoftext|>"},
        {"prompt": "Two?", "completion": "2\n"},
    ]
    assert read(tmp_path, self_instruct.DATASET, *rows) == [
        pair("rows.jsonl:1", "Red or blue?\n", " blue"),
        pair("rows.jsonl:2", "One?", "<|endoftext|> is a token."),
        pair("rows.jsonl:3", "Two?", "2\n"),
    ]


def test_self_instruct_makes_an_example_of_each_instance_of_a_task(tmp_path: Path) -> None:
    instances = [{"input": "", "output": "Hi"}, {"input": "to Ann\n", "output": "Hi, Ann"}]
    row = {"id": "seed_task_0", "instruction": "Greet.", "instances": instances, "is_classification": False}
    assert read(tmp_path, self_instruct.DATASET, row) == [
        pair("rows.jsonl:1: instances[0]", "Greet.\n\n", "Hi"),
        pair("rows.jsonl:1: instances[1]", "Greet.\n\nto Ann\n\n\n", "Hi, Ann"),
    ]


def test_unnatural_instructions_give_instances_and_then_reformulations(tmp_path: Path) -> None:
    instance = {"instruction_with_input": "Add.\n1 2", "input": "1 2", "constraints": "None.", "output": "3"}
    again = {"instruction": "Sum up.", "instruction_with_input": "Sum up.\n1 2", "input": "1 2", "output": "It is 3"}
    core = {"instruction": "Add.", "instances": [instance, {**instance, "output": "three"}]}
    rows = [core, {**core, "reformulations": [again]}, {**core, "reformulations": None}, {**core, "reformulations": []}]
    for dataset in (unnatural_instructions.DATASET, unnatural_instructions.FULL):
        found = read(tmp_path, dataset, *rows)
        twice = [
            [pair(f"rows.jsonl:{line}: instances[{i}]", "Add.\n1 2", ("3", "three")[i]) for i in range(2)]
            for line in (1, 2, 3, 4)
        ]
        extra = pair("rows.jsonl:2: reformulations[0]", "Sum up.\n1 2", "It is 3")
        assert found == [*twice[0], *twice[1], extra, *twice[2], *twice[3]]


def test_hh_rlhf_is_the_chosen_conversation_to_the_letter(tmp_path: Path) -> None:
    chosen = "\n\nHuman:  Hi \n\nAssistant: Human: no.\nAssistant: yes\n\n\n\nHuman: \nSo?\n\nAssistant: Bye\n"
    assert read(tmp_path, hh_rlhf.DATASET, {"chosen": chosen, "rejected": "anything"}) == [
        (
            "rows.jsonl:1",
            None,
            [
                ("user", " Hi "),
                ("assistant", "Human: no.\nAssistant: yes\n\n"),
                ("user", "\nSo?"),
                ("assistant", "Bye\n"),
            ],
        )
    ]


def test_chip2_is_cut_where_a_line_begins_with_a_speaker(tmp_path: Path) -> None:
    text = "<human>: Say <bot>: twice\n\n<bot>: It\nis <human>: said\n<human>: So?\n<bot>: So."
    assert read(tmp_path, chip2.DATASET, {"text": text, "metadata": {"source": "unified_chip2"}}) == [
        (
            "rows.jsonl:1",
            None,
            [
                ("user", "Say <bot>: twice\n"),
                ("assistant", "It\nis <human>: said"),
                ("user", "So?"),
                ("assistant", "So."),
            ],
        )
    ]


@pytest.mark.parametrize("between", ["", " ", "\n"], ids=["nothing", "space", "line end"])
def test_guanacos_text_is_cut_at_its_markers_and_ends_with_an_answer(tmp_path: Path, between: str) -> None:
    turns = ["### Human: Is #### Human: so?", "### Assistant: No. \n.", "### Human: Why?", "### Assistant: So.\n"]
    said = [("user", "Is #### Human: so?"), ("assistant", "No. \n."), ("user", "Why?"), ("assistant", "So.\n")]
    rows = [{"text": between.join(turns[:count])} for count in (2, 3, 4)]
    # The question at the end of the second row has no answer to train.
    assert read(tmp_path, oasst1.DATASET, *rows) == [
        ("rows.jsonl:1", None, said[:2]),
        ("rows.jsonl:2", None, said[:2]),
        ("rows.jsonl:3", None, said),
    ]


def test_guanacos_prompts_are_joined_with_their_replies(tmp_path: Path) -> None:
    row = {
        "input": "### Human: Hi ### Assistant: Ho ### Human: So? ### Assistant:",
        "output": "As ### Human: said.",
        "prompt": "A chat. ### Human: Hi ### Assistant:",
        "text": "### Human: Hi ### Assistant:",
    }
    assert read(tmp_path, oasst1.DATASET, row, {**row, "input": "### Human: Hi\n### Assistant: "}) == [
        (
            "rows.jsonl:1",
            None,
            [("user", "Hi"), ("assistant", "Ho"), ("user", "So?"), ("assistant", "As ### Human: said.")],
        ),
        ("rows.jsonl:2", None, [("user", "Hi"), ("assistant", "As ### Human: said.")]),
    ]


def message(role: str, text: str, *replies: object, **more: object) -> dict[str, Any]:
    return {"role": role, "text": text, "lang": "en", "replies": list(replies), **more}


def tree(prompt: object, *, state: str = "ready_for_export") -> dict[str, object]:
    return {"message_tree_id": "x", "tree_state": state, "prompt": prompt}


def test_a_tree_gives_the_thread_of_its_best_replies(tmp_path: Path) -> None:
    best = message(
        "assistant",
        "best",
        message("prompter", "first", message("assistant", "unranked"), message("assistant", "ranked", rank=7)),
        message("prompter", "second", message("assistant", "never")),
        rank=0,
    )
    worse = message("assistant", "worse", rank=1)
    unranked = [message("assistant", text, rank=None) for text in ("one", "two")]
    asked = [("user", "Q")]
    threads = [
        ((worse, best, *unranked), [("assistant", "best"), ("user", "first"), ("assistant", "ranked")]),
        ((*unranked, worse), [("assistant", "worse")]),
        ((*unranked,), [("assistant", "one")]),
    ]
    rows = [tree(message("prompter", "Q", *replies)) for replies, _ in threads]
    assert read(tmp_path, oasst1.DATASET, *rows) == [
        (f"rows.jsonl:{line}", None, asked + said) for line, (_, said) in enumerate(threads, start=1)
    ]


def test_a_tree_ends_with_its_last_answer_and_leaves_out_what_was_removed(tmp_path: Path) -> None:
    after = message("prompter", "nobody answered")
    replies = [
        message("assistant", "deleted", after, rank=0, deleted=True),
        message("assistant", "spam", after, rank=1, review_result=False),
        message("assistant", "kept", after, rank=2, deleted=False, review_result=None, synthetic=True, lang="de"),
    ]
    rows = [
        tree(message("prompter", "Q", *replies, deleted=None, review_result=True)),
        tree(message("prompter", "Q", *replies, deleted=True)),
        tree(message("prompter", "Q", *replies, review_result=False)),
        tree(message("prompter", "Q", *replies[:2])),
        tree(message("prompter", "Q")),
        tree(message("prompter", "Q", *replies), state="aborted_low_grade"),
    ]
    assert read(tmp_path, oasst1.DATASET, *rows) == [("rows.jsonl:1", None, [("user", "Q"), ("assistant", "kept")])]


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("name", [name for name in SOURCES if name != "jsonl"])
def test_rows_of_any_kind_of_file_become_the_same(tmp_path: Path, name: str, ending: str) -> None:
    source = SOURCES[name]
    rng = random.Random(0)
    rows = [source.rows.good(rng) for _ in range(9)]
    path = write_table(tmp_path / f"rows{ending}", rows)
    wanted = [said for _, _, said in read(tmp_path, source.dataset, *rows)]
    assert [said for _, _, said in told(source.dataset.read(path))] == wanted
    assert len(wanted) >= len(rows)


TASK = {"instruction": "Add.", "instances": [{"input": "", "output": "3", "instruction_with_input": "Add."}]}
ANSWER = message("assistant", "A")


def _guanaco(text: str) -> tuple[Dataset, object]:
    return oasst1.DATASET, {"text": text}


REFUSED: dict[str, tuple[Dataset, object]] = {
    'field "input" is missing (row has "instruction", "output")': (
        alpaca.DATASET, {"instruction": "a", "output": "b"}
    ),
    'field "targets" is empty': (flan_v2.DATASET, {"inputs": "a", "targets": " "}),
    'field "output" is null, not text': (longform.DATASET, {"input": "a", "output": None}),
    'field "completion" is empty but for <|endoftext|>': (
        self_instruct.DATASET, {"prompt": "a", "completion": " <|endoftext|>"}
    ),
    'field "prompt" is missing (row has "question")': (self_instruct.DATASET, {"question": "a"}),
    'field "instances" is empty': (self_instruct.DATASET, {**TASK, "instances": []}),
    'field "instances" is text, not an array': (self_instruct.DATASET, {**TASK, "instances": "a"}),
    'field "instances[0]" is null, not an object': (self_instruct.DATASET, {**TASK, "instances": [None]}),
    'instances[1]: field "output" is missing (row has "input")': (
        self_instruct.DATASET, {**TASK, "instances": [*TASK["instances"], {"input": "a"}]}
    ),
    'field "instances" is missing (row has "instruction")': (unnatural_instructions.DATASET, {"instruction": "a"}),
    'reformulations[0]: field "instruction_with_input" is missing (row has no fields)': (
        unnatural_instructions.FULL, {**TASK, "reformulations": [{}]}
    ),
    'field "chosen" is missing (row has "rejected")': (hh_rlhf.DATASET, {"rejected": "\n\nHuman: a"}),
    'field "chosen" does not begin with a turn of "Human"': (
        hh_rlhf.DATASET, {"chosen": "Human: a\n\nAssistant: b"}
    ),
    'field "chosen" has two turns of "Human" after each other, 3 and 4': (
        hh_rlhf.DATASET, {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nHuman: d"}
    ),
    'field "chosen" is empty in turn 2, of "Assistant"': (
        hh_rlhf.DATASET, {"chosen": "\n\nHuman: a\n\nAssistant:\n\nHuman: c\n\nAssistant: d"}
    ),
    'field "chosen" has no space after the marker of turn 2, of "Assistant"': (
        hh_rlhf.DATASET, {"chosen": "\n\nHuman: a\n\nAssistant:b"}
    ),
    'field "chosen" ends with the human\'s turn, and the last word must be the assistant\'s': (
        hh_rlhf.DATASET, {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"}
    ),
    'field "text" ends with the human\'s turn, and the last word must be the assistant\'s': (
        chip2.DATASET, {"text": "<human>: a"}
    ),
    'field "text" does not begin with a turn of "human"': (chip2.DATASET, {"text": "<bot>: a\n<human>: b"}),
    'field "text" does not begin with a turn of "Human"': _guanaco("A chat. ### Human: a### Assistant: b"),
    'field "text" has no turn of "Assistant"': _guanaco("### Human: a"),
    'field "text" is empty in turn 2, of "Assistant"': _guanaco("### Human: a### Assistant: ### Human: b"),
    'field "text" is missing (row has "message_id")': (oasst1.DATASET, {"message_id": "a"}),
    'field "input" does not end with "### Assistant:"': (oasst1.DATASET, {"input": "### Human: a", "output": "b"}),
    'field "input" has two turns of "Assistant" after each other at its end': (
        oasst1.DATASET, {"input": "### Human: a### Assistant: b### Assistant:", "output": "b"}
    ),
    'field "tree_state" is missing (row has "message_tree_id")': (oasst1.DATASET, {"message_tree_id": "a"}),
    'field "prompt" is missing (row has "message_tree_id", "tree_state", "text")': (
        oasst1.DATASET, {"message_tree_id": "a", "tree_state": "ready_for_export", "text": "one message of a tree"}
    ),
    'field "prompt" is text, not an object': (oasst1.DATASET, tree("Q")),
    'prompt: field "role" is "assistant", and this is the other\'s turn': (oasst1.DATASET, tree(ANSWER)),
    'prompt: replies[0]: field "role" is neither "prompter" nor "assistant"': (
        oasst1.DATASET, tree(message("prompter", "Q", message("system", "A")))
    ),
    'prompt: replies[0]: field "text" is empty': (
        oasst1.DATASET, tree(message("prompter", "Q", message("assistant", "")))
    ),
    'prompt: replies[1]: field "rank" is text, not a whole number': (
        oasst1.DATASET, tree(message("prompter", "Q", ANSWER, {**ANSWER, "rank": "0"}))
    ),
    'prompt: replies[0]: field "deleted" is a number, not true or false': (
        oasst1.DATASET, tree(message("prompter", "Q", {**ANSWER, "deleted": 1}))
    ),
    'prompt: field "replies" is missing (row has "role", "text")': (
        oasst1.DATASET, tree({"role": "prompter", "text": "Q"})
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_a_row_that_is_not_of_the_schema_is_refused_by_name(tmp_path: Path, reason: str) -> None:
    dataset, row = REFUSED[reason]
    assert refused(tmp_path, dataset, row) == f"rows.jsonl:1: {reason}"
