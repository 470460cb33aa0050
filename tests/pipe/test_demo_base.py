"""The embedded base model and dataset are small, whole, true, and what their generators make."""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

import qlora_pipe.demo
from qlora_formats.checkpoint import CheckpointFolder
from qlora_pipe.demo import rebuild
from qlora_pipe.demo.corpus import tales
from qlora_pipe.demo.pretrain import Recipe, batches, mean_loss, new_model, pretrain
from qlora_pipe.demo.skill import QUESTIONS, Row, as_jsonl, rows
from qlora_pipe.demo.tokenization import BOS_ID, learn_tokenizer
from qlora_pipe.plugins import find_architecture, find_dataset, load_plugins

DEMO = Path(qlora_pipe.demo.__file__).parent
BASE, SKILL = DEMO / "base", DEMO / "skill.jsonl"
# Each way of saying something, with the names of what it says.
READINGS = [
    re.compile(pattern)
    for pattern in (
        r"At (?P<time>\w+), \w+ (?:met|and) \w+ (?:were )?in the (?P<place>\w+)",
        r"\w+ went to the (?P<place>\w+) at (?P<time>\w+), and \w+ came too",
        r"It was (?P<time>\w+) in the (?P<place>\w+)",
        r"\w+ saw \w+ there",
        r"(?P<giver>\w+) gave a (?P<colour>\w+) (?P<gift>\w+) to (?P<owner>\w+)",
        r"(?P<giver>\w+) gave (?P<owner>\w+) a (?P<colour>\w+) (?P<gift>\w+)",
        r"(?P<owner>\w+) got a (?P<colour>\w+) (?P<gift>\w+) from (?P<giver>\w+)",
        r"(?P<giver>\w+) had a (?P<colour>\w+) (?P<gift>\w+), and (?P<owner>\w+) took it",
        r"(?P<guest>\w+) watched them with a (?P<animal>\w+)",
        r"(?P<guest>\w+) and a (?P<animal>\w+) sat near by",
        r"A (?P<animal>\w+) was there too, and so was (?P<guest>\w+)",
        r"Then (?P<guest>\w+) passed with a (?P<animal>\w+)",
    )
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


def answer_by_reading(prompt: str) -> str:
    """Answer a row's question from its words alone, knowing nothing of the Scene that made it."""
    *sentences, question = prompt.split(". ")
    known: dict[str, str] = {}
    for sentence in sentences:
        (match,) = filter(None, (reading.fullmatch(sentence) for reading in READINGS))
        known |= match.groupdict()
    return known[question.removesuffix("?").split()[-1]]


def test_the_base_model_is_whole_and_at_most_2_mb() -> None:
    files = sorted(path.name for path in BASE.iterdir())
    assert files == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 2_000_000


def test_the_base_model_has_the_tensors_of_its_config() -> None:
    folder = CheckpointFolder.open(BASE)
    architecture = find_architecture(load_plugins(), folder.config["model_type"])
    with torch.device("meta"):
        model = architecture.build(folder.config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name in architecture.ties(folder.config):
        del wanted[name]
    assert {name: folder.info(name).shape for name in folder.names} == wanted
    assert all(folder.tensor(name).isfinite().all() for name in folder.names)
    assert folder.config == rebuild.CONFIG


def test_the_skill_has_unique_rows_that_the_jsonl_dataset_reads() -> None:
    assert SKILL.stat().st_size <= 300_000
    examples = list(find_dataset(load_plugins(), "jsonl").read(SKILL))
    assert len(examples) == rebuild.ROWS
    prompts = {example.messages[0].content for example in examples}
    assert len(prompts) == len(examples)
    for example in examples:
        assert [message.role for message in example.messages] == ["user", "assistant"]


def test_each_answer_follows_from_its_account() -> None:
    for line in SKILL.read_text().splitlines():
        row = Row(**json.loads(line))
        assert re.sub(r"^ (a |the )?", "", row.answer) == answer_by_reading(row.prompt), row.prompt


def test_the_skill_is_what_its_generator_makes() -> None:
    assert SKILL.read_bytes() == as_jsonl(rows(seed=rebuild.SEED, count=rebuild.ROWS))
    assert rows(seed=1, count=3) != rows(seed=2, count=3)


def test_the_corpus_is_the_same_for_the_same_seed_alone() -> None:
    texts = list(tales(seed=3, count=500))
    assert texts == list(tales(seed=3, count=500))
    assert texts != list(tales(seed=4, count=500))


def test_the_corpus_never_asks_the_questions_of_the_skill() -> None:
    asked = re.compile(r"(who|what) was", re.IGNORECASE)
    texts = list(tales(seed=rebuild.SEED, count=5_000))
    assert not [text for text in texts if asked.search(text)]
    # Their words are known all the same: a word never read would be noise to the fine-tuned model, too.
    everything = " ".join(texts)
    for word in {word for question in QUESTIONS for word in re.findall(r"\w+|\?", question)}:
        assert word in everything


def test_the_tokenizer_gives_back_the_corpus_and_any_other_text(tokenizer: Tokenizer) -> None:
    for text in [*tales(seed=9, count=300), "Überraschung, naïve 東京 🙂\t\n  two  spaces", "</s>"]:
        tokenizer.encode_special_tokens = True
        encoding = tokenizer.encode(text)
        assert encoding.ids[0] == BOS_ID
        assert tokenizer.decode(encoding.ids[1:], skip_special_tokens=False) == text


def test_each_word_of_an_answer_is_one_token(tokenizer: Tokenizer) -> None:
    answers = {row.answer for row in rows(seed=rebuild.SEED, count=rebuild.ROWS)}
    assert all(len(tokenizer.encode(answer, add_special_tokens=False).ids) == answer.count(" ") for answer in answers)


def test_learning_the_tokenizer_twice_gives_the_same_bytes() -> None:
    texts = list(tales(seed=5, count=200))
    assert learn_tokenizer(texts, size=400).to_str() == learn_tokenizer(texts, size=400).to_str()


def test_training_repeats_bit_for_bit_and_lowers_the_loss(tokenizer: Tokenizer) -> None:
    architecture = find_architecture(load_plugins(), "llama")
    config = {**rebuild.CONFIG, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8}
    ids = [tokenizer.encode(text).ids for text in tales(seed=6, count=60)]
    fresh = next(batches(ids, size=len(ids), pad_id=0, seed=0))

    def run() -> tuple[dict[str, torch.Tensor], float, float]:
        torch.manual_seed(0)
        model = new_model(architecture, config)
        before = mean_loss(model, *fresh).item()
        losses: list[float] = []
        recipe = Recipe(steps=8, batch_size=8, warmup_steps=1)
        pretrain(model, ids, recipe=recipe, pad_id=0, seed=0, report=lambda _step, loss: losses.append(loss))
        assert len(losses) == 8
        return model.state_dict(), before, mean_loss(model, *fresh).item()

    first, before, after = run()
    second, _, _ = run()
    assert after < before
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=0)


def test_the_rebuild_script_makes_the_files_that_ship_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "STEPS", 2)
    threads = str(torch.get_num_threads())
    done = CliRunner().invoke(rebuild.main, [str(tmp_path / "made"), "--threads", threads], catch_exceptions=False)
    assert done.exit_code == 0
    made = tmp_path / "made"
    assert {path.name for path in (made / "base").iterdir()} == {path.name for path in BASE.iterdir()}
    assert (made / "skill.jsonl").read_bytes() == SKILL.read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (made / "base" / name).read_bytes() == (BASE / name).read_bytes()
    again = CliRunner().invoke(rebuild.main, [str(made)])
    assert again.exit_code == 1
    assert "is not empty" in again.output
