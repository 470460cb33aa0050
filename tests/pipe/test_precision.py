"""What is quantised and what is kept: by the architecture, a plugin's word, and the user's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_formats.manifest import Manifest
from qlora_formats.store import Store
from qlora_pipe.artifacts import Checkpoint
from qlora_pipe.cli import execute
from qlora_pipe.config import QuantizeConfig
from qlora_pipe.errors import ConfigError
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.precision import choose_precision
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.testing import tiny_checkpoint

QUANTISABLE = 14


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "source")


def kept(source: Path, *keep: str, plugin: object | None = None, kind: str = "nf4") -> list[str]:
    manager = load_plugins(*([plugin] if plugin else []))
    chosen = choose_precision(
        Checkpoint.open(source).weights.names,
        find_architecture(manager, "llama"),
        model_type="llama",
        kind=kind,
        keep=keep,
        manager=manager,
    )
    assert len(chosen.quantized) + len(chosen.kept) == QUANTISABLE
    return sorted(chosen.kept)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("down_proj", 2),
        ("layers.1", 7),
        ("model.layers.1", 7),
        ("layers.*.mlp", 6),
        ("model.layers.0.self_attn.q_proj.weight", 1),
        ("self_attn.*_proj", 8),
        ("model", 14),
    ],
)
def test_a_pattern_names_whole_components_anywhere_in_a_name(source: Path, pattern: str, count: int) -> None:
    found = kept(source, pattern)
    assert len(found) == count
    assert all(pattern.split(".", maxsplit=1)[0].strip("*") in name for name in found)


@pytest.mark.parametrize("pattern", ["proj", "layer", "layers.2", "lm_head", "norm", "mlp.*.weight.x", ""])
def test_a_pattern_that_keeps_nothing_is_refused_with_an_example(source: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"matches none of the weights .* such as model\.layers"):
        kept(source, "down_proj", pattern)


def test_patterns_may_overlap(source: Path) -> None:
    assert len(kept(source, "layers.0", "down_proj", "down_proj")) == 8


class Plugin:
    """Answers as it was told; the tensors it was asked about are remembered."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str]] = []

    @hookimpl
    def choose_precision(self, model_type: str, tensor: str) -> str | None:
        self.asked.append((model_type, tensor))
        return self.answers.get(tensor)


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_plugin_keeps_what_the_architecture_would_quantise(source: Path) -> None:
    plugin = Plugin({NAME: "keep", "model.embed_tokens.weight": "keep"})
    assert kept(source, plugin=plugin) == [NAME]
    assert {kind for kind, _ in plugin.asked} == {"llama"}
    assert len(plugin.asked) == len(load_file(source / "model.safetensors"))


def test_the_users_word_comes_before_a_plugins(source: Path) -> None:
    assert kept(source, "layers.1.mlp.up_proj", plugin=Plugin({NAME: "nf4"})) == [NAME]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({NAME: "int8"}, f"answered 'int8' for {NAME}; here it may answer 'fp4', 'keep' or None"),
        ({NAME: "nf4"}, "answered 'nf4'"),
        ({"model.embed_tokens.weight": "fp4"}, "asked for model.embed_tokens.weight in 4 bits, which llama models"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(source: Path, answers: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kept(source, plugin=Plugin(answers), kind="fp4")


def test_what_is_kept_stays_bit_for_bit_and_is_said_where_readers_look(source: Path, tmp_path: Path) -> None:
    words = ["--keep", "layers.0", "--keep", "down_proj"]
    assert execute(["quantize", str(source), str(tmp_path / "store"), *words]) == 0
    store, exact = Store.open(tmp_path / "store"), load_file(source / "model.safetensors")
    names = Manifest.read(tmp_path / "store").inputs["kept"]
    assert len(names) == 8
    for name in names:
        weight = store.weight(name)
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(weight, exact[name])
    skipped = store.config["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == ["lm_head", *(name.removesuffix(".weight") for name in names)]


def test_the_same_choice_in_other_words_is_the_same_store(source: Path, tmp_path: Path) -> None:
    one = quantize(
        Checkpoint.open(source),
        tmp_path / "store",
        QuantizeConfig(keep=("layers.1.mlp.up_proj",)),
        manager=load_plugins(),
    )
    again = quantize(
        Checkpoint.open(source), tmp_path / "store", QuantizeConfig(), manager=load_plugins(Plugin({NAME: "keep"}))
    )
    assert not one.already_done
    assert again.already_done


def test_keeping_everything_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["quantize", str(source), str(tmp_path / "store"), "--keep", "model"]) == 65
    assert "holds no weight that the llama plugin would quantise" in capsys.readouterr().err
