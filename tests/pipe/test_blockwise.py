"""Training block by block: whatever is kept, computed again or set aside, losses and gradients are the same."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_kernels import dequantize
from qlora_kernels import scratch as kernel_scratch
from qlora_pipe.artifacts import open_model
from qlora_pipe.cli import execute
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.batches import IGNORE, Batch
from qlora_pipe.errors import ConfigError
from qlora_pipe.nn.adapt import adapters_of
from qlora_pipe.nn.linear import LoraLinear
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.stages.load import load
from qlora_pipe.testing import tiny_checkpoint
from qlora_pipe.train import recompute
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.loss import summed_loss
from qlora_pipe.train.recompute import RecomputePlan, bytes_kept
from qlora_pipe.train.session import adapt

BLOCKS = 3
LINEARS = 7


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blockwise")
    tiny_checkpoint(folder / "source", num_hidden_layers=BLOCKS, intermediate_size=73)
    assert execute(["quantize", str(folder / "source"), str(folder / "store")]) == 0
    return folder / "store"


def adapted(store: Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> LoadedModel:
    base = open_model(store)
    family = find_architecture(load_plugins(), base.config["model_type"])
    torch.manual_seed(3)
    model = load(base, family, dtype=dtype, device=torch.device("cpu"))
    adapt(model, FinetuneConfig(rank=3, dropout=dropout), start=None)
    for layer in adapters_of(model.module).values():
        layer.lora_b.data.normal_(std=0.05)
        if dtype == torch.float64:
            layer.lora_a.data, layer.lora_b.data = layer.lora_a.data.double(), layer.lora_b.data.double()
    model.module.train()
    return model


def some_batches(*shapes: tuple[int, int]) -> list[Batch]:
    """Batches of odd sizes, a part of whose labels counts."""
    draws = torch.Generator().manual_seed(5)
    batches = []
    for shape in shapes:
        ids = torch.randint(3, 259, shape, generator=draws)
        labels = torch.where(torch.rand(shape, generator=draws) < 0.6, ids.roll(-1, 1), IGNORE)
        labels[:, 0] = 7
        trained = int((labels != IGNORE).sum())
        batches.append(Batch(ids=ids, labels=labels, tokens=ids.numel(), trained=trained, origins=()))
    return batches


def gradients(model: LoadedModel) -> dict[str, Tensor]:
    """What the adapters were given, which is taken from them."""
    found = {}
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name], parameter.grad = parameter.grad, None
    assert len(found) == 2 * BLOCKS * LINEARS
    return found


def outcome(store: Path, work: Callable[[LoadedModel], list[Tensor]], **settings: Any) -> tuple[list[Tensor], Any]:
    model = adapted(store, **settings)
    torch.manual_seed(11)
    losses = work(model)
    return losses, gradients(model)


def assert_same(found: tuple[list[Tensor], Any], wanted: tuple[list[Tensor], Any]) -> None:
    assert [float(loss) for loss in found[0]] == [float(loss) for loss in wanted[0]]
    assert found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


BATCHES = some_batches((2, 9), (1, 17), (3, 5))


def one_by_one(mode: Any = "none", **settings: Any) -> Callable[[LoadedModel], list[Tensor]]:
    def work(model: LoadedModel) -> list[Tensor]:
        passes = BlockwisePass(model, recompute=RecomputePlan(mode), **settings)
        return [loss for batch in BATCHES for loss in passes.run([batch], divisor=20.0, loss_scale=8.0)]

    return work


def together(mode: Any, **settings: Any) -> Callable[[LoadedModel], list[Tensor]]:
    def work(model: LoadedModel) -> list[Tensor]:
        passes = BlockwisePass(model, recompute=RecomputePlan(mode), **settings)
        return passes.run(BATCHES, divisor=20.0, loss_scale=8.0)

    return work


def test_losses_and_gradients_are_those_of_plain_autograd(store: Path) -> None:
    def plain(model: LoadedModel) -> list[Tensor]:
        losses = [summed_loss(model, batch) / 20.0 for batch in BATCHES]
        for loss in losses:
            (8.0 * loss).backward()
        return [loss.detach() for loss in losses]

    assert_same(outcome(store, one_by_one()), outcome(store, plain))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "set aside"])
@pytest.mark.parametrize("mode", ["all", "none", "auto"])
def test_recomputed_or_kept_or_set_aside_one_by_one_or_together_is_the_same_to_the_last_bit(
    store: Path, mode: str, offload: bool, dropout: float
) -> None:
    wanted = outcome(store, one_by_one(), dropout=dropout)
    assert_same(outcome(store, one_by_one(mode, offload=offload), dropout=dropout), wanted)
    assert_same(outcome(store, together(mode, offload=offload), dropout=dropout), wanted)


def test_dropout_draws_other_masks_for_every_layer_and_batch(store: Path) -> None:
    model = adapted(store, dropout=0.2)
    seeds: list[int] = []
    for layer in adapters_of(model.module).values():
        layer.register_forward_pre_hook(lambda layer, _: seeds.append(layer.seed))
    for block in model.causal.blocks:
        block.register_forward_pre_hook(
            lambda block, _: seeds.extend(part.seed for part in block.modules() if isinstance(part, LoraLinear))
        )
    passes = BlockwisePass(model, recompute=RecomputePlan("none"))
    passes.run(BATCHES[:1], divisor=1.0)
    first = set(seeds)
    assert len(first) == BLOCKS * LINEARS
    seeds.clear()
    passes.run(BATCHES[:1], divisor=1.0)
    assert not first & set(seeds)


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every dense weight that is made."""
    made: list[tuple[int, ...]] = []
    dequantize = kernel_scratch.dequantize
    monkeypatch.setattr(
        kernel_scratch, "dequantize", lambda q, dtype, *, out: made.append(q.shape) or dequantize(q, dtype, out=out)
    )
    return made


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("mode", ["all", "none"])
def test_a_weight_is_made_dense_once_for_a_visit_and_never_kept_for_the_next(
    store: Path, dequantized: list[Any], mode: str, batches: int
) -> None:
    model = adapted(store)
    passes = BlockwisePass(model, recompute=RecomputePlan(mode))
    # The second forward of the first block needs all its weights; without it, q, k and v are in no gradient's way.
    spared = 3 if mode == "none" else 0
    for _ in range(2):
        dequantized.clear()
        passes.run(BATCHES[:batches], divisor=1.0)
        assert len(dequantized) == 2 * BLOCKS * LINEARS - spared


def test_the_scratch_holds_one_blocks_weights_at_most(store: Path) -> None:
    model = adapted(store)
    passes = BlockwisePass(model, recompute=RecomputePlan("all"))
    passes.run(BATCHES, divisor=1.0)
    of_a_block = sum(
        math.ceil(layer.base.out_features * layer.base.in_features / 64) * 64
        for path, layer in adapters_of(model.module).items()
        if ".layers.0." in path
    )
    assert [buffer.numel() for buffer in passes._scratch._buffers.values()] == [of_a_block]


@pytest.mark.parametrize("blocks", range(BLOCKS + 1))
def test_as_many_blocks_are_kept_as_memory_has_room_for(
    store: Path, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "_SPARE_SHARE", 0.0)
    monkeypatch.setattr(recompute, "_SPARE_BYTES", 0)
    model, batch = adapted(store), BATCHES[0]
    state, told = model.causal.embed(batch.ids)
    kept = bytes_kept(model.causal.blocks[-1], state, told)
    apart = BLOCKS * state.numel() * 4 + recompute.dense_count(model.causal.blocks[0]) * 4 + kept
    plan = RecomputePlan("auto", free=lambda _: apart + blocks * kept + kept // 2)
    found = BlockwisePass(model, recompute=plan).run([batch], divisor=1.0)
    assert plan.kept == blocks
    assert float(found[0]) == float(BlockwisePass(model, recompute=RecomputePlan("all")).run([batch], divisor=1.0)[0])


def test_planning_leaves_the_random_state_alone(store: Path) -> None:
    found = []
    for mode in ("auto", "none"):
        model = adapted(store, dropout=0.3)
        torch.manual_seed(1)
        BlockwisePass(model, recompute=RecomputePlan(mode)).run(BATCHES, divisor=1.0)
        found.append(torch.get_rng_state())
    assert torch.equal(*found)


def test_an_adapter_outside_of_the_blocks_is_refused(store: Path) -> None:
    model = adapted(store)
    embedding = model.module.model
    embedding.extra = LoraLinear(torch.nn.Linear(4, 4), rank=2, scale=1.0, dropout=0.0)
    with pytest.raises(ConfigError, match=r"model\.extra lies outside"):
        BlockwisePass(model, recompute=RecomputePlan("all"))


def test_gradients_in_float64_are_those_of_a_dense_model(store: Path) -> None:
    """Against autograd through dense weights and plain products, written out here."""
    model = adapted(store, dtype=torch.float64)
    BlockwisePass(model, recompute=RecomputePlan("all")).run(BATCHES[:1], divisor=1.0)
    found = gradients(model)

    class Dense(torch.nn.Module):
        def __init__(self, layer: LoraLinear) -> None:
            super().__init__()
            self.weight = dequantize(layer.base.frozen, torch.float64)
            self.pair = [part.detach().clone().requires_grad_() for part in (layer.lora_a, layer.lora_b)]
            self.scale = layer.scale

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight + self.scale * self.pair[1] @ self.pair[0]).T

    dense = {}
    for path, layer in adapters_of(model.module).items():
        parent, _, name = path.rpartition(".")
        dense[path] = Dense(layer)
        setattr(model.module.get_submodule(parent), name, dense[path])
    summed_loss(model, BATCHES[0]).backward()
    for path, layer in dense.items():
        for name, part in zip(("lora_a", "lora_b"), layer.pair, strict=True):
            wanted = part.grad
            assert (found[f"{path}.{name}"] - wanted).abs().max() <= 1e-12 * wanted.abs().max()
