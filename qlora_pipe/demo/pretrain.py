"""Train the demo's base model from nothing, on a CPU: a plain loop over the corpus, the same each time on one machine.

The matrices of the blocks are updated by Muon (arXiv 2502.16982), with which so small a model learns to look back in
fewer steps than with AdamW alone; embedding and norms by AdamW.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_pipe.architecture import Architecture
from qlora_pipe.nn.loaded import tie

IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the base model is trained."""

    steps: int
    batch_size: int = 32
    muon_learning_rate: float = 0.015
    adamw_learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def new_model(architecture: Architecture, config: Mapping[str, Any]) -> nn.Module:
    """Build a model with weights drawn from torch's generator, as large as keeps activations near one."""
    model = architecture.build(config)
    tie(model, architecture.ties(config))
    depth = 2 * config["num_hidden_layers"]
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            # What is added to the residual stream is scaled by the number of additions; a tied embedding by a half.
            shrink = depth**-0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            shrink *= 0.5 if "embed_tokens" in name else 1.0
            nn.init.normal_(weight, std=shrink * weight.shape[1] ** -0.5)
    return model


def batches(texts: Sequence[Sequence[int]], *, size: int, pad_id: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and labels [B, T] in nearly the texts' order; texts of like length go together, padded right."""
    rng = Random(seed)
    pool = 16 * size
    for start in range(0, len(texts), pool):
        near = sorted(texts[start : start + pool], key=len)
        groups = [near[at : at + size] for at in range(0, len(near), size)]
        rng.shuffle(groups)
        for group in groups:
            yield pad(group, pad_id=pad_id)


def pad(texts: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Make ids and labels [B, T] of texts; a label is the next id, and padding has none."""
    ids = torch.full((len(texts), max(map(len, texts))), pad_id)
    labels = torch.full_like(ids, IGNORED)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        labels[row, : len(text) - 1] = torch.tensor(text[1:])
    return ids, labels


def mean_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels that count, in nats per token."""
    logits: Tensor = model(ids)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def pretrain(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    recipe: Recipe,
    pad_id: int,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    """Train the model in place, one pass over the texts; `report` gets each step's number and loss."""
    parameters = list(model.named_parameters())
    matrices = [weight for name, weight in parameters if weight.dim() == 2 and "layers." in name]
    others = [weight for name, weight in parameters if weight.dim() != 2 or "layers." not in name]
    decay = recipe.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon_learning_rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=recipe.adamw_learning_rate, betas=(0.9, 0.98), weight_decay=decay),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_then_cosine(recipe)) for optimizer in optimizers]
    stream = batches(texts, size=recipe.batch_size, pad_id=pad_id, seed=seed)
    for step, (ids, labels) in enumerate(stream, start=1):
        loss = mean_loss(model, ids, labels)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        report(step, loss.item())


def _warm_then_cosine(recipe: Recipe) -> Callable[[int], float]:
    """Give the learning rate's factor by step: up in a line, then down a half cosine to nearly nothing."""

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / recipe.warmup_steps)
        return rising * (0.02 + 0.49 * (1 + math.cos(math.pi * min(step / recipe.steps, 1.0))))

    return factor
