"""Samples of the instruction datasets: what rows become, which are bad, and that all train."""

import json
import math
from pathlib import Path

import pytest

from qlora_pipe.cli import execute
from qlora_pipe.dataset import Dataset, Example
from qlora_pipe.errors import DataError
from qlora_pipe.plugins import find_dataset, load_plugins
from qlora_pipe.rows import BadRow
from tests.pipe.runs import metrics, small_checkpoint

# Of each sample: the dataset, its rows, the examples they give, and the reasons of the rows that can't be used.
SAMPLES: dict[str, tuple[str, int, int, list[str]]] = {
    "alpaca/alpaca_schema_from_seed_tasks_175.json": ("alpaca", 175, 175, []),
    "chip2/chip2_schema_converted.jsonl": ("chip2", 21, 21, []),
    **{
        f"flan_v2/cot_data/{name}_train_200.tsv": ("flan-v2", 200, 200, [])
        for name in ("aqua", "creak", "gsm8k", "qasc", "sensemaking", "strategyqa")
    },
    "flan_v2/flan_v2_schema_derived_360.jsonl": ("flan-v2", 360, 360, []),
    "hh_rlhf/hh_schema_from_oasst_trees.jsonl": (
        # An answer in row 69 shows a dialogue as an example, with the marker in it.
        *("hh-rlhf", 100, 99),
        [":69: field \"chosen\" ends with the human's turn, and the last word must be the assistant's"],
    ),
    "longform/longform_schema_made_100.json": ("longform", 100, 100, []),
    "oasst1/en_100_tree.jsonl": ("oasst1", 100, 100, []),
    "oasst1/guanaco_text_300_derived.jsonl": ("oasst1", 300, 300, []),
    "oasst1/oa_questions_300.jsonl": ("oasst1", 300, 300, []),
    "self_instruct/seed_tasks.jsonl": ("self-instruct", 175, 175, []),
    "self_instruct/t0_prompt_completion_sample.jsonl": (
        *("self-instruct", 400, 397),
        [f':{line}: field "completion" is empty but for <|endoftext|>' for line in (102, 103, 104)],
    ),
    "self_instruct/user_oriented_instructions.jsonl": ("self-instruct", 252, 252, []),
    "unnatural_instructions/core_schema_converted_200.jsonl": ("unnatural-instructions", 200, 200, []),
    "unnatural_instructions/full_schema_converted_60.jsonl": ("unnatural-instructions-full", 60, 120, []),
}


def dataset_of(sample: str) -> Dataset:
    return find_dataset(load_plugins(), SAMPLES[sample][0])


def examples_of(dataset: Dataset, path: Path) -> tuple[int, list[Example], list[str]]:
    """The number of rows, the examples of those that can be used, and the reasons of the others."""
    count, examples, reasons = 0, list[Example](), list[str]()
    for count, row in enumerate(dataset.rows(path), start=1):  # noqa: B007  the last number counts
        if isinstance(row, BadRow):
            reasons.append(row.reason)
            continue
        try:
            found = dataset.example(row)
            examples.extend([found] if isinstance(found, Example) else found)
        except DataError as fault:
            reasons.append(str(fault))
    return count, examples, reasons


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_row_of_a_sample_is_read_or_named(shared_data: Path, sample: str) -> None:
    path = shared_data / "datasets" / sample
    _, rows, examples, reasons = SAMPLES[sample]
    count, found, bad = examples_of(dataset_of(sample), path)
    assert (count, len(found), bad) == (rows, examples, [f"{path.name}{reason}" for reason in reasons])
    assert all(example.messages[-1].role == "assistant" for example in found)


CHRISTMAS = [
    "How many days until christmas?",
    "Today's date is the 5th of February 2023. So there are 322 days until Christmas.",
]
CPP = [
    "How do I output a string in C++ programming?",
    "You can output strings in many ways one of the simplest methods is :\n```cout << string```",
    "Can you extend the example so that I can copy it into a text file and run it?",
    "Sure, here's an example:\n```\n#include <iostream>\n#include <string>\n\nint main() {\n"
    '  std::string str = "Hello, World!";\n  std::cout << str << std::endl;\n  return 0;\n}\n```\n'
    "Save the code to a file with a `.cpp` extension, then compile and run it using a C++ compiler.",
]
ZERO = [
    "Чему равен абсолютный ноль?",
    "Абсолютному нулю соответствует температура −273,15 °C (по шкале Цельсия) или −459,67 °F (по Фаренгейту).",
]
TRANSLATE = [
    "把这句话翻译一下",
    "请问你要翻译哪一句话呢？",
    "Guten Morgen! Wie kann ich Ihnen helfen?",
    "这句话翻译成中文是：早上好！我能帮您做什么？",
]
SYNONYMS = (
    "Desk jobs require writing a lot of emails, so it isn't surprising we get tired of repeating ourselves."
    " Come up with several synonyms for the given word."
)
CHEERS = "Best regards, All the best, Cheers, Best"
PAIRS = "What is the relation between the given pairs?"
OPPOSITES = "The relation between the given pairs is that they are opposites."
ODD = "I am an odd number. Take away one letter and I become even. What number am I?"
LOGIC = (
    "Here's a logic test: Mike was snowboarding on the snow and hit a piece of ice. He went much faster on the ice"
    ' because _____ is smoother. (A) snow (B) ice\n\nChoose the answer between "ice" and "snow".\n'
)
CHILDREN = [
    "How do living things have children?\nOptions:\n- (A) death\n- (B) people\n- (C) humans\n- (D) babies\n"
    "- (E) it needs them\n- (F) reproduction\n- (G) mitosis\n- (H) production",
    "Reproduction is the process by which living things give rise to offspring. Seed refers to offspring, children."
    " Living things use reproduction to have children. So the final answer is (F).",
]
PLAY = [
    "Write a passage of a play in the style of Shakespeare that begins with Marcius speaking.",
    "MARCIUS:\nThy friend no less\nThan those she placeth highest! So, farewell.\n\n"
    "LARTIUS:\nThou worthiest Marcius!\nGo, sound thy trumpet in the market-place;\n"
    "Call thither all the officers o' the town,\nWhere they shall know our mind: away!\n\n"
    "COMINIUS:\nBreathe you, my friends: well fought;\nwe are come off\nLike Romans, neither foolish in our stands,\n"
    "Nor cowardly in retire: believe me, sirs,\nWe shall be charged again. Whiles we have struck,\n"
    "By interims and conveying gusts we have heard\nThe charges of our friends. Ye Roman gods!\n"
    "Lead their successes as we wish our own,\nThat both our powers, with smiling\nfronts encountering,\n"
    "May give you thankful sacrifice.\nThy news?\n\n"
    "Messenger:\nThe citizens of Corioli have issued,\nAnd given to Lartius and to Marcius battle:\n"
    "I saw our party to their trenches driven,\nAnd then I came away.\n\n"
    "COMINIUS:\nThough thou speak'st truth,\nMethinks thou speak'st not well.\nHow long is't since?",
]
# What is said in turn in some rows, the user first: the sample, the place in it, the form, the texts.
ROWS: list[tuple[str, str, str | None, list[str]]] = [
    ("alpaca/alpaca_schema_from_seed_tasks_175.json", ":7", "alpaca", [
        f"{PAIRS}\n\n### Input:\nNight : Day :: Right : Left", OPPOSITES
    ]),
    ("alpaca/alpaca_schema_from_seed_tasks_175.json", ":107", "alpaca", [
        "Create a fun math question for children.", ODD
    ]),
    ("chip2/chip2_schema_converted.jsonl", ":3", None, [
        "Should I go to the movies or to the theatre tonight?",
        "It depends on what you're in the mood for. If you want to watch a movie, then the cinema is probably your best"
        " bet. But if you want to experience live theatre, then the theatre might be more up your alley.",
    ]),
    ("chip2/chip2_schema_converted.jsonl", ":9", None, [
        "When did the nuclear disaster at Chernobyl happen?",
        "The Chernobyl nuclear power plant accident happened on April 26, 1986. It was the worst nuclear disaster in"
        " history, and it is still considered to be one of the worst man-made disasters in history.",
    ]),
    ("flan_v2/cot_data/qasc_train_200.tsv", ":3", "plain", CHILDREN),
    ("flan_v2/cot_data/creak_train_200.tsv", ":2", "plain", [
        '"Marlboro used iconic imagery to promote its brand."\nIs the above claim true?\nOptions:\n- yes\n- no',
        "Marlboro (cigarette) is used cowboys as an advertising campaign. So the final answer is yes.",
    ]),
    ("flan_v2/flan_v2_schema_derived_360.jsonl", ":3", "plain", CHILDREN),
    ("hh_rlhf/hh_schema_from_oasst_trees.jsonl", ":28", None, CHRISTMAS),
    ("hh_rlhf/hh_schema_from_oasst_trees.jsonl", ":65", None, CPP),
    ("longform/longform_schema_made_100.json", ":140", "plain", PLAY),
    ("oasst1/en_100_tree.jsonl", ":28", None, CHRISTMAS),
    ("oasst1/en_100_tree.jsonl", ":50", None, ["hello!", "Hi there! How can I help you on this beautiful day? ☀️"]),
    ("oasst1/en_100_tree.jsonl", ":65", None, CPP),
    ("oasst1/guanaco_text_300_derived.jsonl", ":14", None, ZERO),
    ("oasst1/guanaco_text_300_derived.jsonl", ":272", None, TRANSLATE),
    ("oasst1/oa_questions_300.jsonl", ":14", None, ZERO),
    ("oasst1/oa_questions_300.jsonl", ":272", None, TRANSLATE),
    ("self_instruct/seed_tasks.jsonl", ":2: instances[0]", "plain", [
        f"{PAIRS}\n\nNight : Day :: Right : Left\n\n", OPPOSITES
    ]),
    ("self_instruct/seed_tasks.jsonl", ":22: instances[0]", "plain", [
        "Create a fun math question for children.\n\n", ODD
    ]),
    ("self_instruct/t0_prompt_completion_sample.jsonl", ":10", "plain", [LOGIC, "snow"]),
    ("self_instruct/user_oriented_instructions.jsonl", ":5: instances[0]", "plain", [
        f"{SYNONYMS}\n\nSincerely\n\n", CHEERS
    ]),
    ("unnatural_instructions/core_schema_converted_200.jsonl", ":5: instances[0]", "plain", [
        f"{SYNONYMS}\nSincerely", CHEERS
    ]),
    ("unnatural_instructions/full_schema_converted_60.jsonl", ":5: instances[0]", "plain", [
        f"{SYNONYMS}\nSincerely", CHEERS
    ]),
    ("unnatural_instructions/full_schema_converted_60.jsonl", ":5: reformulations[0]", "plain", [
        f"Do the following. {SYNONYMS}\nSincerely", CHEERS
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("sample", "place", "form", "said"), ROWS, ids=[f"{row[0]}{row[1]}" for row in ROWS])
def test_a_row_becomes_what_a_reader_sees_in_it(
    shared_data: Path, sample: str, place: str, form: str | None, said: list[str]
) -> None:
    path = shared_data / "datasets" / sample
    _, examples, _ = examples_of(dataset_of(sample), path)
    (example,) = (item for item in examples if item.origin == f"{path.name}{place}")
    assert example.form == form
    assert [message.content for message in example.messages] == said
    assert [message.role for message in example.messages] == ["user", "assistant"] * (len(said) // 2)


def test_thoughts_become_what_was_derived_of_them(shared_data: Path) -> None:
    folder = shared_data / "datasets" / "flan_v2"
    dataset = find_dataset(load_plugins(), "flan-v2")
    derived = [example.messages for example in dataset.read(folder / "flan_v2_schema_derived_360.jsonl")]
    thoughts = {example.messages for example in dataset.read(folder / "cot_data")}
    assert len(derived) == 360
    assert set(derived) <= thoughts


def test_guanacos_texts_say_what_its_prompts_and_replies_say(shared_data: Path) -> None:
    folder = shared_data / "datasets" / "oasst1"
    dataset = find_dataset(load_plugins(), "oasst1")
    texts, pairs = (
        [example.messages for example in dataset.read(folder / name)]
        for name in ("guanaco_text_300_derived.jsonl", "oa_questions_300.jsonl")
    )
    assert texts == pairs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    assert execute(["quantize", str(small_checkpoint(folder / "base")), str(folder / "store")]) == 0
    return folder / "store"


def shortest(path: Path, folder: Path, *, count: int) -> Path:
    """The shortest rows of a sample, in a file of the same form."""
    text = path.read_text()
    kept = folder / path.name
    if path.suffix == ".json":
        rows = sorted(json.loads(text), key=lambda row: len(json.dumps(row)))
        kept.write_text(json.dumps(rows[:count]))
    else:
        kept.write_text("\n".join(sorted(text.splitlines(), key=len)[:count]))
    return kept


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_trains(shared_data: Path, tmp_path: Path, store: Path, sample: str) -> None:
    rows = shortest(shared_data / "datasets" / sample, tmp_path, count=8)
    line = f"finetune {store} --data {SAMPLES[sample][0]}:{rows} --out {tmp_path / 'run'} --steps 3 --batch-size 2"
    assert execute([*line.split(), "--max-tokens", "2048", "--rank", "2", "--learning-rate", "1e-2"]) == 0
    losses = [step["loss"] for step in metrics(tmp_path / "run")]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
