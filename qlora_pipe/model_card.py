"""Write the model card of a folder that is about to be published, from what the folder itself says.

A card holds no timestamps, host names or paths: the same folder gives the same card.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from qlora_formats.manifest import Manifest
from qlora_formats.strict_json import read_bytes, read_object
from qlora_pipe.artifacts import Binding

Kind = Literal["adapter", "store", "checkpoint"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SETTING = re.compile(r"[a-z][a-z0-9_]*")
_FRONT_MATTER = re.compile(r"---\s*\n(.*?\n)---\s*\n", re.DOTALL)
_README_BYTES = 1 << 20
_RELATION = {"adapter": "adapter", "store": "quantized", "checkpoint": "finetune"}


def folder_kind(folder: Path) -> Kind | None:
    """Tell by its files what a folder holds; None where it is neither a model nor an adapter."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if not (folder / "config.json").is_file():
        return None
    return "store" if "quantization_config" in read_object(folder / "config.json") else "checkpoint"


def model_card(folder: Path, *, repo: str) -> str:
    """Write the card (README.md) of an adapter, a store or a merged checkpoint that goes to `repo`, USER/NAME.

    FormatError where its config or manifest is damaged.
    """
    kind = folder_kind(folder)
    assert kind is not None, folder
    config = read_object(folder / ("adapter_config.json" if kind == "adapter" else "config.json"))
    manifest = Manifest.read_if_present(folder)
    inputs = manifest.inputs if manifest is not None else {}
    base = _base(config, inputs)
    front = _front_matter(kind, config, base=base, ours=manifest is not None, quantization=_trained_on(inputs))
    sections = [
        f"---\n{yaml.safe_dump(_licence(folder) | front, sort_keys=False)}---\n",
        f"# {repo.rpartition('/')[2]}\n",
        _description(kind, config, base=base, ours=manifest is not None),
        _bound(Binding.of(manifest)),
        _settings(inputs),
        _usage(kind, config, base=base, repo=repo),
    ]
    return "\n".join(section for section in sections if section)


def _base(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> str | None:
    """The Hub id of the model this one was made from. A bare name may be a folder's, so it does not count."""
    recorded = [inputs[key] for key in ("source", "base") if isinstance(inputs.get(key), dict)]
    candidates = [config.get("base_model_name_or_path"), *(source.get("repo") for source in recorded)]
    return next((name for name in candidates if isinstance(name, str) and _HUB_ID.fullmatch(name)), None)


def _trained_on(inputs: Mapping[str, Any]) -> str | None:
    """The 4-bit type of the base that an adapter was trained on, where its manifest says so."""
    found = inputs["base"].get("quantization") if isinstance(inputs.get("base"), dict) else None
    return found if isinstance(found, str) else None


def _licence(folder: Path) -> dict[str, str]:
    """The licence that a README already in the folder declares; nothing where it declares none."""
    readme = folder / "README.md"
    text = read_bytes(readme, limit=_README_BYTES).decode(errors="replace") if readme.is_file() else ""
    found = _FRONT_MATTER.match(text)
    try:
        declared = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        # A README is free text: one without readable front matter declares nothing.
        return {}
    if not isinstance(declared, dict) or not isinstance(declared.get("license"), str):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: declared[key] for key in keys if isinstance(declared.get(key), str)}


def _front_matter(
    kind: Kind, config: Mapping[str, Any], *, base: str | None, ours: bool, quantization: str | None
) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    if not _is_seq2seq(config):
        front["pipeline_tag"] = "text-generation"
    if base is not None:
        front |= {"base_model": base, "base_model_relation": _RELATION[kind]}
    tags = {
        "adapter": ["lora", *(["qlora", quantization] if quantization else [])],
        "store": ["qlora", _quant_type(config), "4-bit", "bitsandbytes"],
        # Of a checkpoint that was made elsewhere only the files are known.
        "checkpoint": ["lora"] if ours else [],
    }
    return {**front, "tags": [*tags[kind], "qlora-pipe"]}


def _is_seq2seq(config: Mapping[str, Any]) -> bool:
    return config.get("task_type") == "SEQ_2_SEQ_LM" or config.get("is_encoder_decoder") is True


def _quant_type(config: Mapping[str, Any]) -> str:
    settings = config.get("quantization_config")
    found = settings.get("bnb_4bit_quant_type") if isinstance(settings, dict) else None
    return found if found in ("nf4", "fp4") else "quantized"


def _description(kind: Kind, config: Mapping[str, Any], *, base: str | None, ours: bool) -> str:
    of = f" of `{base}`" if base is not None else ""
    if kind == "adapter":
        known = [f"{name} {config[key]:g}" for name, key in (("rank", "r"), ("alpha", "lora_alpha")) if key in config]
        text = f"A LoRA adapter{of} ({', '.join(known)}), in PEFT's layout."
    elif kind == "store":
        settings = config["quantization_config"]
        double = isinstance(settings, dict) and settings.get("bnb_4bit_use_double_quant") is True
        scales = ", its scales quantised again to 8 bits" if double else ""
        text = f"The weights{of} in 4 bits ({_quant_type(config)}{scales}), in bitsandbytes' serialised layout."
    elif ours:
        text = f"The weights{of} with a LoRA adapter merged into them; nothing else is needed to run it."
    else:
        text = "A language model as a Hugging Face checkpoint."
    return f"{text}\n\nMade with qlora-pipe.\n" if ours else f"{text}\n"


def _bound(binding: Binding | None) -> str:
    if binding is None:
        return ""
    return (
        f"They were quantised for an adapter beside them ({binding.method}, rank {binding.rank},"
        f" {binding.iterations} iterations): use them with it, or with one trained from it.\n"
    )


def _settings(inputs: Mapping[str, Any]) -> str:
    """A table of the settings that the manifest records."""
    recorded = inputs.get("settings")
    rows = [
        f"| {name} | {str(value).lower() if isinstance(value, bool) else value} |"
        for name, value in sorted(recorded.items() if isinstance(recorded, dict) else [])
        if _SETTING.fullmatch(name) and _is_plain(value)
    ]
    return "\n".join(["## Settings", "", "| setting | value |", "|---|---|", *rows, ""]) if rows else ""


def _is_plain(value: Any) -> bool:
    """Whether a setting's value may stand in the table: a number, or a word that is no path."""
    return isinstance(value, int | float) or (
        isinstance(value, str) and re.fullmatch(r"[\w.-]{1,40}", value) is not None
    )


def _usage(kind: Kind, config: Mapping[str, Any], *, base: str | None, repo: str) -> str:
    auto = "AutoModelForSeq2SeqLM" if _is_seq2seq(config) else "AutoModelForCausalLM"
    origin = base or "USER/BASE"
    if kind == "adapter":
        command = f'qlora-pipe generate {origin} --adapter {repo} --prompt "..."'
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f'base = {auto}.from_pretrained("{origin}")',
            f'model = PeftModel.from_pretrained(base, "{repo}")',
        ]
    else:
        command = f'qlora-pipe generate {repo} --prompt "..."'
        lines = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{repo}")']
    return "\n".join(["## Use", "", "```console", command, "```", "", "```python", *lines, "```", ""])
