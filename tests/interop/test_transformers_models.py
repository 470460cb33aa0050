"""Families that no plugin reads, built with transformers: opened, quantised, trained, merged, generated from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_formats.manifest import Manifest
from qlora_pipe.artifacts import Adapter, open_model
from qlora_pipe.cli import execute
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.generate import generate
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.nn.seq2seq import Seq2SeqModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.stages.load import load
from qlora_pipe.testing import byte_tokenizer
from qlora_plugins.transformers_models.family import family_of

SIZES = {"vocab_size": 262, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = SIZES | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    "phi3": LLAMA_LIKE | {"attention_dropout": 0.1, "resid_pdrop": 0.2},
    "stablelm": LLAMA_LIKE | {"hidden_dropout": 0.1, "partial_rotary_factor": 0.5},
    "opt": SIZES | {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "dropout": 0.1,
    },
    "cohere": LLAMA_LIKE | {"logit_scale": 0.25, "tie_word_embeddings": True},
    "olmo2": LLAMA_LIKE,
    "falcon": LLAMA_LIKE | {"multi_query": False, "alibi": False},
}  # fmt: skip
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": SIZES | {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "is_encoder_decoder": True,
        "decoder_start_token_id": 2, "dropout": 0.1, "encoder_layerdrop": 0.1,
    },
}  # fmt: skip


def saved(folder: Path, model_type: str, fields: Mapping[str, Any]) -> transformers.PreTrainedModel:
    """A random checkpoint as transformers saves it, with the byte tokenizer."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    kind = transformers.AutoModelForSeq2SeqLM if model_type in SEQ2SEQ else transformers.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return model  # type: ignore[no-any-return]


def opened(folder: Path, *, adapter: Path | None = None, device: str = "cpu") -> LoadedModel:
    base = open_model(folder)
    family = find_architecture(load_plugins(), base.config["model_type"], config=base.config)
    trained = Adapter.open(adapter) if adapter else None
    return load(base, family, dtype=torch.float32, device=torch.device(device), adapter=trained)


def test_a_layer_whose_weight_is_looked_at_stays_dense_and_one_that_is_bypassed_is_left_alone() -> None:
    t5 = family_of({"model_type": "longt5", "is_encoder_decoder": True, "num_layers": 1})
    assert t5 is not None
    assert any(pattern.endswith(".wo") for pattern in t5.adapt)
    assert not any(pattern.endswith(".wo.weight") for pattern in t5.quantize)
    assert "wo" in t5.keep_16bit
    mamba = family_of({"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 32})
    assert mamba is not None
    # Its own code multiplies with this one's weight.
    assert not any("dt_proj" in pattern for pattern in (*mamba.adapt, *mamba.quantize))


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_causal_model_of_transformers_gives_its_logits(model_type: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, model_type, CAUSAL[model_type])
    ids = torch.randint(3, 250, (2, 13))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found = opened(tmp_path).causal(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_encoder_decoder_of_transformers_gives_its_logits(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "bart", SEQ2SEQ["bart"])
    source, ids = torch.randint(3, 250, (2, 11)), torch.randint(3, 250, (2, 7))
    lengths = torch.tensor([11, 6])
    mask = (torch.arange(11) < lengths[:, None]).long()
    model = opened(tmp_path).module
    assert isinstance(model, Seq2SeqModel)
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=ids).logits
        found = model.head(model.hidden_of(Inputs(ids, source=source, source_lengths=lengths)))
        cache = model.new_cache(model.encode(source, lengths), lengths, capacity=7)
        steps = [model.decode(ids[:, at : at + 1], cache=cache) for at in range(7)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["phi3", "opt", "falcon"])
def test_the_whole_chain_runs_on_a_causal_model(model_type: str, tmp_path: Path) -> None:
    saved(tmp_path / "source", model_type, CAUSAL[model_type])
    rows = "".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(24))
    (tmp_path / "rows.jsonl").write_text(rows)
    assert execute(["quantize", str(tmp_path / "source"), str(tmp_path / "store")]) == 0
    settings = ["--steps", "6", "--batch-size", "4", "--rank", "4", "--learning-rate", "5e-3", "--warmup-steps", "1"]
    data = ["--data", f"jsonl:{tmp_path / 'rows.jsonl'}", "--out", str(tmp_path / "run")]
    assert execute(["finetune", str(tmp_path / "store"), *data, *settings]) == 0
    measured = Manifest.read(tmp_path / "run" / "final").fields["measured"]
    assert measured["eval_loss"] < measured["eval_loss_start"]
    merged = tmp_path / "merged"
    assert execute(["merge", str(tmp_path / "store"), str(tmp_path / "run"), str(merged), "--dtype", "float32"]) == 0
    ids = torch.randint(3, 250, (1, 9))
    with torch.no_grad():
        found = opened(tmp_path / "store", adapter=tmp_path / "run").causal(ids)
        torch.testing.assert_close(opened(merged).causal(ids), found, rtol=0, atol=1e-4)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, found, rtol=0, atol=1e-4)


def test_the_whole_chain_runs_on_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "source", "bart", SEQ2SEQ["bart"])
    rows = "".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(24))
    (tmp_path / "rows.jsonl").write_text(rows)
    store, run, merged = (str(tmp_path / name) for name in ("store", "run", "merged"))
    assert execute(["quantize", str(tmp_path / "source"), store]) == 0
    settings = ["--steps", "6", "--batch-size", "4", "--rank", "4", "--learning-rate", "5e-3", "--max-tokens", "32"]
    assert execute(["finetune", store, "--data", f"jsonl:{tmp_path / 'rows.jsonl'}", "--out", run, *settings]) == 0
    measured = Manifest.read(tmp_path / "run" / "final").fields["measured"]
    assert measured["eval_loss"] < measured["eval_loss_start"]
    assert execute(["merge", store, run, merged, "--dtype", "float32"]) == 0
    answers = []
    for model, *adapter in ((store, "--adapter", run), (merged,)):
        capsys.readouterr()
        assert execute(["generate", model, *adapter, "--prompt", "7+1=", "--max-new-tokens", "5", "--beams", "2"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_names_that_transformers_would_translate_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox", LLAMA_LIKE)
    with pytest.raises(DataError, match=r"lacks the tensor lm_head\.weight of a gpt_neox \(transformers\) model"):
        opened(tmp_path)


def test_greedy_generation_is_theirs(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "phi3", CAUSAL["phi3"])
    prompt = torch.randint(3, 250, (1, 6))
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    model = opened(tmp_path).causal
    assert isinstance(model, CausalModel)
    assert list(generate(model, prompt[0].tolist(), max_new_tokens=12, stop_ids=())) == expected[0, 6:].tolist()


def test_recomputed_layers_draw_the_same_masks(tmp_path: Path) -> None:
    """Their own dropout is off, and the adapters' follows from seeds: the gradients are those of a plain pass."""
    from qlora_pipe.config import FinetuneConfig
    from qlora_pipe.data.batches import Batch
    from qlora_pipe.nn.adapt import adapters_of
    from qlora_pipe.train.blockwise import BlockwisePass
    from qlora_pipe.train.recompute import RecomputePlan
    from qlora_pipe.train.session import adapt

    saved(tmp_path, "phi3", CAUSAL["phi3"])
    ids = torch.randint(3, 250, (2, 12))
    batch = Batch(ids=ids[:, :-1], labels=ids[:, 1:], tokens=22, trained=22, origins=("a", "b"))
    gradients = []
    for mode in ("none", "all"):
        model = opened(tmp_path)
        torch.manual_seed(5)
        adapt(model, FinetuneConfig(rank=4, dropout=0.3), start=None)
        layers = adapters_of(model.module)
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_b.normal_()
        model.module.train()
        BlockwisePass(model, recompute=RecomputePlan(mode)).run([batch], divisor=22)  # type: ignore[arg-type]
        gradients.append([layer.lora_a.grad for layer in layers.values()])
    assert all(one is not None and two is not None for one, two in zip(*gradients, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_a_family_of_our_own_comes_first(tmp_path: Path) -> None:
    found = find_architecture(load_plugins(), "llama", config={"model_type": "llama"})
    assert found.name == "llama"


def test_no_code_of_a_model_folder_is_run(tmp_path: Path) -> None:
    saved(tmp_path, "phi3", CAUSAL["phi3"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    opened(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "no-such-model"}, "no installed plugin reads model_type 'no-such-model'"),
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}, "have no linear layers in their blocks"),
        (CAUSAL["phi3"] | {"model_type": "phi3", "hidden_size": "wide"}, "transformers can't build a phi3"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_architecture(load_plugins(), config["model_type"], config=config)


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, "phi3", CAUSAL["phi3"])
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert execute(["quantize", str(tmp_path), str(tmp_path / "store")]) == 0
    with pytest.raises(DataError, match=r"lacks the tensor model\.layers\.1\.mlp\.down_proj\.weight"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("model_type", ["phi3", "bart"])
def test_a_store_trains_and_generates_wherever_it_computes(model_type: str, device: str, tmp_path: Path) -> None:
    saved(tmp_path / "source", model_type, (CAUSAL | SEQ2SEQ)[model_type])
    rows = "".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(24))
    (tmp_path / "rows.jsonl").write_text(rows)
    assert execute(["quantize", str(tmp_path / "source"), str(tmp_path / "store")]) == 0
    settings = ["--steps", "4", "--batch-size", "4", "--rank", "4", "--learning-rate", "5e-3", "--max-tokens", "32"]
    data = ["--data", f"jsonl:{tmp_path / 'rows.jsonl'}", "--device", device, "--dtype", "float32"]
    assert execute(["finetune", str(tmp_path / "store"), "--out", str(tmp_path / "run"), *data, *settings]) == 0
    measured = Manifest.read(tmp_path / "run" / "final").fields["measured"]
    assert measured["eval_loss"] < measured["eval_loss_start"]
    here, there = (opened(tmp_path / "store", adapter=tmp_path / "run", device=each) for each in ("cpu", device))
    ids, lengths = torch.arange(3, 12)[None], torch.tensor([9])
    source = {"source": ids, "source_lengths": lengths} if model_type in SEQ2SEQ else {}
    logits = []
    for model in (here, there):
        inputs = Inputs(ids.to(model.device), **{name: part.to(model.device) for name, part in source.items()})
        with torch.no_grad():
            logits.append(model.language.head(model.language.hidden_of(inputs)).cpu())
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-3)
    asked = ["--prompt", "7+1=", "--max-new-tokens", "4", "--device", device, "--dtype", "float32"]
    assert execute(["generate", str(tmp_path / "store"), "--adapter", str(tmp_path / "run"), *asked]) == 0
