"""Hostile folders through the command line: the exit code, one line on stderr, nothing on stdout, no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_pipe.cli import execute
from tests.hostile.damage import (
    INDEX,
    Damage,
    edit,
    link,
    packed_as,
    refusal,
    remove,
    replace,
    resign,
    settings,
    together,
    write,
)

GENERATE = ("generate", "@", "--prompt", "x", "--max-new-tokens", "1")
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
WEIGHTS = "model.safetensors"
MANIFEST = "qlora_pipe.json"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of a store, and drop the manifest, which would see it."""

    def damage(path: Path) -> None:
        found = load_file(path / WEIGHTS)
        change(found)
        save_file(found, path / WEIGHTS, metadata={"format": "pt"})
        (path / MANIFEST).unlink(missing_ok=True)

    return damage


def stated(**fields: Any) -> Damage:
    """Change the quant_state of one weight."""

    def change(found: dict[str, torch.Tensor]) -> None:
        name = f"{DOWN}.quant_state.bitsandbytes__nf4"
        text = json.dumps({**json.loads(found[name].numpy().tobytes()), **fields})
        found[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return tensors(change)


def fill(name: str, value: float) -> Damage:
    return tensors(lambda found: found[name].fill_(value))


def retyped(name: str, dtype: torch.dtype) -> Damage:
    return tensors(lambda found: found.update({name: found[name].to(dtype)}))


def in_4_bits(name: str) -> Damage:
    def change(found: dict[str, torch.Tensor]) -> None:
        found.update(packed_as(name, list(found[name].shape), levels=found[f"{DOWN}.quant_map"]))

    return tensors(change)


MERGE = ("merge", "@", "ADAPTER", "OUT")
# Which folder is damaged, how, and the command with the folder in place of "@".
FOLDERS: dict[str, tuple[str, Damage, tuple[str, ...], int, str]] = {
    "config gone": ("checkpoint", remove("config.json"), GENERATE, 65, "is not a model: it has no config.json"),
    "config broken": ("checkpoint", write("config.json", "{"), GENERATE, 65, "config.json is not valid JSON"),
    "config deep": ("store", write("config.json", '{"a":' * 9999), GENERATE, 65, "it is nested too deeply"),
    "config a pipe": ("store", replace("config.json", link("/dev/stdin")), GENERATE, 65, "where a file is needed"),
    "generation config broken": ("checkpoint", write("generation_config.json", "["), GENERATE, 65, "not valid JSON"),
    "tokenizer config broken": ("checkpoint", write("tokenizer_config.json", "["), GENERATE, 78, "not valid JSON"),
    "tokenizer config of NaN": (
        "checkpoint",
        write("tokenizer_config.json", '{"model_max_length": NaN}'),
        GENERATE,
        78,
        "tokenizer_config.json is not valid JSON: NaN is not a JSON number",
    ),
    "tokenizer config key twice": (
        "checkpoint",
        write("tokenizer_config.json", '{"eos_token": "</s>", "eos_token": "<s>"}'),
        GENERATE,
        78,
        "the key 'eos_token' stands twice",
    ),
    "weights gone": ("checkpoint", remove(WEIGHTS), GENERATE, 65, "holds no weights: neither"),
    "weights empty": ("checkpoint", write(WEIGHTS, ""), GENERATE, 65, "it has 0 bytes, too few for a header"),
    "weights a folder": (
        "checkpoint",
        replace(WEIGHTS, Path.mkdir),
        GENERATE,
        65,
        "is a folder where a file is needed",
    ),
    "weights cut off": (
        "checkpoint",
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1]),
        ("inspect", "@"),
        65,
        "is cut off: its tensors end at byte",
    ),
    "index out of the folder": (
        "checkpoint",
        together(remove(WEIGHTS), write(INDEX, '{"weight_map": {"x": "../../etc/passwd"}}')),
        ("quantize", "@", "OUT"),
        65,
        "in '../../etc/passwd', which is no file name",
    ),
    "index twice": (
        "checkpoint",
        together(remove(WEIGHTS), write(INDEX, '{"weight_map": {"x": "a", "x": "b"}}')),
        ("inspect", "@"),
        65,
        "the key 'x' stands twice",
    ),
    "shard missing": (
        "checkpoint",
        together(remove(WEIGHTS), write(INDEX, '{"weight_map": {"x": "a.safetensors"}}')),
        GENERATE,
        65,
        "lacks the shard a.safetensors",
    ),
    "quantised by another method": (
        "checkpoint",
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("quantize", "@", "OUT"),
        65,
        "was quantised (config.json: quantization_config, method 'gptq'); only 16-bit",
    ),
    "quantised in 8 bits": (
        "checkpoint",
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        GENERATE,
        65,
        "method 'bitsandbytes'); only 16-bit and 32-bit weights and 4-bit ones of bitsandbytes are read",
    ),
    "quantised, says a number": ("checkpoint", settings(quantization_config=5), GENERATE, 65, "method '5'"),
    "in 4 bits, says the config alone": (
        "checkpoint",
        settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        GENERATE,
        65,
        "holds no weight in 4 bits, although its config.json says that it does",
    ),
    "in 4 bits, says all but the config": (
        "store",
        together(remove(MANIFEST), settings(quantization_config=None)),
        ("inspect", "@"),
        65,
        "holds weights in 4 bits (model.layers.0.",
    ),
    "in 4 bits, says a broken config": (
        "store",
        together(remove(MANIFEST), settings(quantization_config={"quant_method": "bitsandbytes"})),
        GENERATE,
        65,
        "and its config.json does not say so: make or fetch the folder again",
    ),
    "a norm in 4 bits": (
        "store",
        in_4_bits(NORM),
        GENERATE,
        65,
        f"{NORM} is stored in 4 bits, and only the weights of",
    ),
    "an embedding in 4 bits": (
        "store",
        in_4_bits(EMBEDDING),
        GENERATE,
        65,
        f"{EMBEDDING} is stored in 4 bits, and only",
    ),
    "a norm of integers": ("store", retyped(NORM, torch.int32), GENERATE, 65, f"{NORM} holds int32 where weights in"),
    "a norm of complex numbers": (
        "store",
        retyped(NORM, torch.complex64),
        GENERATE,
        65,
        f"{NORM} holds complex64 where",
    ),
    "a head of 8 bits": ("store", retyped("lm_head.weight", torch.float8_e4m3fn), GENERATE, 65, "holds float8_e4m3fn"),
    "8 bits merged": ("store", retyped(NORM, torch.float8_e5m2), MERGE, 65, f"{NORM} holds float8_e5m2 where weights"),
    "a norm of NaN": ("store", fill(NORM, float("nan")), GENERATE, 65, "the model's logits hold NaN or infinity"),
    "a norm of NaN merged": ("store", fill(NORM, float("nan")), MERGE, 65, f"{NORM} is not finite"),
    "scales of NaN": (
        "store",
        fill(f"{DOWN}.nested_absmax", float("nan")),
        GENERATE,
        65,
        f"{DOWN}: its nested_absmax holds NaN or infinity; the file is damaged",
    ),
    "scales infinite": (
        "store",
        fill(f"{DOWN}.nested_absmax", float("inf")),
        MERGE,
        65,
        f"{DOWN}: its nested_absmax holds NaN or infinity; the file is damaged",
    ),
    "levels of scales of NaN": (
        "store",
        fill(f"{DOWN}.nested_quant_map", float("nan")),
        GENERATE,
        65,
        f"{DOWN}: its nested_quant_map holds NaN or infinity; the file is damaged",
    ),
    "levels of NaN": (
        "store",
        fill(f"{DOWN}.quant_map", float("nan")),
        GENERATE,
        65,
        "its quant_map is not nf4's table",
    ),
    "an offset that overflows": ("store", stated(nested_offset=3.4e38), GENERATE, 65, "logits hold NaN or infinity"),
    "an offset that overflows, merged": ("store", stated(nested_offset=3.4e38), MERGE, 65, f"{DOWN} "),
    "a weight on its side": (
        "store",
        stated(shape=[72, 32]),
        GENERATE,
        65,
        f"{DOWN} has shape [72, 32], and its config",
    ),
    "a weight as a vector": ("store", stated(shape=[2304]), GENERATE, 65, f"{DOWN} has shape [2304], and its config"),
    "a block size of 3": (
        "store",
        stated(blocksize=3),
        ("inspect", "@"),
        65,
        "has blocksize 3, which is no power of two",
    ),
    "a stray part": (
        "store",
        tensors(lambda found: found.update({"ghost.absmax": torch.zeros(3)})),
        GENERATE,
        65,
        "holds the tensor ghost.absmax, which a llama model with this config does not have",
    ),
    "manifest edited": (
        "store",
        edit(MANIFEST, lambda manifest: manifest.update(kind="checkpoint")),
        ("inspect", "@"),
        65,
        "does not have the digest that it records: it was edited or damaged",
    ),
    "manifest of an adapter": (
        "store",
        resign(lambda manifest: manifest.update(kind="adapter")),
        ("inspect", "@"),
        65,
        "says that the folder is of kind adapter, not store or checkpoint",
    ),
    "manifest of facts that are none": (
        "store",
        resign(lambda manifest: manifest["files"][WEIGHTS].update(facts={"tensors": []})),
        ("inspect", "@"),
        65,
        f"the record of file '{WEIGHTS}' is malformed",
    ),
    "manifest a link to nothing": (
        "store",
        replace(MANIFEST, link("gone")),
        GENERATE,
        65,
        "is a link to nothing where",
    ),
    "file that the manifest misses": ("store", remove("tokenizer.json"), GENERATE, 65, "lacks the file tokenizer.json"),
    "an adapter of no rank": (
        "adapter",
        edit("adapter_config.json", lambda fields: fields.update(r=0)),
        ("generate", "STORE", "--adapter", "@", "--prompt", "x"),
        65,
        "r is '0', which is no whole number from 1 to 65,536",
    ),
    "an adapter whose pattern hangs": (
        "adapter",
        edit("adapter_config.json", lambda fields: fields.update(rank_pattern={"(a|aa)" * 30: 2})),
        ("merge", "STORE", "@", "OUT"),
        65,
        "too complex to be matched safely",
    ),
    "an adapter alone": ("adapter", write("x", ""), ("quantize", "@", "OUT"), 65, "it is an adapter, which is used"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_hostile_folder_is_one_sentence_and_an_exit_code(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    kind, damage, words, code, sentence = FOLDERS[case]
    folder = shutil.copytree(made / kind, tmp_path / "hostile")
    damage(folder)
    places = {"@": folder, "STORE": made / "store", "ADAPTER": made / "adapter", "OUT": tmp_path / "out"}
    found = refusal(capsys, *(places.get(word, word) for word in words))
    assert sentence in found[1]
    assert found[0] == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["manifest", ["manifest"], None, 5], ids=repr)
def test_an_adapter_whose_manifest_names_no_base_is_merged_as_one_that_does_not_say(
    made: Path, tmp_path: Path, base: object
) -> None:
    folder = shutil.copytree(made / "adapter", tmp_path / "adapter")
    resign(lambda manifest: manifest["inputs"].update(base=base))(folder)
    assert execute(["merge", str(made / "store"), str(folder), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("source", ["x", {"repo": ["x"]}, [1]], ids=repr)
def test_a_store_whose_manifest_names_no_source_is_used_as_one_of_no_name(
    made: Path, tmp_path: Path, source: object
) -> None:
    folder = shutil.copytree(made / "store", tmp_path / "store")
    resign(lambda manifest: manifest["inputs"].update(source=source))(folder)
    assert execute(["merge", str(folder), str(made / "adapter"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("progress", [None, "x", {}, {"step": "1"}], ids=repr)
def test_a_checkpoint_of_other_counters_is_passed_over(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: object
) -> None:
    run = shutil.copytree(made / "run", tmp_path / "run")
    shutil.rmtree(run / "final")
    (last,) = (run / "checkpoints").iterdir()

    def change(manifest: dict[str, Any]) -> None:
        manifest["progress"] = {**manifest["progress"], **progress} if isinstance(progress, dict) else progress
        if progress == {}:
            del manifest["progress"]["position"]

    resign(change)(last)
    words = f"finetune {made / 'store'} --data text:{made / 'text.txt'} --out {run} --steps 1"
    assert execute([*words.split(), "--batch-size", "1", "--max-tokens", "32", "--learning-rate", "1e-2"]) == 0
    said = capsys.readouterr().err
    assert f"passed over the checkpoint {last.name}, now {last.name}.damaged: the manifest of" in said
    assert (run / "final" / MANIFEST).read_bytes() == (made / "adapter" / MANIFEST).read_bytes()
