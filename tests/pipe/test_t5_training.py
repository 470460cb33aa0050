"""Training a model of two sides: whatever is kept, set aside or streamed, losses and gradients are the same bits."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_formats import disk
from qlora_pipe.artifacts import open_model
from qlora_pipe.cli import execute
from qlora_pipe.config import FinetuneConfig
from qlora_pipe.data.batches import Batch, collate
from qlora_pipe.data.encode import Sample
from qlora_pipe.nn.adapt import adapters_of
from qlora_pipe.nn.loaded import LoadedModel
from qlora_pipe.residency.layout import StreamedLayout
from qlora_pipe.residency.ring import Ring
from qlora_pipe.stages import load as loading
from qlora_pipe.stages.load import load
from qlora_pipe.train import recompute
from qlora_pipe.train.blockwise import BlockwisePass
from qlora_pipe.train.loss import summed_loss
from qlora_pipe.train.recompute import RecomputePlan, bytes_kept, dense_count
from qlora_pipe.train.session import adapt
from qlora_pipe.train.shelf import Shelf
from qlora_pipe.train.signals import StopFlag, StopRequested
from qlora_plugins.t5 import register_architectures
from tests.pipe.runs import finetune_line, outcome, write_rows
from tests.t5_checkpoints import t5_checkpoint

FAMILY = register_architectures()[0]
SIZES = {"num_layers": 2, "num_decoder_layers": 3, "d_ff": 73}
BLOCKS = 5
ADAPTED = 2 * (4 + 3) + 3 * (8 + 3)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["t5", "umt5"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    t5_checkpoint(folder / "source", model_type=request.param, **SIZES)
    assert execute(["quantize", str(folder / "source"), str(folder / "store")]) == 0
    return folder / "store"


def adapted(store: Path, *, residency: Any = "auto", dropout: float = 0.0) -> LoadedModel:
    """A model with adapters that do something, in training."""
    model = load(open_model(store), FAMILY, dtype=torch.float32, device=torch.device("cpu"), residency=residency)
    torch.manual_seed(3)
    adapt(model, FinetuneConfig(rank=3, dropout=dropout), start=None)
    for layer in adapters_of(model.module).values():
        torch.nn.init.normal_(layer.lora_b, std=0.05)
    model.module.train()
    return model


def some_batch(*lengths: tuple[int, int]) -> Batch:
    """A batch of pairs of these lengths, source and target."""
    draws = torch.Generator().manual_seed(sum(map(sum, lengths)))
    samples = []
    for source, target in lengths:
        ids = torch.randint(3, 259, (target + 1,), generator=draws, dtype=torch.int32)
        trained = torch.rand(target + 1, generator=draws) < 0.7
        trained[0], trained[1] = False, True
        read = torch.randint(3, 259, (source,), generator=draws, dtype=torch.int32)
        samples.append(Sample(ids=ids.numpy(), trained=trained.numpy(), origin="row", source=read.numpy()))
    return collate([[sample] for sample in samples])


BATCHES = [some_batch((9, 5), (1, 7)), some_batch((17, 1)), some_batch((3, 11), (8, 2), (5, 5))]


def gradients(model: LoadedModel) -> dict[str, Tensor]:
    """What the adapters were given, which is taken from them."""
    found = {}
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name], parameter.grad = parameter.grad, None
    assert len(found) == 2 * ADAPTED
    return found


Outcome = tuple[list[Tensor], dict[str, Tensor]]


def outcome_of(model: LoadedModel, mode: Any = "none", *, together: bool = False, **settings: Any) -> Outcome:
    torch.manual_seed(11)
    passes = BlockwisePass(model, recompute=RecomputePlan(mode), **settings)
    windows = [BATCHES] if together else [[batch] for batch in BATCHES]
    losses = [loss for window in windows for loss in passes.run(window, divisor=20.0, loss_scale=8.0)]
    return losses, gradients(model)


def assert_same(found: Outcome, wanted: Outcome) -> None:
    assert all(bool(torch.isfinite(loss)) for loss in wanted[0])
    assert [float(loss) for loss in found[0]] == [float(loss) for loss in wanted[0]]
    assert found[1].keys() == wanted[1].keys()
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


def test_losses_and_gradients_are_those_of_plain_autograd(store: Path) -> None:
    model = adapted(store)
    losses = [summed_loss(model, batch) / 20.0 for batch in BATCHES]
    for loss in losses:
        (8.0 * loss).backward()
    assert_same(outcome_of(adapted(store)), ([loss.detach() for loss in losses], gradients(model)))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "set aside"])
@pytest.mark.parametrize("mode", ["all", "none", "auto"])
def test_recomputed_or_kept_or_set_aside_one_by_one_or_together_is_the_same_to_the_last_bit(
    store: Path, mode: str, offload: bool, dropout: float
) -> None:
    wanted = outcome_of(adapted(store, dropout=dropout))
    assert_same(outcome_of(adapted(store, dropout=dropout), mode, offload=offload), wanted)
    assert_same(outcome_of(adapted(store, dropout=dropout), mode, offload=offload, together=True), wanted)


def test_what_a_block_hands_on_as_it_is_is_not_set_aside(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelved: list[tuple[int, ...]] = []
    put = Shelf.put
    monkeypatch.setattr(Shelf, "put", lambda self, state: shelved.append(tuple(state.shape)) or put(self, state))
    BlockwisePass(adapted(store), recompute=RecomputePlan("all"), offload=True).run(BATCHES[:1], divisor=1.0)
    # Of each block what it changes: two states of the source, and three of the target.
    assert shelved == [(2, 9, 32)] * 2 + [(2, 7, 32)] * 3


@pytest.mark.parametrize("blocks", range(BLOCKS + 1))
def test_as_many_blocks_are_kept_as_memory_has_room_for_by_what_each_kind_keeps(
    store: Path, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "_SPARE_SHARE", 0.0)
    monkeypatch.setattr(recompute, "_SPARE_BYTES", 0)
    model, batch = adapted(store), BATCHES[0]
    state, told = model.language.begin(batch.inputs_on(model.device))
    encoder, decoder = (bytes_kept(model.language.blocks[last], state, told) for last in (1, 4))
    assert encoder < decoder
    of_block = [encoder] * 2 + [decoder] * 3
    inputs = BLOCKS * sum(part.numel() for part in state) * 4
    dense = max(map(dense_count, model.language.blocks)) * 4
    room = sum(of_block[BLOCKS - blocks :]) + min(of_block) // 2
    plan = RecomputePlan("auto", free=lambda _: inputs + dense + max(of_block) + room)
    BlockwisePass(model, recompute=plan).run([batch], divisor=1.0)
    assert plan.kept == blocks


@pytest.mark.parametrize("mode", ["all", "none"])
@pytest.mark.parametrize("slots", [2, 3])
def test_a_streamed_model_trains_and_evaluates_with_the_same_bits_and_its_tables_of_biases_stay(
    store: Path, monkeypatch: pytest.MonkeyPatch, slots: int, mode: str
) -> None:
    monkeypatch.setattr(
        loading,
        "_layout",
        lambda _way, placed, *, device, note: StreamedLayout(placed, device=device, slots=slots),
    )
    resident, streamed = adapted(store), adapted(store, residency="streamed")
    assert isinstance(streamed.residency, Ring)
    slot_memory = {slot.bytes.untyped_storage().data_ptr() for slot in streamed.residency._slots}
    for name, part in streamed.module.named_parameters():
        if "relative_attention_bias" in name:
            assert part.untyped_storage().data_ptr() not in slot_memory
    assert_same(outcome_of(streamed, mode, together=True), outcome_of(resident, mode))
    for model in (streamed, resident):
        model.module.eval()
    with torch.no_grad():
        for batch in BATCHES * 2:
            assert torch.equal(summed_loss(streamed, batch), summed_loss(resident, batch))


def test_a_streamed_model_decodes_with_the_same_bits(store: Path) -> None:
    found = []
    for residency in ("streamed", "auto"):
        model = adapted(store, residency=residency)
        model.module.eval()
        batch, seq2seq = BATCHES[0], model.seq2seq
        assert batch.source is not None
        assert batch.source_lengths is not None
        with torch.inference_mode():
            memory = seq2seq.encode(batch.source, batch.source_lengths)
            cache = seq2seq.new_cache(memory, batch.source_lengths, capacity=7)
            found.append(torch.cat([seq2seq.decode(ids, cache=cache) for ids in batch.ids.split(1, dim=1)], dim=1))
    assert bool(torch.isfinite(found[0]).all())
    assert torch.equal(*found)


def test_a_windows_gradient_does_not_depend_on_how_it_is_split(store: Path) -> None:
    # Rows of one length: padding beside a longer row would be another product.
    rows = [some_batch((9, 5), (9, 5)), some_batch((9, 5))]
    model = adapted(store)
    passes = BlockwisePass(model, recompute=RecomputePlan("all"))
    whole = [*passes.run(rows, divisor=7.0)], gradients(model)
    split = [loss for batch in rows for loss in passes.run([batch], divisor=7.0)], gradients(model)
    assert_same(split, whole)


@pytest.fixture
def line_to(store: Path, tmp_path: Path) -> Callable[..., list[str]]:
    rows = write_rows(tmp_path / "rows.jsonl", count=9)
    return lambda out, **settings: finetune_line(store, rows, out, **{"held_out": 0.3, **settings})


def test_a_run_stopped_at_any_place_ends_as_if_it_had_not_been(
    line_to: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What an fsync protects against is not simulated here, and each takes milliseconds.
    monkeypatch.setattr(disk, "_fsync", lambda _: None)
    settings = {"steps": 3, "save_every": 2, "accumulate": 2}
    passed, stop_at = 0, -1

    def check(_: StopFlag) -> None:
        nonlocal passed
        passed += 1
        if passed - 1 == stop_at:
            raise StopRequested(signal.SIGTERM)

    monkeypatch.setattr(StopFlag, "check", check)
    # The first run may pass more places, those of reading rows that are kept from then on.
    assert execute(line_to(tmp_path / "first", **settings)) == 0
    passed = 0
    assert execute(line_to(tmp_path / "whole", **settings)) == 0
    places = passed
    for place in range(0, places, 3):
        out = tmp_path / f"stopped-{place}"
        passed, stop_at = 0, place
        assert execute(line_to(out, **settings)) == 143
        passed, stop_at = 0, -1
        assert execute(line_to(out, **settings)) == 0
        assert outcome(out) == outcome(tmp_path / "whole"), place


@pytest.mark.parametrize("settings", [{"recompute": "all", "offload": True}, {"residency": "streamed"}], ids=str)
def test_a_run_ends_with_the_same_bytes_however_it_uses_memory(
    line_to: Callable[..., list[str]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert execute(line_to(tmp_path / "one", steps=3)) == 0
    assert execute(line_to(tmp_path / "other", steps=3, **settings)) == 0
    assert outcome(tmp_path / "one") == outcome(tmp_path / "other")


@pytest.mark.parametrize("command", ["finetune", "generate"])
def test_float16_is_refused_with_the_reason(
    line_to: Callable[..., list[str]], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    line = line_to(tmp_path / "run", dtype="float16")
    if command == "generate":
        line = ["generate", str(store), "--prompt", "x", "--dtype", "float16"]
    assert execute(line) == 78
    said = capsys.readouterr().err
    assert "models of the family t5 are not computed in float16, because their hidden states leave its range" in said
    assert "use --dtype bfloat16 or float32" in said


def test_packing_is_refused(
    line_to: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(line_to(tmp_path / "run", pack=True)) == 78
    assert "models of the family t5 cannot be trained with --pack" in capsys.readouterr().err


def test_sources_are_padded_by_their_lengths_and_counted() -> None:
    batch = BATCHES[2]
    assert batch.source is not None
    assert batch.source_lengths is not None
    assert batch.source_lengths.tolist() == [3, 8, 5]
    assert batch.source.shape == (3, 8)
    assert batch.tokens == 3 + 8 + 5 + 11 + 2 + 5
