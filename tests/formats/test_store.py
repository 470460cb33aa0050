"""The 4-bit store: what is written comes back, in the promised places; foreign folders are read as well."""

import json
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_formats.commit import commit_folder
from qlora_formats.errors import FormatError
from qlora_formats.header import read_header
from qlora_formats.layout import StorePlan
from qlora_formats.manifest import Manifest
from qlora_formats.store import Store, StoredWeight, is_store
from qlora_formats.store_writing import write_store

Produce = Callable[[str], Any]
Values = Callable[[StorePlan], Produce]

CONFIG = {"model_type": "llama", "dtype": "bfloat16", "vocab_size": 100}
# Widths at which nothing is a multiple of anything, and such as real models have.
WIDTHS = [(7, 3, 5), (64, 32, 172), (1, 1, 1), (17, 128, 9), (256, 64, 512)]


def block_of(name: str) -> str | None:
    match = re.match(r"model\.layers\.\d+\.", name)
    return match[0] if match else None


def plan_of(
    widths: tuple[int, int, int] = (64, 32, 172),
    *,
    layers: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> StorePlan:
    hidden, kv, inner = widths
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "mlp.down_proj": (hidden, inner)}
    tensors = [("model.embed_tokens.weight", dtype, (100, hidden)), ("model.norm.weight", dtype, (hidden,))]
    for layer in range(layers):
        tensors += [(f"model.layers.{layer}.{name}.weight", dtype, shape) for name, shape in shapes.items()]
        tensors += [(f"model.layers.{layer}.input_layernorm.weight", dtype, (hidden,))]
        tensors += [(f"model.layers.{layer}.self_attn.q_proj.bias", torch.float32, (hidden,))]
    asked: dict[str, Any] = {"kind": "nf4", "block_size": 64, "double_quant": True, "skip_modules": ["lm_head"]}
    return StorePlan.of(
        tensors,
        block_of=block_of,
        is_quantized=lambda name: name.endswith("_proj.weight"),
        **{**asked, **settings},
    )


def write(target: Path, plan: StorePlan, produce: Produce, *, shard_mib: int = 4096) -> dict[str, dict[str, Any]]:
    with commit_folder(target, kind="store", inputs={"block_size": plan.block_size}) as folder:
        facts = write_store(
            folder,
            config=CONFIG,
            plan=plan,
            produce=produce,
            facts=lambda name: {"length": len(name)},
            shard_mib=shard_mib,
        )
        folder.finish()
    return facts


def same(a: StoredWeight | torch.Tensor, b: StoredWeight | torch.Tensor) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return all(
        isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
        if isinstance(x, torch.Tensor)
        else x == y
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("shard_mib", [0, 4096], ids=["many shards", "one file"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "fp4", "double_quant": False},
        {"block_size": 4096, "dtype": torch.float16},
        {"dtype": torch.float32, "double_quant": False, "block_size": 32},
    ],
    ids=["nf4 double", "fp4", "large blocks", "float32"],
)
def test_what_is_written_comes_back(
    tmp_path: Path, values: Values, widths: tuple[int, int, int], settings: dict[str, Any], shard_mib: int
) -> None:
    plan = plan_of(widths, **settings)
    write(tmp_path / "out", plan, values(plan), shard_mib=shard_mib)
    store = Store.open(tmp_path / "out")
    assert sorted(store.names) == sorted(weight.name for weight in plan.weights)
    assert len(store.shards) == (5 if shard_mib == 0 else 1)
    for weight in plan.weights:
        assert store.is_quantized(weight.name) == weight.quantized
        assert (store.dtype(weight.name), store.shape(weight.name)) == (weight.dtype, weight.shape)
        assert same(store.weight(weight.name), values(plan)(weight.name))
    # The library's own checks, against holes and overlaps among others.
    assert sum(len(load_file(shard)) for shard in store.shards) > len(store.names)


@pytest.mark.parametrize("shard_mib", [0, 4096], ids=["many shards", "one file"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_blocks_start_on_pages_and_lie_together_and_codes_start_on_64(
    tmp_path: Path, values: Values, widths: tuple[int, int, int], double_quant: bool, shard_mib: int
) -> None:
    plan = plan_of(widths, double_quant=double_quant)
    write(tmp_path / "out", plan, values(plan), shard_mib=shard_mib)
    quantized = {weight.name for weight in plan.weights if weight.quantized}
    blocks = []
    for shard in Store.open(tmp_path / "out").shards:
        entries = read_header(shard).entries
        runs = list(runs_of([(block_of(name), entry.start, entry.end) for name, entry in entries.items()]))
        assert [block for block, _, _ in runs if block is None] == [block for block, _, _ in runs[-1:] if block is None]
        for block, start, end in runs:
            if block is not None:
                assert (start % 4096, end % 4096) == (0, 0)
                blocks.append(block)
        assert all(entries[name].start % 64 == 0 for name in quantized & entries.keys())
    assert blocks == [f"model.layers.{layer}." for layer in range(3)]


def runs_of(entries: list[tuple[str | None, int, int]]) -> Iterator[tuple[str | None, int, int]]:
    start = 0
    for n, (block, _, end) in enumerate(entries):
        if n + 1 == len(entries) or entries[n + 1][0] != block:
            yield block, entries[start][1], end
            start = n + 1


@pytest.mark.parametrize("widths", [(64, 32, 172), (8, 4, 24), (256, 64, 512)], ids=str)
def test_every_tensor_is_aligned_to_its_own_elements_at_usual_widths(
    tmp_path: Path, values: Values, widths: tuple[int, int, int]
) -> None:
    plan = plan_of(widths)
    write(tmp_path / "out", plan, values(plan))
    for shard in Store.open(tmp_path / "out").shards:
        for entry in read_header(shard).entries.values():
            assert entry.start % {"F32": 4, "BF16": 2, "U8": 1}[entry.dtype] == 0


def test_a_block_without_a_packed_weight_follows_those_that_can_be_padded(tmp_path: Path, values: Values) -> None:
    plan = StorePlan.of(
        [(f"model.layers.{n}.w", torch.bfloat16, (5, 5)) for n in range(3)] + [("head", torch.float32, (5,))],
        block_of=block_of,
        is_quantized=lambda name: name not in {"model.layers.0.w", "head"},
        kind="nf4",
        block_size=64,
        double_quant=True,
        skip_modules=[],
    )
    write(tmp_path / "out", plan, values(plan))
    store = Store.open(tmp_path / "out")
    assert store.names == ["model.layers.1.w", "model.layers.2.w", "model.layers.0.w", "head"]
    # 25 bfloat16 would leave the float32 of the head on an odd address, so it begins another shard.
    assert len(store.shards) == 2
    assert all(same(store.weight(name), values(plan)(name)) for name in store.names)


def test_layers_are_stored_in_counting_order_whatever_the_source_order(tmp_path: Path, values: Values) -> None:
    plan = plan_of((8, 4, 24), layers=11)
    write(tmp_path / "out", plan, values(plan))
    layers = [name.split(".")[2] for name in Store.open(tmp_path / "out").names if "down_proj" in name]
    assert layers == [str(layer) for layer in range(11)]


def test_shards_keep_to_their_size_and_are_listed_in_the_index(tmp_path: Path, values: Values) -> None:
    plan = plan_of((512, 256, 1024), layers=5)
    write(tmp_path / "out", plan, values(plan), shard_mib=1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    shards = Store.open(tmp_path / "out").shards
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    headers = [read_header(shard) for shard in shards]
    sizes = [sum(entry.end - entry.start for entry in header.entries.values()) for header in headers]
    assert max(sizes) <= 2**20
    assert index["metadata"]["total_size"] == sum(sizes)


def test_the_config_says_what_transformers_would_say(tmp_path: Path, values: Values) -> None:
    for dtype, compute in [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16")]:
        plan = plan_of(dtype=dtype)
        write(tmp_path / compute / str(dtype), plan, values(plan))
        config = Store.open(tmp_path / compute / str(dtype)).config
        quantization = config.pop("quantization_config")
        assert config == CONFIG
        assert quantization["bnb_4bit_compute_dtype"] == compute
        assert quantization["llm_int8_skip_modules"] == ["lm_head"]
        assert is_store(tmp_path / compute / str(dtype))


def test_facts_and_digests_of_every_weight_stand_in_the_manifest(tmp_path: Path, values: Values) -> None:
    plan = plan_of()
    facts = write(tmp_path / "out", plan, values(plan), shard_mib=0)
    manifest = Manifest.read(tmp_path / "out")
    recorded = {name: fact for file in manifest.files.values() for name, fact in file.facts.get("tensors", {}).items()}
    assert recorded == facts
    assert facts.keys() == {weight.name for weight in plan.weights}
    assert all(fact["length"] == len(name) and len(fact["sha256"]) == 64 for name, fact in facts.items())
    assert len({fact["sha256"] for fact in facts.values()}) == len(facts)


class Stop(BaseException):
    """The process is gone."""


def test_a_write_stopped_at_any_weight_is_continued_to_the_same_bytes(tmp_path: Path, values: Values) -> None:
    plan = plan_of((17, 9, 33), layers=4)
    write(tmp_path / "reference", plan, values(plan), shard_mib=0)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "reference").iterdir()}
    asked: list[str] = []

    def produce(name: str) -> Any:
        if len(asked) == stop_at:
            raise Stop
        asked.append(name)
        return values(plan)(name)

    for stop in range(len(plan.weights)):
        stop_at = stop
        target = tmp_path / str(stop) / "out"
        with suppress(Stop):
            write(target, plan, produce, shard_mib=0)
        assert not target.exists()
        first, stop_at = list(asked), -1
        asked.clear()
        write(target, plan, produce, shard_mib=0)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == expected
        # Each shard is one block of five weights here, or one other tensor; only the shard begun is made again.
        assert len(first) + len(asked) - len(plan.weights) == (stop % 5 if stop < 20 else 0)
        asked.clear()


def test_packed_codes_are_let_go_as_soon_as_they_are_written(tmp_path: Path, values: Values) -> None:
    plan = plan_of((256, 64, 512), layers=4)
    memory: list[weakref.ref[Any]] = []

    def produce(name: str) -> Any:
        # The one before may still be in the writer's hand.
        assert [owner() for owner in memory[:-1]] == [None] * len(memory[:-1])
        value = values(plan)(name)
        if not isinstance(value, StoredWeight):
            return value
        owner = value.codes.numpy().copy()
        memory.append(weakref.ref(owner))
        return value._replace(codes=torch.from_numpy(owner))

    write(tmp_path / "out", plan, produce)
    assert len(memory) == 12


@pytest.mark.parametrize(
    ("name", "n_quantized", "kind", "dtype"),
    [
        ("stories260K-bnb-nf4-dq", 35, "nf4", torch.float32),
        ("stories260K-bnb-nf4-dq-bf16", 35, "nf4", torch.bfloat16),
        ("stories260K-bnb-fp4", 35, "fp4", torch.float32),
        ("t5-stories-280k-bnb-nf4-dq", 32, "nf4", torch.float32),
    ],
)
def test_folders_that_transformers_wrote_are_read(
    shared_data: Path, name: str, n_quantized: int, kind: str, dtype: torch.dtype
) -> None:
    path = shared_data / "interop" / name
    store = Store.open(path)
    assert is_store(path)
    assert store.manifest is None
    raw = load_file(path / "model.safetensors")
    quantized = [weight for weight in store.names if store.is_quantized(weight)]
    assert len(quantized) == n_quantized
    for weight in store.names:
        value = store.weight(weight)
        if isinstance(value, StoredWeight):
            assert (value.kind, value.dtype) == (kind, dtype)
            assert torch.equal(value.codes, raw[weight].flatten())
            assert torch.equal(value.absmax, raw[f"{weight}.absmax"])
            assert torch.equal(value.levels, raw[f"{weight}.quant_map"])
            assert value.codes.numel() * 2 == torch.Size(value.shape).numel()
            assert (value.offset is None) == (kind == "fp4")
        else:
            assert torch.equal(value, raw[weight])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_codes_stored_as_another_dtype_are_the_same_bytes(
    tmp_path: Path, shared_data: Path, storage: torch.dtype
) -> None:
    source = shared_data / "interop" / "stories260K-bnb-nf4-dq"
    ours = Store.open(source)
    raw = load_file(source / "model.safetensors")
    for name in ours.names:
        if ours.is_quantized(name):
            raw[name] = raw[name].flatten().view(storage).view(-1, 1)
    save_file(raw, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    again = Store.open(tmp_path)
    assert all(same(again.weight(name), ours.weight(name)) for name in ours.names)


def test_bits_count_codes_and_scales_but_not_what_is_of_one_size(tmp_path: Path, values: Values) -> None:
    for double_quant, bits in [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)]:
        plan = plan_of((256, 64, 512), layers=1, double_quant=double_quant)
        write(tmp_path / str(double_quant), plan, values(plan))
        store = Store.open(tmp_path / str(double_quant))
        assert store.bits("model.layers.0.self_attn.q_proj.weight") == bits
        assert store.kind("model.layers.0.self_attn.q_proj.weight") == "nf4"


def test_a_16_bit_folder_is_no_store(shared_data: Path) -> None:
    path = shared_data / "models" / "stories260K"
    assert not is_store(path)
    with pytest.raises(FormatError, match="stories260K is not a 4-bit checkpoint"):
        Store.open(path)
