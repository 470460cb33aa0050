"""PEFT's adapter_config.json: what of it has an effect, and which features are refused.

An adapter that uses a feature beyond plain LoRA is refused by the feature's name, since leaving the feature out would
give other outputs. Keys without an effect on them are ignored.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, TypeVar

from qlora_formats.errors import FormatError
from qlora_formats.strict_json import read_object

# What makes an adapter more than plain LoRA, and the values that say it is not used.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Ways to begin that change the base's own weights too; the adapter does not hold that change.
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_Number = TypeVar("_Number", int, float)

_MAX_RANK = 2**16
_MAX_PATTERNS = 4096
_MAX_PATTERN = 256
_MAX_REPETITIONS = 2
_REPETITION = re.compile(r"[*+?{]")
# A repeated group, what looks ahead or depends on a group, and a reference back to one.
_UNSAFE = re.compile(r"\)[*+?{]|\(\?(?!:)|\\[0-9]")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What an adapter_config.json says, as far as it has an effect.

    `target_modules` may be a pattern where PEFT wrote it; which modules are adapted is said by the tensors. The keys
    of `rank_pattern` and `alpha_pattern` are regular expressions for the end of a module path, as PEFT matches them.
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str = field(default_factory=list)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank(self, module_path: str) -> int:
        """The rank of one module's adapter."""
        return _by_pattern(self.rank_pattern, module_path, self.r)

    def scale(self, module_path: str) -> float:
        """What B A x is multiplied by: alpha/r, or alpha/sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        r = self.rank(module_path)
        return _by_pattern(self.alpha_pattern, module_path, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)

    def matching_steps(self, modules: Collection[str]) -> int:
        """About how many steps it takes to match every pattern with every one of these module paths."""
        lengths = [len(module) for module in modules]
        return sum(
            (1 + pattern.count("|")) * sum(length ** (1 + len(_REPETITION.findall(pattern))) for length in lengths)
            for patterns in (self.rank_pattern, self.alpha_pattern)
            for pattern in patterns
        )

    def to_json(self) -> dict[str, Any]:
        """The keys that every version of PEFT reads; newer ones would break older versions."""
        targets = self.target_modules if isinstance(self.target_modules, str) else sorted(self.target_modules)
        return {
            "alpha_pattern": dict(self.alpha_pattern),
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "revision": self.revision,
            "target_modules": targets,
            "task_type": self.task_type,
            "use_dora": False,
            "use_rslora": self.use_rslora,
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an adapter_config.json; FormatError names the field that is wrong or the feature that is not read."""
        fields = read_object(path)
        _refuse_features(fields, path)
        targets = fields.get("target_modules") or []
        names = [targets] if isinstance(targets, str) else targets
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError(f"{path}: target_modules is neither a list of names nor a pattern")
        rank_pattern, alpha_pattern = _pattern(fields, "rank_pattern", path), _pattern(fields, "alpha_pattern", path)
        return cls(
            r=_rank(fields.get("r"), f"{path}: r"),
            lora_alpha=_number(fields.get("lora_alpha"), f"{path}: lora_alpha"),
            lora_dropout=_share(fields.get("lora_dropout", 0.0), f"{path}: lora_dropout"),
            use_rslora=_boolean(fields, "use_rslora", path),
            target_modules=targets,
            task_type=_text(fields, "task_type", path),
            base_model_name_or_path=_text(fields, "base_model_name_or_path", path),
            revision=_text(fields, "revision", path),
            rank_pattern={key: _rank(value, f"{path}: rank_pattern[{key!r}]") for key, value in rank_pattern.items()},
            alpha_pattern={
                key: _number(value, f"{path}: alpha_pattern[{key!r}]") for key, value in alpha_pattern.items()
            },
        )


def _refuse_features(fields: Mapping[str, Any], path: Path) -> None:
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        raise FormatError(f"{path}: peft_type is {str(kind)[:40]!r}; only LORA adapters are read")
    for key, unused in _REFUSED.items():
        if key in fields and fields[key] not in unused:
            raise FormatError(f"{path}: {key} is {str(fields[key])[:60]!r}; only plain LoRA, without it, is read")
    start = str(fields.get("init_lora_weights", True)).lower()
    if start.startswith(_REFUSED_INITS):
        raise FormatError(
            f"{path}: init_lora_weights is {start[:40]!r}, which changes the base's weights as well:"
            " convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )


def _by_pattern(patterns: Mapping[str, _Number], module_path: str, otherwise: _Number) -> _Number:
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module_path):
            return value
    return otherwise


@lru_cache(maxsize=2 * _MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _pattern(fields: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    patterns = fields.get(key) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{path}: {key} is no map from module names to numbers")
    if len(patterns) > _MAX_PATTERNS:
        raise FormatError(f"{path}: {key} has {len(patterns):,} patterns; at most {_MAX_PATTERNS:,} are read")
    for pattern in patterns:
        # It comes from a stranger, and a pattern whose choices multiply can match for hours.
        repetitions = len(_REPETITION.findall(pattern))
        unsafe = _UNSAFE.search(pattern) or _groups_of_alternatives(pattern) > 1
        if len(pattern) > _MAX_PATTERN or repetitions > _MAX_REPETITIONS or unsafe:
            raise FormatError(f"{path}: {key} has the pattern {pattern[:60]!r}, too complex to be matched safely")
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise FormatError(f"{path}: {key} has the invalid pattern {pattern!r}: {error}") from error
    return patterns


def _groups_of_alternatives(pattern: str) -> int:
    """How many groups of the pattern, the whole of it included, offer alternatives."""
    found, open_groups = 0, [False]
    for mark in re.findall(r"[(|)]", pattern):
        if mark == "(":
            open_groups.append(False)
        elif mark == "|":
            found += not open_groups[-1]
            open_groups[-1] = True
        elif len(open_groups) > 1:
            open_groups.pop()
    return found


def _rank(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_RANK:
        raise FormatError(f"{what} is {str(value)[:40]!r}, which is no whole number from 1 to {_MAX_RANK:,}")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{what} is {str(value)[:40]!r}, which is no number")
    return value


def _share(value: Any, what: str) -> float:
    if not 0 <= _number(value, what) <= 1:
        raise FormatError(f"{what} is {str(value)[:40]!r}, which does not lie between 0 and 1")
    return float(value)


def _text(fields: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{path}: {key} is {str(value)[:40]!r}, which is no text")
    return value


def _boolean(fields: Mapping[str, Any], key: str, path: Path) -> bool:
    value = fields.get(key, False)
    if not isinstance(value, bool):
        raise FormatError(f"{path}: {key} is {str(value)[:40]!r}, which is neither true nor false")
    return value
