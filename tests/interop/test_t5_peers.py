"""T5 against PEFT, bitsandbytes and transformers: each reads what the other wrote, and the logits are the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM

from qlora_formats.manifest import Manifest
from qlora_pipe.artifacts import Checkpoint, open_model
from qlora_pipe.config import FinetuneConfig, QuantizeConfig
from qlora_pipe.data.batches import IGNORE, Batch
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.adapt import adapters_of
from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.linear import QuantizedLinear
from qlora_pipe.plugins import load_plugins
from qlora_pipe.stages.load import load
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.recompute import RecomputePlan
from qlora_pipe.train.session import adapt
from qlora_plugins.t5 import register_architectures
from tests.interop.peers import in_float32, layers_in_4_bits, our_weights, ours, run, their_weights
from tests.t5_checkpoints import t5_checkpoint

FAMILY = register_architectures()[0]
# Where a block of 64 weights spans rows, the peer's product mixes up their scales on a CPU.
WHOLE_ROWS = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 173}
TARGETS = ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]


def theirs(folder: Path, *, dtype: torch.dtype | None = None) -> Any:
    """A folder as transformers (and bitsandbytes, for a store) load it, with nothing missing and nothing left over."""
    model, report = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval().requires_grad_(False)


def some_inputs() -> Inputs:
    draws = torch.Generator().manual_seed(1)
    ids, source = (torch.randint(259, (2, width), generator=draws) for width in (13, 29))
    return Inputs(ids, source=source, source_lengths=torch.tensor([29, 17]))


def our_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.inference_mode():
        return model.head(model.hidden_of(inputs))


def their_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    assert inputs.source is not None
    mask = (torch.arange(inputs.source.shape[1]) < inputs.source_lengths[:, None]).long()
    logits: Tensor = model(input_ids=inputs.source, attention_mask=mask, decoder_input_ids=inputs.ids).logits
    return logits


def read_by_a_peer(folder: Path, start_id: int = 0) -> tuple[Inputs, dict[str, Tensor]]:
    """What reference logits were computed from: a source, and labels that follow the id a decoder begins with."""
    reference = load_file(folder)
    source, labels = reference["input_ids"], reference["labels"]
    ids = torch.cat((torch.full((1, 1), start_id), labels[:, :-1]), dim=1)
    return Inputs(ids, source=source, source_lengths=torch.tensor([source.shape[1]])), reference


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.dtype == b.dtype == torch.float32
    return float((a - b).abs().max())


def write_answers(path: Path) -> Path:
    rows = [
        {"prompt": f"Tom had {n} red balls. He found one more.", "answer": f"He had {n + 1} red balls."}
        for n in range(2, 60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MakeBase = Callable[[str], Path]


@pytest.fixture(scope="module")
def base_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """A base by its kind: a checkpoint or a store, of random weights or of a real model."""
    folder = tmp_path_factory.mktemp("bases")

    def make(kind: str) -> Path:
        if kind.startswith("real"):
            source: Path = request.getfixturevalue("shared_data") / "models" / "t5-stories-280k"
        else:
            model_type = kind.partition(" ")[0]
            source = folder / model_type
            if not source.exists():
                t5_checkpoint(source, seed=5, model_type=model_type, tie_word_embeddings=False, **WHOLE_ROWS)
        if kind.endswith("16-bit"):
            return source
        store = folder / f"{source.name}-store"
        if not store.exists():
            run("quantize", source, store)
        return store

    return make


KINDS = pytest.mark.parametrize("kind", ["t5 16-bit", "t5 4-bit", "umt5 4-bit", "real 16-bit", "real 4-bit"])


@KINDS
def test_peft_gives_our_logits_with_our_adapter_and_transformers_with_the_merged_model(
    base_of: MakeBase, tmp_path: Path, kind: str
) -> None:
    base, inputs = base_of(kind), some_inputs()
    run(
        "finetune", base, "--data", f"jsonl:{write_answers(tmp_path / 'rows.jsonl')}", "--out", tmp_path / "run",
        "--steps", 5, "--learning-rate", 2e-2, "--batch-size", 3, "--rank", 3, "--alpha", 7,
    )  # fmt: skip
    final = tmp_path / "run" / "final"
    described = json.loads((final / "adapter_config.json").read_text())
    assert (described["task_type"], described["target_modules"]) == ("SEQ_2_SEQ_LM", TARGETS)
    got = our_logits(ours(base, adapter=tmp_path / "run"), inputs)
    assert largest_difference(got, our_logits(ours(base), inputs)) > 0.1, "one that changes so little hides differences"
    adapted = in_float32(PeftModel.from_pretrained(theirs(base), final))
    saved, read = load_file(final / "adapter_model.safetensors"), peft.get_peft_model_state_dict(adapted)
    assert read.keys() == saved.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in saved.items())
    with torch.inference_mode():
        assert largest_difference(got, their_logits(adapted, inputs)) <= 1e-5 * float(got.abs().max())
        run("merge", base, tmp_path / "run", tmp_path / "merged", "--dtype", "float32")
        merged = theirs(tmp_path / "merged", dtype=torch.float32)
        assert largest_difference(got, their_logits(merged, inputs)) <= 1e-5 * float(got.abs().max())
    assert largest_difference(got, our_logits(ours(tmp_path / "merged"), inputs)) <= 1e-5 * float(got.abs().max())


def test_an_adapter_that_peft_trained_gives_its_reference_logits(shared_data: Path) -> None:
    base, adapter = shared_data / "models" / "t5-stories-280k", shared_data / "interop" / "t5-stories-280k-lora-all-r8"
    inputs, reference = read_by_a_peer(adapter / "reference_logits.safetensors")
    assert largest_difference(our_logits(ours(base), inputs), reference["logits_base"]) <= 1e-4
    got = our_logits(ours(base, adapter=adapter), inputs)
    assert largest_difference(got, reference["logits_adapter"]) <= 1e-4


def test_a_random_adapter_of_peft_on_the_layers_that_it_takes_by_itself_gives_its_logits(
    base_of: MakeBase, tmp_path: Path
) -> None:
    base, inputs = base_of("t5 16-bit"), some_inputs()
    torch.manual_seed(1)
    adapted = get_peft_model(theirs(base), LoraConfig(r=4, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    got = our_logits(ours(base, adapter=tmp_path / "adapter"), inputs)
    with torch.inference_mode():
        wanted = their_logits(adapted, inputs)
    assert largest_difference(got, our_logits(ours(base), inputs)) > 0.05
    assert largest_difference(got, wanted) <= 1e-5 * float(wanted.abs().max())


def test_a_checkpoint_of_bitsandbytes_gives_its_weights_bit_for_bit_and_its_reference_logits(shared_data: Path) -> None:
    folder = shared_data / "interop" / "t5-stories-280k-bnb-nf4-dq"
    inputs, reference = read_by_a_peer(folder / "reference_dequant.safetensors")
    dense = our_weights(folder)
    named = [name for name in reference if name.endswith(".weight")]
    assert named
    assert all(torch.equal(dense[name], reference[name]) for name in named)
    assert largest_difference(our_logits(ours(folder), inputs), reference["logits"]) <= 1e-4


def test_what_we_quantise_are_the_weights_that_bitsandbytes_quantises_to_its_bits(
    base_of: MakeBase, shared_data: Path
) -> None:
    dense, peer = (
        our_weights(folder)
        for folder in (base_of("real 4-bit"), shared_data / "interop" / "t5-stories-280k-bnb-nf4-dq")
    )
    assert dense.keys() == peer.keys()
    assert all(torch.equal(dense[name], peer[name]) for name in dense)


@pytest.mark.parametrize("kind", ["t5 4-bit", "umt5 4-bit", "real 4-bit"])
def test_bitsandbytes_loads_our_store_to_the_same_bits_and_logits(base_of: MakeBase, kind: str) -> None:
    folder, inputs = base_of(kind), some_inputs()
    model = theirs(folder)
    dense = their_weights(model, dtype=torch.float32)
    stored = our_weights(folder, dtype=torch.float32)
    assert {name for name, _ in layers_in_4_bits(model)} == {
        path for path, part in ours(folder).named_modules() if isinstance(part, QuantizedLinear)
    }
    assert dense
    assert all(torch.equal(weight, stored[name]) for name, weight in dense.items())
    with torch.inference_mode():
        wanted = their_logits(in_float32(model), inputs)
    assert largest_difference(our_logits(ours(folder), inputs), wanted) <= 1e-5 * float(wanted.abs().max())


class WoIn4Bits:
    """Asks for what the family keeps in 16 bits: in the encoder, or everywhere."""

    def __init__(self, where: str) -> None:
        self.where = where

    @hookimpl
    def choose_precision(self, model_type: str, tensor: str) -> str | None:
        return "nf4" if tensor.startswith(self.where) and tensor.endswith(".wo.weight") else None


@pytest.mark.parametrize("where", ["", "encoder"])
def test_a_plugin_may_have_in_4_bits_what_the_family_keeps(base_of: MakeBase, tmp_path: Path, where: str) -> None:
    source = base_of("t5 16-bit")
    manager = load_plugins(WoIn4Bits(where))
    quantize(Checkpoint.open(source), tmp_path / "store", QuantizeConfig(), manager=manager)
    wo = {name for name in load_file(source / "model.safetensors") if name.endswith(".wo.weight")}
    asked = {name for name in wo if name.startswith(where)}
    store = open_model(tmp_path / "store")
    assert {name for name in wo if store.weights.is_quantized(name)} == asked
    assert Manifest.read(tmp_path / "store").inputs["quantized_besides"] == sorted(asked)
    left = sorted(name.removesuffix(".weight") for name in wo - asked)
    assert store.config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", *left]
    dense = load_file(source / "model.safetensors") | our_weights(tmp_path / "store")
    assert not any(torch.equal(dense[name], load_file(source / "model.safetensors")[name]) for name in asked)
    assert bool(torch.isfinite(our_logits(ours(tmp_path / "store"), some_inputs())).all())
    # Asked without the plugin, it is another store.
    other = quantize(Checkpoint.open(source), tmp_path / "other", QuantizeConfig(), manager=load_plugins())
    assert "quantized_besides" not in other.manifest.inputs
    known = open_model(tmp_path / "other").config["quantization_config"]["llm_int8_skip_modules"]
    assert known == ["lm_head", "wo"]


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_gradients_are_those_of_transformers_and_peft_in_float64(tmp_path: Path, model_type: str) -> None:
    base = t5_checkpoint(tmp_path, seed=2, model_type=model_type, num_layers=2, num_decoder_layers=3)
    inputs = some_inputs()
    labels = torch.randint(259, inputs.ids.shape, generator=torch.Generator().manual_seed(8))
    labels[0, 3:6], labels[1, 9:] = IGNORE, IGNORE
    batch = Batch(
        ids=inputs.ids, labels=labels, tokens=1, trained=1, origins=(), source=inputs.source,
        source_lengths=inputs.source_lengths,
    )  # fmt: skip
    model = load(open_model(base), FAMILY, dtype=torch.float64, device=torch.device("cpu"))
    torch.manual_seed(4)
    adapt(model, FinetuneConfig(rank=3, alpha=5, dropout=0.0), start=None)
    layers = adapters_of(model.module)
    for layer in layers.values():
        layer.lora_a.data, layer.lora_b.data = layer.lora_a.double(), torch.randn_like(layer.lora_b).double() * 0.1
    model.module.train()
    loss = BlockwisePass(model, recompute=RecomputePlan("all")).run([batch], divisor=3.0)[0]

    peer = get_peft_model(theirs(base, dtype=torch.float64), LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS))
    peer = peer.double().eval()
    parameters = {name: part for name, part in peer.named_parameters() if part.requires_grad}
    assert len(parameters) == 2 * len(layers)
    for path, layer in layers.items():
        for half, values in (("A", layer.lora_a), ("B", layer.lora_b)):
            parameters[f"base_model.model.{path}.lora_{half}.default.weight"].data = values.detach().clone()
    wanted = functional.cross_entropy(their_logits(peer, inputs).flatten(0, 1), labels.flatten(), reduction="sum") / 3.0
    wanted.backward()
    assert abs(float(loss) - float(wanted.detach())) <= 1e-9 * float(loss)
    for path, layer in layers.items():
        for half, part in (("A", layer.lora_a), ("B", layer.lora_b)):
            expected = parameters[f"base_model.model.{path}.lora_{half}.default.weight"].grad
            assert part.grad is not None
            assert float((part.grad - expected).abs().max()) <= 1e-11 * float(expected.abs().max()), path


def test_the_whole_chain_on_a_real_model_brings_the_held_out_loss_down(
    base_of: MakeBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = base_of("real 4-bit")
    run(
        "finetune", store, "--data", f"jsonl:{write_answers(tmp_path / 'rows.jsonl')}", "--out", tmp_path / "run",
        "--steps", 30, "--learning-rate", 1e-2, "--batch-size", 8, "--rank", 8, "--held-out", 0.2,
    )  # fmt: skip
    run("merge", store, tmp_path / "run", tmp_path / "merged", "--dtype", "float32")
    run("verify", tmp_path / "merged")
    run("quantize", tmp_path / "merged", tmp_path / "again")
    measured = Manifest.read(tmp_path / "run" / "final").fields["measured"]
    assert measured["eval_loss"] < 0.3 * measured["eval_loss_start"]
    # The adapter beside its base and the model merged of both give one answer, in either way of searching.
    asked = ["--prompt", "Tom had 7 red balls. He found one more.", "--max-new-tokens", 20]
    for way in ([], ["--beams", 3]):
        capsys.readouterr()
        run("generate", store, "--adapter", tmp_path / "run", *asked, *way)
        beside = capsys.readouterr().out
        run("generate", tmp_path / "merged", *asked, *way)
        assert capsys.readouterr().out == beside
        assert beside.lstrip().startswith("He had ")


def test_continued_pretraining_by_span_corruption_brings_the_held_out_loss_down(
    base_of: MakeBase, shared_data: Path, tmp_path: Path
) -> None:
    text = (shared_data / "datasets" / "tinyshakespeare" / "input.txt").read_text()[:40_000]
    (tmp_path / "play.txt").write_text(text)
    run(
        "finetune", base_of("real 4-bit"), "--data", f"span-corruption:{tmp_path / 'play.txt'}", "--out",
        tmp_path / "run", "--steps", 12, "--learning-rate", 5e-3, "--batch-size", 8, "--rank", 8, "--max-tokens", 96,
    )  # fmt: skip
    measured = Manifest.read(tmp_path / "run" / "final").fields["measured"]
    assert measured["eval_loss"] < 0.97 * measured["eval_loss_start"]
