"""Every setting of every command, once: CLI options, YAML keys, JSON Schema and docs/config.md derive from here.

A config is a frozen dataclass of `setting(...)` fields. pydantic checks the values
(qlora_pipe/settings.py), and is imported only when a command runs.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from qlora_formats.loading import Load

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Recompute = Literal["auto", "all", "none"]
Residency = Literal["auto", "resident", "streamed", "mapped"]
# What every generator involved takes.
_SEEDS = 2**32 - 1


def setting(
    default: Any,
    text: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    entry: str = "",
) -> Any:
    """Declare one setting: its default, its help text (with the unit), and the bounds of its value.

    Of one that may be given several times, `entry` is what its help calls one value.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(default=default, metadata={"help": text, "bounds": given, "entry": entry})


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    """Settings of `quantize`."""

    type: Literal["nf4", "fp4"] = setting("nf4", "4-bit data type: NormalFloat or floating point.")
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = setting(64, "Weights that share one scale.")
    double_quant: bool = setting(True, "Quantise the scales again, to 8 bits.")
    keep: tuple[str, ...] = setting(
        (), "Leave these in 16 bits: whole components of names, * for one, such as down_proj or layers.0; repeatable.",
        entry="PATTERN",
    )  # fmt: skip
    shard_mib: int = setting(
        4096, "Largest file of the store, in MiB; a file is split between layers only.", at_least=1
    )
    allow_pickle: bool = setting(False, "Read pickled weights (pytorch_model.bin) too, in a confined process.")
    load: Load = setting("mmap", "Map the model's files, or read them: the better way for a network disk.")
    adapter_init: str | None = setting(
        None, "Write an adapter to start from to OUT-loftq: loftq, or loftq:N, whose N rounds change the store as well."
    )
    adapter_rank: int = setting(64, "Rank of the adapter that adapter_init writes.", at_least=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How rows become samples and batches: what `finetune` and `preview` are told alike."""

    batch_size: int = setting(16, "Samples in one forward pass; rows, where they are packed.", at_least=1)
    max_tokens: int = setting(512, "Longest sample, in tokens; longer ones are cut and counted.", at_least=2)
    pack: bool = setting(
        False,
        "Put several samples into each row of at most max_tokens tokens, so that little is padded; none sees another.",
    )
    split: str | None = setting(
        None,
        "Part of the data's files, such as train or test; none takes the first on the Hub, all of a folder here.",
    )
    map: tuple[str, ...] = setting(
        (), "What the data calls fields that may have other names, such as prompt=question,answer=reply; repeatable.",
        entry="OWN=THEIRS",
    )  # fmt: skip
    template: str = setting(
        "auto",
        "Chat template: auto (the form that rows are written for, else the checkpoint's own, else guanaco), checkpoint,"
        " a name that `qlora-pipe plugins` lists, or a file that ends in .jinja.",
    )
    train_on: Literal["answers", "all", "last"] = setting(
        "answers", "What of a conversation is trained: every answer, all of it, or the last answer."
    )
    seed: int = setting(0, "Seed of the adapter's start, the order of samples and dropout.", at_least=0, at_most=_SEEDS)

    @property
    def row_tokens(self) -> int | None:
        """The most tokens in a row of several samples; None where each sample is a row."""
        return self.max_tokens if self.pack else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig(DataConfig):
    """Settings of `preview`."""

    rows: int = setting(3, "Samples to print.", at_least=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig(DataConfig):
    """Settings of `finetune`; the defaults are the QLoRA paper's recipe for 7B and 13B (arXiv 2305.14314)."""

    EXCLUSIVE: ClassVar = (("held_out", "eval_data"), ("held_out", "eval_split"))
    """Settings of which one at most may be given."""

    steps: int = setting(1875, "Optimizer steps.", at_least=1)
    accumulate: int = setting(1, "Forward passes per optimizer step.", at_least=1)
    learning_rate: float = setting(2e-4, "Learning rate of AdamW, constant after the warm-up.", above=0)
    warmup_steps: int = setting(0, "Steps in which the learning rate rises linearly from zero.", at_least=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay of AdamW.", at_least=0)
    beta2: float = setting(0.999, "Second moment's decay in AdamW.", above=0, below=1)
    optimizer: Literal["adamw", "adamw-8bit"] = setting(
        "adamw", "Optimizer: AdamW, with its moments in 32 bits or in 8."
    )
    optimizer_budget: int | Literal["auto"] = setting(
        "auto", "Memory for the optimizer's moments, in MiB; the rest is paged. auto takes what is left.", at_least=0
    )
    max_grad_norm: float = setting(0.3, "Clip the gradient's norm to this; 0 leaves it as it is.", at_least=0)
    rank: int = setting(64, "Rank of the LoRA adapters.", at_least=1)
    alpha: float = setting(16.0, "LoRA's alpha: the adapter's product is scaled by alpha / rank.", above=0)
    dropout: float = setting(0.1, "Share of each adapter's inputs that is dropped in training.", at_least=0, below=1)
    on_bad_row: Literal["fail", "skip"] = setting(
        "fail", "What to do at a row that can't be used: end, or keep it in OUT/quarantine.jsonl and go on."
    )
    held_out: float = setting(0.1, "Share of the samples kept for evaluation.", at_least=0, below=1)
    eval_data: str | None = setting(None, "Data to evaluate on, NAME:PATH, in place of a held-out share.")
    eval_split: str | None = setting(
        None, "As split, of the data to evaluate on; without eval_data another part of the data to train on."
    )
    eval_map: tuple[str, ...] = setting(
        (), "As map, of the data to evaluate on; none takes map where both are of the same dataset; repeatable.",
        entry="OWN=THEIRS",
    )  # fmt: skip
    eval_every: int = setting(0, "Steps between evaluations; 0 evaluates at the start and the end only.", at_least=0)
    adapter: str | None = setting(None, "Go on from this adapter: a folder or a Hub id.")
    save_every: int = setting(100, "Steps between checkpoints; 0 saves at the end and on a signal only.", at_least=0)
    dtype: DType = setting("auto", "Compute in this type: auto is bfloat16 on a GPU that has it, float32 on a CPU.")
    device: Device = setting("auto", "Where to compute: auto is the GPU if there is one.")
    recompute: Recompute = setting(
        "auto", "Compute these blocks again in backward, which saves memory: all, none, or as many as must be (auto)."
    )
    offload: bool = setting(False, "Keep the inputs of blocks that are computed again in the host's memory.")
    residency: Residency = setting(
        "auto",
        "Where the base's weights live: on the device (resident), in host memory, passing through the device block by"
        " block (streamed) or read from there by the GPU (mapped); auto is resident where that fits, else streamed.",
    )
    threads: int = setting(
        0, "CPU threads; 0 leaves torch's own choice. The last bits of a run depend on it.", at_least=0
    )
    load: Load = setting("mmap", "Map the model's files, or read them: the better way for a network disk.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Settings of `merge`."""

    dtype: Literal["bfloat16", "float16", "float32"] = setting("bfloat16", "Data type of the merged weights.")
    shard_mib: int = setting(4096, "Largest file of the merged checkpoint, in MiB.", at_least=1)
    min_retention: float = setting(
        0.5, "Least share of the adapter that must outlive rounding to the data type, per layer; 0 accepts any.",
        at_least=0, below=1,
    )  # fmt: skip
    load: Load = setting("mmap", "Map the model's files, or read them: the better way for a network disk.")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Settings of `generate`."""

    chat: bool = setting(False, "Ask the prompt as a user's turn, through the chat template.")
    template: str = setting(
        "auto",
        "Chat template: auto (the adapter's or the checkpoint's own, else guanaco), checkpoint, a name that"
        " `qlora-pipe plugins` lists, or a file that ends in .jinja.",
    )
    system: str | None = setting(None, "What the system says before a conversation.")
    max_new_tokens: int = setting(128, "Most tokens to generate.", at_least=1)
    temperature: float = setting(0.0, "0 takes the likeliest token each time; above, tokens are drawn.", at_least=0)
    top_p: float = setting(
        1.0, "Draw from the likeliest tokens that together hold this probability.", above=0, at_most=1
    )
    seed: int = setting(0, "Seed of the draws.", at_least=0, at_most=_SEEDS)
    beams: int = setting(
        1, "Texts followed side by side in a search for the likeliest one, which is printed as a whole.", at_least=1
    )
    length_penalty: float = setting(
        1.0, "With beams: log-probabilities are divided by length to this power; above 0 favours longer texts.",
        at_least=-10, at_most=10,
    )  # fmt: skip
    dtype: DType = setting("auto", "Compute in this type: auto is bfloat16 on a GPU that has it, float32 on a CPU.")
    device: Device = setting("auto", "Where to compute: auto is the GPU if there is one.")
    residency: Residency = setting(
        "auto",
        "Where the base's weights live: on the device (resident), in host memory, passing through the device block by"
        " block (streamed) or read from there by the GPU (mapped); auto is resident where that fits, else streamed.",
    )
    load: Load = setting("mmap", "Map the model's files, or read them: the better way for a network disk.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Settings of `export`."""

    to: str = setting("hub", "Name of the target; `qlora-pipe plugins` lists them.")
    repo: str | None = setting(None, "Repository on the Hub, USER/NAME.")
    private: bool = setting(False, "Make the repository private.")


def settings_of(config: type) -> list[dataclasses.Field[Any]]:
    """List a config's settings in the order they are declared."""
    return list(dataclasses.fields(config))
