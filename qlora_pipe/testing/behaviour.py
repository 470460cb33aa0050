"""What a model computes: the same however it was stored, merged or run, and what another implementation computes."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from qlora_formats.adapter import write_adapter
from qlora_formats.commit import commit_folder
from qlora_kernels import dequantize
from qlora_pipe.artifacts import Adapter, Checkpoint
from qlora_pipe.config import FinetuneConfig, MergeConfig
from qlora_pipe.nn.adapt import adaptable, describe_adapter, pairs_of
from qlora_pipe.nn.causal import CausalModel
from qlora_pipe.nn.language import Inputs
from qlora_pipe.nn.linear import QuantizedLinear
from qlora_pipe.nn.seq2seq import Seq2SeqModel
from qlora_pipe.stages.merge import merge
from qlora_pipe.testing.checkpoints import filled
from qlora_pipe.testing.subject import FIRST_TEXT_ID, LeftOut, Subject, logits_of

Reference = Callable[[Path], Callable[[Inputs], Tensor]]
"""From a checkpoint's folder: what gives another implementation's logits [B, T, vocabulary] of the same inputs."""

_PROMPT = 5
# A merged weight is rounded once more than the product that the adapter adds.
_MERGED = 1e-4
_OTHER_ORDER = 1e-6


def check_checkpoint(subject: Subject) -> None:
    """A checkpoint on disk gives the logits of the weights that are in it."""
    base, inputs = subject.checkpoint, subject.inputs
    weights = {name: base.weights.tensor(name) for name in base.weights.names}
    wanted = logits_of(filled(subject.architecture, base.config, weights, dtype=torch.float32), inputs)
    shape = (*inputs.ids.shape, subject.config["vocab_size"])
    subject.require(
        tuple(wanted.shape) == shape,
        f"its logits have the shape {list(wanted.shape)} where {list(shape)} is asked for.",
    )
    subject.require(bool(wanted.isfinite().all()), "its logits on random weights hold NaN or infinity.")
    found = logits_of(subject.loaded(base).module, inputs)
    subject.require(
        torch.equal(found, wanted),
        "a checkpoint that is loaded from its folder gives other logits than the weights in it: something of the model"
        " is no parameter, or does not follow from the config.",
    )


def check_store(subject: Subject) -> None:
    """A 4-bit store gives the logits of the weights that it stands for."""
    model = subject.loaded(subject.store)
    packed = {path: part for path, part in model.module.named_modules() if isinstance(part, QuantizedLinear)}
    # Its own tensors, but for what is packed; what is tied is named once.
    weights = {name: each for name, each in model.module.state_dict().items() if name not in _ties(subject)}
    weights |= {f"{path}.weight": dequantize(part.frozen, torch.float32) for path, part in packed.items()}
    dense = filled(subject.architecture, subject.config, weights, dtype=torch.float32)
    subject.require_close(
        logits_of(model.module, subject.inputs),
        logits_of(dense, subject.inputs),
        "its 4-bit model gives other logits than the weights that it stands for: linear layers must be called, and"
        " nothing may read their weight.",
    )


def check_bfloat16(subject: Subject) -> None:
    """The model computes in the type that it was loaded in."""
    found = logits_of(subject.loaded(subject.checkpoint, dtype=torch.bfloat16).module, subject.inputs)
    subject.require(
        found.dtype == torch.bfloat16 and bool(found.isfinite().all()),
        f"loaded in bfloat16 its logits are {str(found.dtype).removeprefix('torch.')} or not finite: make tables in the"
        " type of the state.",
    )


def check_sight(subject: Subject) -> None:
    """A position sees itself and those before it in its row, of a source all that is no padding, and nothing else."""
    module, inputs = subject.loaded(subject.checkpoint).module, subject.inputs
    wanted = logits_of(module, inputs)

    def require_blind(changed: Inputs, seen: Callable[[Tensor], Tensor], what: str) -> None:
        subject.require_close(seen(logits_of(module, changed)), seen(wanted), what, share=_OTHER_ORDER)

    last = inputs.ids.clone()
    last[:, -1] = FIRST_TEXT_ID + (last[:, -1] - FIRST_TEXT_ID + 1) % (subject.config["vocab_size"] - FIRST_TEXT_ID)
    require_blind(
        inputs._replace(ids=last),
        lambda logits: logits[:, :-1],
        "its logits change with a later token: attention must be causal, and blocks look only back.",
    )
    subject.require(
        not torch.equal(logits_of(module, inputs._replace(ids=last))[:, -1], wanted[:, -1]),
        "its logits do not change with the token they follow: the model does not read its ids.",
    )
    source, lengths = inputs.source, inputs.source_lengths
    alone = Inputs(inputs.ids[1:])
    if source is not None and lengths is not None:
        alone = alone._replace(source=source[1:], source_lengths=lengths[1:])
    subject.require_close(
        logits_of(module, alone), wanted[1:], "its logits of a row change with the other rows of the batch."
    )
    if source is not None and lengths is not None:
        padding = torch.arange(source.shape[1]) >= lengths[:, None]
        require_blind(
            inputs._replace(source=source.where(~padding, FIRST_TEXT_ID)),
            lambda logits: logits,
            "its logits change with the padding of the source: mask it by source_lengths, in the encoder and in the"
            " decoder's attention to it.",
        )


def check_reference(subject: Subject, reference: Reference) -> None:
    """Logits are those of another implementation."""
    inputs = subject.inputs
    with torch.no_grad():
        wanted = reference(subject.checkpoint.path)(inputs).float()
    subject.require_close(
        logits_of(subject.loaded(subject.checkpoint).module, inputs),
        wanted,
        "its logits are not the reference's: compare the state after each block, and the names of the weights.",
    )


def check_merge(subject: Subject) -> None:
    """An adapter on disk, and a model that it is merged into, give the logits that were trained."""
    model = subject.adapted()
    model.module.eval()
    wanted = logits_of(model.module, subject.inputs)
    paths = adaptable(subject.loaded(subject.checkpoint).module, subject.architecture)
    pairs = pairs_of(model.module)
    rank = next(iter(pairs.values()))[0].shape[0]
    # As `adapt` has scaled them.
    described = describe_adapter(paths, subject.architecture, rank=rank, alpha=FinetuneConfig().alpha, dropout=0.0)
    with commit_folder(subject.folder / "adapter", kind="adapter", inputs={}) as work:
        write_adapter(work, config=described, pairs=pairs, metadata={})
        work.finish()
    adapter = Adapter.open(subject.folder / "adapter")
    subject.require(
        torch.equal(logits_of(subject.loaded(subject.store, adapter=adapter).module, subject.inputs), wanted),
        "an adapter that was written and read again gives other logits: what it adapts has another name.",
    )
    merge(subject.store, adapter, subject.folder / "merged", MergeConfig(dtype="float32"), manager=subject.manager)
    merged = subject.loaded(Checkpoint.open(subject.folder / "merged"))
    subject.require_close(
        logits_of(merged.module, subject.inputs),
        wanted,
        "merged with an adapter it gives other logits than with the adapter beside it: an adapted layer must be called,"
        " and compute nothing but its product.",
        share=_MERGED,
    )


def check_generation(subject: Subject) -> None:
    """Token by token over a cache, the logits are those of the whole sequence at once."""
    module = subject.loaded(subject.checkpoint).module
    wanted = logits_of(module, subject.inputs)
    with torch.no_grad():
        if isinstance(module, CausalModel):
            found = _causal_steps(module, subject.inputs.ids)
        else:
            found = _seq2seq_steps(cast(Seq2SeqModel, module), subject.inputs)
    subject.require_close(
        found,
        wanted,
        "with a cache its logits are others than without: positions must go on from the cache's, every layer store its"
        " keys and values under its own number, and a reordered cache give each row what it was told.",
    )
    if isinstance(module, CausalModel):
        subject.require(
            module.context >= wanted.shape[1],
            f"its context is {module.context}: it is the longest sequence, in tokens.",
        )


def _causal_steps(module: CausalModel, ids: Tensor) -> Tensor:
    try:
        cache = module.new_cache(*ids.shape)
    except NotImplementedError as fault:
        raise LeftOut(f"{fault}, so it does not generate") from fault
    hidden = [module.hidden(ids[:, :_PROMPT], cache=cache)]
    hidden += [module.hidden(ids[:, at : at + 1], cache=cache) for at in range(_PROMPT, ids.shape[1])]
    return module.head(torch.cat(hidden, dim=1))


def _seq2seq_steps(module: Seq2SeqModel, inputs: Inputs) -> Tensor:
    """The rows change places on the way, as beams do."""
    ids, source, lengths = inputs.ids, inputs.source, inputs.source_lengths
    assert source is not None
    assert lengths is not None
    cache = module.new_cache(module.encode(source, lengths), lengths, capacity=ids.shape[1])
    hidden = [module.decode(ids[:, :_PROMPT], cache=cache)]
    swapped = torch.arange(ids.shape[0]).flip(0)
    cache.reorder(swapped)
    for at in range(_PROMPT, ids.shape[1]):
        step = module.decode(ids[swapped, at : at + 1], cache=cache)
        # Swapped twice is where it was.
        hidden.append(step[swapped])
    return module.head(torch.cat(hidden, dim=1))


def _ties(subject: Subject) -> set[str]:
    return {*subject.architecture.ties(subject.config)}
