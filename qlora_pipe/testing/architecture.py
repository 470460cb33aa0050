"""Whether a model family keeps what qlora_pipe builds on: for the tests of whoever writes one."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_pipe.architecture import Architecture
from qlora_pipe.testing.behaviour import (
    Reference,
    check_bfloat16,
    check_checkpoint,
    check_generation,
    check_merge,
    check_reference,
    check_sight,
    check_store,
)
from qlora_pipe.testing.structure import (
    check_adapt,
    check_blocks,
    check_configs,
    check_fields,
    check_meta,
    check_names,
    check_quantize,
)
from qlora_pipe.testing.subject import BrokenPromise, LeftOut, Subject
from qlora_pipe.testing.training import check_gradients, check_packing, check_training

# In this order: what comes later stands on what comes before.
_PROMISES: Mapping[str, Callable[[Subject], None]] = {
    "fields": check_fields,
    "meta": check_meta,
    "names": check_names,
    "blocks": check_blocks,
    "quantize": check_quantize,
    "adapt": check_adapt,
    "configs": check_configs,
    "checkpoint": check_checkpoint,
    "store": check_store,
    "bfloat16": check_bfloat16,
    "sight": check_sight,
    "training": check_training,
    "gradients": check_gradients,
    "packing": check_packing,
    "generation": check_generation,
    "merge": check_merge,
}


class Conformance(NamedTuple):
    """What a family was found to keep."""

    kept: tuple[str, ...]
    """Names of the promises, in the order in which they were checked."""
    left_out: Mapping[str, str]
    """Promises that the family does not make, each with the reason."""


def check_architecture(
    architecture: Architecture, *, config: Mapping[str, Any] | None = None, reference: Reference | None = None
) -> Conformance:
    """Check all that qlora_pipe expects of a model family, on a small model of random weights; takes a few seconds.

    `config` is that model's config.json, `architecture.tiny` without it. `reference` takes the folder of a checkpoint
    and gives a function from `Inputs` (qlora_pipe.nn.language) to another implementation's logits, which must agree
    within 1e-5 of the largest, in float32. Raises BrokenPromise, an AssertionError, at the first that is broken.
    """
    promises = {**_PROMISES}
    if reference is not None:
        promises["reference"] = partial(check_reference, reference=reference)
    left_out = {}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        subject = Subject(architecture, config=config, folder=Path(folder))
        for name, check in promises.items():
            try:
                check(subject)
            except BrokenPromise:
                raise
            except LeftOut as reason:
                left_out[name] = str(reason)
            except Exception as fault:
                about = (check.func if isinstance(check, partial) else check).__doc__ or ""
                said = about.rstrip(".")
                raise BrokenPromise(
                    f"{architecture.name}: to be checked was {name!r} ({said}), and it ended with"
                    f" {type(fault).__name__}: {fault}"
                ) from fault
    return Conformance(tuple(name for name in promises if name not in left_out), left_out)
