"""An adapter to start from, made beside a store: what is in it, what a kill costs, and whose base it is for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_formats.commit import commit_folder
from qlora_formats.manifest import Manifest
from qlora_formats.store import StoredWeight
from qlora_kernels import dequantize_reference
from qlora_pipe.architecture import Architecture
from qlora_pipe.artifacts import Adapter, Checkpoint, QuantizedCheckpoint, open_model
from qlora_pipe.cli import execute
from qlora_pipe.config import QuantizeConfig
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.hookspecs import hookimpl
from qlora_pipe.nn.linear import quantized_tensor
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.stages import adapter_init
from qlora_pipe.stages.adapter_init import parse_adapter_init, write_initial_adapter
from qlora_pipe.stages.load import load
from qlora_pipe.stages.quantize import quantize
from qlora_pipe.testing import tiny_checkpoint
from qlora_plugins.llama import register_architectures
from tests.formats.test_commit import Stop, World
from tests.pipe.adapters import make_adapter
from tests.pipe.runs import command, contents, finetune_line, metrics, small_checkpoint, write_rows

RANK = 5
MLP = "model.layers.*.mlp.*_proj"


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "source", intermediate_size=73)


def make(source: Path, out: Path, **settings: Any) -> Path:
    assert execute(command("quantize", source, out, **{"adapter_rank": RANK, **settings})) == 0
    return out


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    """A store with an adapter of one iteration beside it."""
    return make(source, source.parent / "plain", adapter_init="loftq")


@pytest.fixture(scope="module")
def bound(source: Path) -> Path:
    """A store that four iterations have bound to the adapter beside it."""
    return make(source, source.parent / "bound", adapter_init="loftq:4")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def beside(store: Path) -> Path:
    return store.with_name(f"{store.name}-loftq")


def dense(store: Path) -> dict[str, torch.Tensor]:
    weights = QuantizedCheckpoint.open(store).weights
    found = {name: weights.weight(name) for name in weights.names}
    return {
        name: dequantize_reference(quantized_tensor(stored, name=name), torch.float32)
        if isinstance(stored, StoredWeight)
        else stored.float()
        for name, stored in found.items()
    }


def test_the_adapter_holds_the_best_pairs_for_what_the_store_has_lost(source: Path, plain: Path) -> None:
    exact, lossy, adapter = load_file(source / "model.safetensors"), dense(plain), Adapter.open(beside(plain)).folder
    known = Manifest.read(beside(plain)).files["adapter_model.safetensors"].facts["layers"]
    assert len(adapter.pairs) == len(known) == 14
    for layer, (a, b) in adapter.pairs.items():
        weight = exact[f"{layer}.weight"].double()
        residual = weight - lossy[f"{layer}.weight"].double()
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        best = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
        product = adapter.config.scale(layer) * (b.double() @ a.double())
        assert (product - best).norm() <= 1e-5 * best.norm()
        measured = [float((residual - found).norm() / weight.norm()) for found in (0, product)]
        assert known[layer] == pytest.approx(measured, rel=1e-3)
        assert known[layer][1] < known[layer][0]


def test_the_adapter_is_one_of_scale_1_on_every_layer_that_finetune_would_adapt(
    plain: Path, rows: Path, tmp_path: Path
) -> None:
    assert execute(finetune_line(plain, rows, tmp_path / "run", rank=RANK, steps=1)) == 0
    trained, ours = (Adapter.open(path).folder for path in (tmp_path / "run", beside(plain)))
    assert ours.modules == trained.modules
    assert (ours.config.r, ours.config.lora_alpha, ours.config.lora_dropout) == (RANK, RANK, 0.0)
    assert ours.config.target_modules == trained.config.target_modules
    assert ours.config.task_type == "CAUSAL_LM"
    written = json.loads((beside(plain) / "adapter_config.json").read_text())
    # The pairs are ordinary weights to whoever loads them: nothing else is to be done to the base.
    assert written["init_lora_weights"] is True
    names = {path.name for path in beside(plain).iterdir()}
    assert names == {path.name for path in (tmp_path / "run" / "final").iterdir()}


def test_one_iteration_leaves_the_store_as_it_is_and_may_come_later(source: Path, plain: Path, tmp_path: Path) -> None:
    ordinary = make(source, tmp_path / "store")
    assert contents(ordinary) == contents(plain)
    assert not beside(ordinary).exists()
    make(source, ordinary, adapter_init="loftq:1")
    assert contents(ordinary) == contents(plain)
    assert contents(beside(ordinary)) == contents(beside(plain))


def test_more_iterations_change_the_adapted_weights_and_end_closer(source: Path, plain: Path, bound: Path) -> None:
    one, four = (Manifest.read(beside(store)) for store in (plain, bound))
    assert four.inputs["base"]["manifest"] == Manifest.read(bound).digest
    assert one.inputs["base"]["manifest"] == Manifest.read(plain).digest
    errors = [m.files["adapter_model.safetensors"].facts["layers"] for m in (one, four)]
    assert all(errors[1][layer][1] <= errors[0][layer][1] for layer in errors[0])
    means = [sum(after for _, after in found.values()) / len(found) for found in errors]
    assert means[1] < 0.97 * means[0]
    first, second = dense(plain), dense(bound)
    for name in first:
        assert torch.equal(first[name], second[name]) == ("_proj" not in name)


def test_the_manifest_of_a_bound_store_says_so_and_that_of_another_does_not(plain: Path, bound: Path) -> None:
    assert Manifest.read(bound).fields["bound_adapter"] == {"method": "loftq", "rank": RANK, "iterations": 4}
    assert QuantizedCheckpoint.open(bound).bound == ("loftq", RANK, 4)
    assert "bound_adapter" not in Manifest.read(plain).fields
    assert QuantizedCheckpoint.open(plain).bound is None


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    base = open_model(folder)
    model = load(
        base,
        find_architecture(load_plugins(), "llama"),
        dtype=torch.float32,
        device=torch.device("cpu"),
        adapter=None if adapter is None else Adapter.open(adapter),
    )
    ids = torch.randint(3, 259, (2, 31), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.causal.head(model.causal.hidden(ids))


@pytest.mark.parametrize("which", ["plain", "bound"])
def test_with_the_adapter_the_store_comes_closer_to_its_source(
    source: Path, which: str, request: pytest.FixtureRequest
) -> None:
    store, exact = request.getfixturevalue(which), logits(source)
    without, with_it = ((logits(store, adapter) - exact).norm() for adapter in (None, beside(store)))
    assert with_it < 0.9 * without


@pytest.mark.parametrize("init", ["loftq", "loftq:5"])
def test_a_fine_tune_of_a_trained_model_starts_lower_than_from_zero(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], init: str
) -> None:
    source, told = shared_data / "models" / "stories260K", tmp_path / "told.txt"
    assert execute(command("generate", source, prompt="Once upon a time", max_new_tokens=300)) == 0
    told.write_text(f"Once upon a time{capsys.readouterr().out}")
    store = make(source, tmp_path / "store", adapter_init=init, adapter_rank=16)
    starts = {}
    for name, adapter in (("loftq", beside(store)), ("zero", None)):
        base = store if adapter else make(source, tmp_path / "plain")
        line = command(
            "finetune", base, data=f"text:{told}", eval_data=f"text:{told}", out=tmp_path / name, adapter=adapter,
            steps=1, batch_size=8, max_tokens=64, dropout=0, threads=1,
        )  # fmt: skip
        assert execute(line) == 0
        starts[name] = metrics(tmp_path / name)[0]
    for measure in ("loss", "eval_loss_start"):
        assert starts["loftq"][measure] < 0.98 * starts["zero"][measure]


@pytest.mark.parametrize("init", ["loftq", "loftq:3"])
def test_the_bytes_do_not_depend_on_the_place_or_the_number_of_threads(source: Path, tmp_path: Path, init: str) -> None:
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = make(source, tmp_path / str(threads) / "store", adapter_init=init)
        found.append((contents(out), contents(beside(out))))
    assert found[0] == found[1]
    assert str(tmp_path).encode() not in b"".join(found[0][1].values())


def test_a_finished_pair_is_left_alone_and_other_settings_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make(source, tmp_path / "store", adapter_init="loftq:2")
    before = contents(tmp_path)
    capsys.readouterr()
    make(source, store, adapter_init="loftq:2")
    assert capsys.readouterr().out.count("already done") == 2
    for settings, words in (
        ({"adapter_init": "loftq:3"}, 'settings.adapter_init was "loftq:2" and is now "loftq:3"'),
        ({"adapter_init": "loftq:2", "adapter_rank": 6}, "settings.adapter_rank was 5 and is now 6"),
        ({}, 'settings.adapter_init was "loftq:2" and is now absent'),
    ):
        assert execute(command("quantize", source, store, **{"adapter_rank": RANK, **settings})) == 73
        assert words in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_another_rank_beside_an_ordinary_store_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make(source, tmp_path / "store", adapter_init="loftq")
    assert execute(command("quantize", source, store, adapter_init="loftq", adapter_rank=6)) == 73
    assert f"store-loftq was made from other inputs or settings: settings.rank was {RANK}" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources_get_float32_pairs(tmp_path: Path, dtype: torch.dtype) -> None:
    store = make(small_checkpoint(tmp_path / "source", dtype=dtype), tmp_path / "store", adapter_init="loftq:2")
    pairs = Adapter.open(beside(store)).folder.pairs
    assert all(part.dtype == torch.float32 and part.isfinite().all() for pair in pairs.values() for part in pair)
    assert all(b.any() for _, b in pairs.values())


def test_weights_of_zeros_give_finite_pairs_that_can_be_trained(rows: Path, tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    gone, holed = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    weights[f"{gone}.weight"].zero_()
    weights[f"{holed}.weight"][:12] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for init in ("loftq", "loftq:3"):
        store = make(folder, tmp_path / init.replace(":", ""), adapter_init=init)
        pairs = Adapter.open(beside(store)).folder.pairs
        assert all(part.isfinite().all() for pair in pairs.values() for part in pair)
        assert not pairs[gone][1].any()
        run = tmp_path / f"run-{store.name}"
        assert execute(finetune_line(store, rows, run, adapter=beside(store), rank=None, steps=2)) == 0
        assert Adapter.open(run).folder.pairs[gone][1].any(), "it never got a gradient"


class HalfQuantised:
    """The LLaMA family under another name, with the attention left in 16 bits."""

    @hookimpl
    def register_architectures(self) -> list[Architecture]:
        llama = register_architectures()[0]
        kept = {name: getattr(llama, name) for name in ("kind", "task_type", "build", "blocks", "keep_16bit", "adapt")}
        return [Architecture(name="half", model_types=("half",), quantize=(f"{MLP}.weight",), **kept)]


def test_layers_kept_in_16_bits_start_as_lora_does(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", model_type="half")
    config = QuantizeConfig(adapter_init="loftq:2", adapter_rank=RANK)
    quantize(Checkpoint.open(source), tmp_path / "store", config, manager=load_plugins(HalfQuantised()))
    pairs = Adapter.open(tmp_path / "store-loftq").folder.pairs
    assert len(pairs) == 14
    for layer, (a, b) in pairs.items():
        assert bool(b.any()) == (".mlp." in layer)
        assert (a.norm(dim=1) > 0).all()


def test_a_kill_at_any_moment_costs_one_block_and_not_a_bit(
    source: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, found = World(monkeypatch), 0
    original = adapter_init.starting_pair

    def counted(residual: torch.Tensor, *, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal found
        found += 1
        return original(residual, rank=rank)

    monkeypatch.setattr(adapter_init, "starting_pair", counted)
    checkpoint, store, manager = Checkpoint.open(source), QuantizedCheckpoint.open(plain), load_plugins()

    def write(out: Path) -> int:
        nonlocal found
        found = 0
        write_initial_adapter(checkpoint, store, out, rank=RANK, manager=manager)
        return found

    world.arm(-1)
    assert write(tmp_path / "reference") == 14
    assert contents(tmp_path / "reference") == contents(beside(plain))
    moments = world.moment
    assert moments > 150
    # Every moment is tested on the protocol itself; these lie in every phase of this use of it.
    for moment in range(0, moments, 3):
        out = tmp_path / str(moment) / "out"
        world.arm(moment)
        with pytest.raises(Stop):
            write(out)
        there = {path.name for path in out.parent.glob("*out*/*")}
        parts = sum(name.startswith("part-") for name in there)
        assert write(out) in ({0} if "README.md" in there else {14 - 7 * parts}), moment
        assert contents(out) == contents(beside(plain)), moment


def test_a_store_that_was_finished_before_a_kill_gets_its_adapter_from_the_rerun(
    source: Path, bound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("qlora_pipe.stages.quantize.write_initial_adapter", killed)
        with pytest.raises(Stop):
            make(source, tmp_path / "bound", adapter_init="loftq:4")
    assert not beside(tmp_path / "bound").exists()
    make(source, tmp_path / "bound", adapter_init="loftq:4")
    assert contents(tmp_path / "bound") == contents(bound)
    assert contents(beside(tmp_path / "bound")) == contents(beside(bound))


def test_a_store_of_another_source_is_refused(plain: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(tiny_checkpoint(tmp_path / "other", seed=1, intermediate_size=73))
    with pytest.raises(DataError, match="plain was not made from other, so what it has lost of that is not known"):
        write_initial_adapter(other, QuantizedCheckpoint.open(plain), tmp_path / "out", rank=2, manager=load_plugins())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "loftq:", "loftq:0", "loftq:00", "loftq:05", "loftq:-1", "loftq:+1", "loftq:1.5", "loftq:1e3", "loftq: 1",
        "loftq:1 ", "loftq:1\n", "loftq\n", " loftq", "LoftQ", "loftq:101", "loftq:999999999", "loftq:" + "9" * 5000,
        "loftq:٣", "loftq:²", "loftq:0x1", "loftq:1:2", "loftq=1", "pissa", "none", "\x00", "loftq:\ud800",
    ],
)  # fmt: skip
def test_a_setting_that_is_none_is_refused_with_what_it_takes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"adapter_init takes loftq or loftq:N with N iterations from 1 to 100") as at:
        parse_adapter_init(text)
    assert len(str(at.value)) < 300
    assert str(at.value).isprintable()


def test_the_setting_says_whether_the_store_changes() -> None:
    found = {text: parse_adapter_init(text).iterations for text in ("loftq", "loftq:1", "loftq:5", "loftq:100")}
    assert found == {"loftq": 1, "loftq:1": 1, "loftq:5": 5, "loftq:100": 100}
    assert not parse_adapter_init("loftq:1").changes_the_base
    assert parse_adapter_init("loftq:2").changes_the_base


def test_a_setting_that_is_refused_leaves_nothing_behind(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(command("quantize", source, tmp_path / "store", adapter_init="loftq:0")) == 78
    assert "was given 'loftq:0'" in capsys.readouterr().err
    assert execute(command("quantize", source, tmp_path / "store", adapter_init="loftq", adapter_rank=0)) == 78
    assert not list(tmp_path.iterdir())


def test_a_fine_tune_on_a_bound_store_wants_its_adapter(
    bound: Path, plain: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for adapter, words in (
        (None, "none was given. Add --adapter with the folder that `quantize` wrote beside the store"),
        (beside(plain), "the one given was made for another base. Add --adapter"),
    ):
        assert execute(finetune_line(bound, rows, tmp_path / "run", adapter=adapter)) == 78
        said = capsys.readouterr().err
        assert "error: bound was quantised for an adapter (loftq, rank 5, 4 iterations)" in said
        assert words in said
        assert not (tmp_path / "run").exists()


def test_a_fine_tune_goes_on_from_the_adapter_and_from_what_was_trained_from_it(
    bound: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    # The rank of the run's own settings has no say: the adapter has one.
    assert execute(finetune_line(bound, rows, first, adapter=beside(bound), rank=2)) == 0
    assert execute(finetune_line(bound, rows, second, adapter=first)) == 0
    assert "adapter" not in capsys.readouterr().err
    trained = Adapter.open(second).folder
    assert (trained.config.r, trained.config.lora_alpha) == (RANK, RANK)
    assert metrics(second)[0]["eval_loss_start"] == metrics(first)[-1]["eval_loss"]


def test_an_adapter_that_does_not_say_its_base_is_taken_with_a_note(
    bound: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = make_adapter(tmp_path / "silent", {"model.layers.0.mlp.down_proj": 1e-2}, shape=(32, 73))
    assert execute(finetune_line(bound, rows, tmp_path / "run", adapter=silent, rank=None, steps=1)) == 0
    said = capsys.readouterr().err
    assert "note: bound was quantised for an adapter" in said
    assert "the one given does not say which base it was made for." in said


def test_a_fine_tune_from_an_adapter_of_another_base_says_so(
    plain: Path, bound: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(finetune_line(plain, rows, tmp_path / "run", adapter=beside(bound), rank=None, steps=1)) == 0
    assert "note: the adapter to go on from was trained on another base than this one." in capsys.readouterr().err


def test_merge_and_generate_say_what_a_bound_store_lacks_and_are_silent_when_it_lacks_nothing(
    bound: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "bound was quantised for an adapter (loftq, rank 5, 4 iterations)"
    generate = {"prompt": "once", "max_new_tokens": 2}
    for line, notes in (
        (command("generate", bound, **generate), 1),
        (command("generate", bound, adapter=beside(plain), **generate), 1),
        (command("generate", bound, adapter=beside(bound), **generate), 0),
        (command("generate", plain, **generate), 0),
        (command("merge", bound, beside(plain), tmp_path / "wrong", min_retention=0), 1),
        (command("merge", bound, beside(bound), tmp_path / "right", dtype="float32"), 0),
    ):
        capsys.readouterr()
        assert execute(line) == 0
        assert capsys.readouterr().err.count(words) == notes, line


def test_an_export_of_a_bound_store_says_what_else_to_publish(
    bound: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for store, notes in ((bound, 1), (plain, 0)):
        # Without a repository's name nothing is sent anywhere.
        assert execute(command("export", store)) == 2
        assert capsys.readouterr().err.count("stands for the model only with it: publish that, too") == notes


@pytest.mark.parametrize(
    "field",
    [5, [], {}, {"method": "loftq"}, {"method": "loftq", "rank": 0, "iterations": 2},
     {"method": 3, "rank": 4, "iterations": 2}, {"method": "loftq", "rank": True, "iterations": 2},
     {"method": "loftq", "rank": 1.5, "iterations": 2}, {"method": "x" * 9000}],
)  # fmt: skip
def test_a_bond_that_is_not_understood_is_refused_in_one_sentence(bound: Path, tmp_path: Path, field: object) -> None:
    copied = rewritten(bound, tmp_path / "store", {"bound_adapter": field})
    with pytest.raises(DataError, match=r"binds the store to an adapter in a way that is not understood") as at:
        _ = QuantizedCheckpoint.open(copied).bound
    assert len(str(at.value)) < 300


def rewritten(store: Path, out: Path, fields: Mapping[str, Any]) -> Path:
    """The same store with other fields in its manifest."""
    manifest = Manifest.read(store)
    with commit_folder(out, kind="store", inputs=manifest.inputs) as work:
        for name in manifest.files:
            work.copy(store / name, name)
        work.finish({**manifest.fields, **fields})
    return out


def test_a_bound_store_is_not_called_by_its_sources_name(source: Path, tmp_path: Path) -> None:
    # Whoever loads the source in 4 bits gets the ordinary store, never this one.
    named = Checkpoint(source, Checkpoint.open(source).weights, "someone/model", "0" * 40)
    for init, name in (("loftq", "someone/model"), ("loftq:2", None)):
        out = tmp_path / init.replace(":", "")
        quantize(named, out, QuantizeConfig(adapter_init=init, adapter_rank=2), manager=load_plugins())
        assert QuantizedCheckpoint.open(out).hub_name == name
        assert Adapter.open(beside(out)).folder.config.base_model_name_or_path == name


def test_a_pipeline_trains_from_the_adapter_that_quantize_writes(
    source: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text(
        f"quantize: {{source: {source}, out: store, adapter_init: 'loftq:2', adapter_rank: 3}}\n"
        "finetune: {data: 'jsonl:rows.jsonl', out: run, steps: 1, batch_size: 2, dropout: 0}\n"
        "merge: {out: merged, dtype: float32}\n"
    )
    assert execute(["run", "pipeline.yaml"]) == 0
    assert "quantised for an adapter" not in capsys.readouterr().err
    assert Adapter.open("run").folder.config.r == 3
    before = contents(tmp_path)
    assert execute(["run", "pipeline.yaml"]) == 0
    assert contents(tmp_path) == before
    Path("pipeline.yaml").write_text(f"quantize: {{source: {source}, out: other, adapter_init: 'pissa'}}\n")
    assert execute(["run", "pipeline.yaml"]) == 78
    assert not Path("other").exists()
