"""Model cards: what a folder says of itself, and nothing about the machine it was made on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_formats.commit import commit_folder
from qlora_formats.errors import FormatError
from qlora_pipe.model_card import folder_kind, model_card

ADAPTER = {"r": 8, "lora_alpha": 16.0, "task_type": "CAUSAL_LM", "base_model_name_or_path": "someone/base"}
STORE = {"quantization_config": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}


def make(
    folder: Path,
    *,
    config: Mapping[str, Any],
    kind: str = "",
    inputs: Mapping[str, Any] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """A folder of one config file: finished by us if a kind is given, otherwise a stranger's."""
    name = "adapter_config.json" if "r" in config else "config.json"
    if kind:
        with commit_folder(folder, kind=kind, inputs=inputs or {}) as work:
            work.write(name, json.dumps(config).encode())
            work.finish(fields)
    else:
        folder.mkdir()
        (folder / name).write_text(json.dumps(config))
    return folder


def front_matter(card: str) -> dict[str, Any]:
    before, front, _ = card.split("---\n", 2)
    assert before == ""
    parsed: dict[str, Any] = yaml.safe_load(front)
    return parsed


def test_an_adapters_card_names_base_library_and_settings(tmp_path: Path) -> None:
    settings = {"rank": 8, "learning_rate": 0.0002, "dtype": "bfloat16", "data": "jsonl:/home/me/rows.jsonl"}
    folder = make(tmp_path / "out", config=ADAPTER, kind="adapter", inputs={"settings": settings})
    card = model_card(folder, repo="me/tuned")
    assert front_matter(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "someone/base",
        "base_model_relation": "adapter",
        "tags": ["lora", "qlora-pipe"],
    }
    assert "# tuned\n\nA LoRA adapter of `someone/base` (rank 8, alpha 16), in PEFT's layout.\n" in card
    assert "| dtype | bfloat16 |\n| learning_rate | 0.0002 |\n| rank | 8 |\n" in card
    assert 'PeftModel.from_pretrained(base, "me/tuned")' in card
    assert "/home/me" not in card


@pytest.mark.parametrize("name", [None, "stories260K", "/home/me/base", "../models/base", "a/b/c", "me/base\n# x"])
def test_a_base_that_is_no_hub_id_is_not_linked(tmp_path: Path, name: str | None) -> None:
    card = model_card(make(tmp_path / "out", config=ADAPTER | {"base_model_name_or_path": name}), repo="me/tuned")
    assert front_matter(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert name is None or name not in card


def test_a_stores_card_names_type_and_source(tmp_path: Path) -> None:
    inputs = {
        "source": {"repo": "someone/base", "revision": "0" * 40},
        "settings": {"double_quant": True, "block_size": 64},
    }
    card = model_card(make(tmp_path / "out", config=STORE, kind="store", inputs=inputs), repo="me/base-nf4")
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "someone/base",
        "base_model_relation": "quantized",
        "tags": ["qlora", "nf4", "4-bit", "bitsandbytes", "qlora-pipe"],
    }
    assert "in 4 bits (nf4, its scales quantised again to 8 bits)" in card
    assert "| block_size | 64 |\n| double_quant | true |\n" in card


def test_the_card_of_a_store_that_is_bound_to_an_adapter_says_so(tmp_path: Path) -> None:
    fields = {"bound_adapter": {"method": "loftq", "rank": 16, "iterations": 5}}
    card = model_card(make(tmp_path / "bound", config=STORE, kind="store", fields=fields), repo="me/base")
    assert "quantised for an adapter beside them (loftq, rank 16, 5 iterations): use them with it" in card
    assert "adapter" not in model_card(make(tmp_path / "plain", config=STORE, kind="store"), repo="me/base")


def test_a_merged_checkpoints_card_says_so_and_a_strangers_does_not(tmp_path: Path) -> None:
    inputs = {"base": {"repo": "someone/base"}, "adapter": {}, "settings": {"dtype": "bfloat16"}}
    merged = model_card(make(tmp_path / "merged", config={}, kind="checkpoint", inputs=inputs), repo="me/merged")
    assert front_matter(merged)["base_model_relation"] == "finetune"
    assert "The weights of `someone/base` with a LoRA adapter merged into them" in merged
    strange = model_card(make(tmp_path / "strange", config={"is_encoder_decoder": True}), repo="me/strange")
    assert "merged" not in strange
    assert "Made with" not in strange
    assert "AutoModelForSeq2SeqLM" in strange
    assert front_matter(strange) == {"library_name": "transformers", "tags": ["qlora-pipe"]}


@pytest.mark.parametrize(
    ("readme", "kept"),
    [
        ("---\nlicense: apache-2.0\nlicense_link: 7\ntags: [x]\n---\ntext\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: n\n---\n", {"license": "other", "license_name": "n"}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n: : :\n\t-\n---\n", {}),
        ("# no front matter\n", {}),
    ],
)
def test_the_licence_is_the_one_the_folder_declares(tmp_path: Path, readme: str, kept: dict[str, str]) -> None:
    folder = make(tmp_path / "out", config=ADAPTER)
    (folder / "README.md").write_text(readme)
    front = front_matter(model_card(folder, repo="me/tuned"))
    assert {key: value for key, value in front.items() if key.startswith("license")} == kept


def test_the_same_folder_gives_the_same_card_wherever_it_lies(tmp_path: Path) -> None:
    one = make(tmp_path / "one", config=ADAPTER, kind="adapter", inputs={"settings": {"seed": 3}})
    other = make(tmp_path / "other", config=ADAPTER, kind="adapter", inputs={"settings": {"seed": 3}})
    assert model_card(one, repo="me/tuned") == model_card(other, repo="me/tuned")
    assert str(tmp_path) not in model_card(one, repo="me/tuned")


def test_a_folder_is_known_by_its_files(tmp_path: Path) -> None:
    assert folder_kind(make(tmp_path / "a", config=ADAPTER)) == "adapter"
    assert folder_kind(make(tmp_path / "s", config=STORE)) == "store"
    assert folder_kind(make(tmp_path / "c", config={})) == "checkpoint"
    (tmp_path / "n").mkdir()
    assert folder_kind(tmp_path / "n") is None
    (tmp_path / "c" / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json is not valid JSON"):
        folder_kind(tmp_path / "c")
