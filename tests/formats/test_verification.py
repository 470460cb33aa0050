"""Verification: whatever single bit of a folder flips is found, and named."""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_formats.checkpoint import write_checkpoint
from qlora_formats.commit import commit_folder
from qlora_formats.header import read_header
from qlora_formats.layout import StorePlan
from qlora_formats.manifest import MANIFEST, Manifest
from qlora_formats.store_writing import write_store
from qlora_formats.verification import verify_folders

Values = Callable[[StorePlan], Callable[[str], Any]]

SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
OTHERS = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
# What follows a weight's name in the names of the tensors beside it.
BESIDE = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__nf4)$")


def block_of(name: str) -> str | None:
    match = re.match(r"model\.layers\.\d+\.", name)
    return match[0] if match else None


@pytest.fixture
def store(tmp_path: Path, values: Values) -> Path:
    """Two layers and two kept tensors in four shards, 30 KB in all, with odd widths that need padding in between."""
    linears = {"q.weight": (9, 7), "down.weight": (5, 33)}
    tensors = [
        (f"model.layers.{layer}.{name}", torch.bfloat16, shape)
        for layer in (0, 1)
        for name, shape in {**linears, "norm.weight": (7,)}.items()
    ]
    tensors += [("embed.weight", torch.bfloat16, (11, 3)), ("norm.weight", torch.bfloat16, (3,))]
    plan = StorePlan.of(
        tensors,
        block_of=block_of,
        is_quantized=lambda name: name.endswith(("q.weight", "down.weight")),
        kind="nf4",
        block_size=64,
        double_quant=True,
        skip_modules=["lm_head"],
    )
    with commit_folder(tmp_path / "store", kind="store", inputs={"source": {"repo": "a/b"}, "rate": 1e-05}) as folder:
        write_store(folder, config={"model_type": "llama"}, plan=plan, produce=values(plan), shard_mib=0)
        folder.write("tokenizer.json", b'{"model": {"vocab": {"<s>": 1}}}\n')
        folder.finish({"totals": {"rate": 2e-07}})
    return tmp_path / "store"


# Every region of every file has its first and last byte tried, and of those between each seventh, or all.
every = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.soak)], ids="step={}".format)


def sample(start: int, end: int, step: int) -> list[int]:
    return sorted({*range(start, end, step), end - 1})


def damage_of(folder: Path) -> list[str]:
    (found,) = verify_folders([folder], threads=2)
    return found.damage


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def flipped(path: Path, offsets: Iterable[int]) -> Iterator[tuple[int, list[str]]]:
    """Flip one bit at each offset in turn, another one each time, and give what verification says then."""
    for offset in offsets:
        bit = offset * 5 % 8
        flip(path, offset, bit)
        yield offset, damage_of(path.parent)
        flip(path, offset, bit)
    assert damage_of(path.parent) == []


def test_a_folder_as_it_was_written_is_whole(store: Path) -> None:
    (found,) = verify_folders([store])
    sizes = [path.stat().st_size for path in store.iterdir() if path.name != MANIFEST]
    assert found == (store, "store", len(SHARDS) + len(OTHERS), sum(sizes), [], [])


@every
@pytest.mark.parametrize("name", SHARDS)
def test_every_byte_of_a_shard_counts_and_the_weight_it_belongs_to_is_named(store: Path, name: str, step: int) -> None:
    path = store / name
    entries = read_header(path).entries
    data, data_start = path.read_bytes(), min(entry.start for entry in entries.values())
    places = {offset: tensor for tensor, entry in entries.items() for offset in range(entry.start, entry.end)}
    header_end = 8 + len(data[8:data_start].rstrip())
    regions = [(0, 8), (8, header_end)]
    paddings = [(header_end, data_start)]
    for tensor, entry in entries.items():
        is_state = "quant_state" in tensor
        end = data.index(b"}", entry.start) + 1 if is_state else entry.end
        regions.append((entry.start, end))
        paddings += [(end, entry.end)] if is_state else []
    offsets = [offset for start, end in regions for offset in sample(start, end, step)]
    # There is nothing but spaces there, thousands of them.
    offsets += [offset for start, end in paddings for offset in sample(start, end, 29 * step)]
    for offset, damage in flipped(path, offsets):
        (sentence,) = damage
        assert sentence.startswith(f"{path}: "), (offset, sentence)
        if offset < data_start:
            assert "the header does not have the sha256" in sentence, (offset, sentence)
            continue
        weight = BESIDE.sub("", places[offset])
        is_padding = any(start <= offset < end for start, end in paddings)
        expected = f"the padding of the weight {weight!r} is" if is_padding else f"the weight {weight!r} does not have"
        assert expected in sentence, (offset, sentence)


@every
@pytest.mark.parametrize("name", OTHERS)
def test_every_byte_of_a_small_file_counts(store: Path, name: str, step: int) -> None:
    path = store / name
    for offset, damage in flipped(path, sample(0, path.stat().st_size, step)):
        assert damage == [f"{path} does not have the sha256 that {MANIFEST} records: its bytes were changed"], offset


@every
def test_every_byte_of_the_manifest_counts(store: Path, step: int) -> None:
    path = store / MANIFEST
    for offset, damage in flipped(path, sample(0, path.stat().st_size, step)):
        assert str(path) in damage[0], (offset, damage)


def test_all_eight_bits_of_the_manifests_numbers_count(store: Path) -> None:
    path = store / MANIFEST
    # 1e-05 and 1E-05 are one number, so the digest of the values cannot tell them apart.
    places = [match.start() for match in re.finditer(rb"e-0", path.read_bytes())]
    assert len(places) == 2
    for place in places:
        for bit in range(8):
            flip(path, place, bit)
            assert str(path) in damage_of(store)[0]
            flip(path, place, bit)


def test_all_that_is_damaged_is_named_in_the_order_of_the_files(store: Path) -> None:
    entries = read_header(store / SHARDS[1]).entries
    weights = ["model.layers.1.q.weight", "model.layers.1.norm.weight"]
    for weight in weights:
        flip(store / SHARDS[1], entries[weight].start, 3)
    flip(store / "tokenizer.json", 4, 0)
    (store / SHARDS[3]).unlink()
    damage = damage_of(store)
    assert len(damage) == 4
    assert all(any(f"the weight {weight!r} does not" in sentence for sentence in damage) for weight in weights)
    assert any(f"lacks the file {SHARDS[3]}" in sentence for sentence in damage)
    assert any("tokenizer.json does not have the sha256" in sentence for sentence in damage)


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
@pytest.mark.parametrize("change", [-1, 1, -100, 4096])
def test_a_file_that_was_cut_off_or_has_grown_is_named_with_its_sizes(store: Path, name: str, change: int) -> None:
    size = (store / name).stat().st_size
    with (store / name).open("r+b") as file:
        file.truncate(size + change)
    how = "was cut off" if change < 0 else "has grown"
    assert damage_of(store) == [f"{store / name} {how}: it has {size + change:,} bytes where {MANIFEST} says {size:,}"]


def test_two_shards_that_were_swapped_are_both_named(store: Path) -> None:
    sizes = {(store / name).stat().st_size for name in SHARDS[:2]}
    assert len(sizes) == 1
    (store / SHARDS[0]).rename(store / "x")
    (store / SHARDS[1]).rename(store / SHARDS[0])
    (store / "x").rename(store / SHARDS[1])
    damage = damage_of(store)
    assert [sentence.partition(": ")[0] for sentence in damage] == [str(store / name) for name in SHARDS[:2]]
    assert all("the header does not have" in sentence for sentence in damage)


@pytest.mark.parametrize("name", [*SHARDS, *OTHERS])
def test_a_file_that_was_deleted_or_became_a_folder_is_named(store: Path, name: str) -> None:
    (store / name).unlink()
    expected = [f"{store} lacks the file {name} that its {MANIFEST} names: make or fetch it again"]
    assert damage_of(store) == expected
    (store / name).mkdir()
    assert damage_of(store) == expected


def test_a_folder_without_its_manifest_says_so(store: Path) -> None:
    (store / MANIFEST).unlink()
    (found,) = verify_folders([store])
    assert found.damage == [f"{store} holds no {MANIFEST}: it was never finished, or the file was deleted"]
    assert (found.kind, found.files, found.bytes) == (None, 0, 0)


def test_weights_that_were_put_there_later_are_damage_and_other_files_are_only_listed(store: Path) -> None:
    for name in ("notes.txt", "README.md", ".hidden"):
        (store / name).write_text("x")
    (found,) = verify_folders([store])
    assert (found.damage, found.unlisted) == ([], ["README.md", "notes.txt"])
    shutil.copyfile(store / SHARDS[0], store / "model.safetensors")
    (found,) = verify_folders([store])
    (sentence,) = found.damage
    assert sentence.startswith(f"{store} holds model.safetensors, which its {MANIFEST} does not name")


def test_the_files_are_compared_with_what_is_legible_of_a_damaged_manifest(store: Path) -> None:
    path = store / MANIFEST
    flip(store / "tokenizer.json", 4, 0)
    path.write_bytes(path.read_bytes().replace(b'"a/b"', b'"a/c"'))
    first, second = damage_of(store)
    assert first == f"{path} does not have the digest that it records: it was edited or damaged"
    assert "tokenizer.json does not have the sha256" in second
    path.write_bytes(path.read_bytes()[:-30])
    assert len(damage_of(store)) == 1


def test_a_shard_whose_facts_do_not_fit_its_tensors_is_hashed_as_a_whole(store: Path) -> None:
    manifest = Manifest.read(store)
    for facts in (
        {},
        {"tensors": {}},
        {"tensors": {}, "header": 5},
        {**manifest.files[SHARDS[0]].facts, "tensors": {"other": {"sha256": "0" * 64}}},
    ):
        files = {**manifest.files, SHARDS[0]: manifest.files[SHARDS[0]]._replace(facts=facts)}
        rebuilt = Manifest.build(kind=manifest.kind, inputs=manifest.inputs, files=files, fields=manifest.fields)
        (store / MANIFEST).write_bytes(rebuilt.to_bytes())
        assert damage_of(store) == []
        flip(store / SHARDS[0], 5000, 1)
        assert damage_of(store) == [
            f"{store / SHARDS[0]} does not have the sha256 that {MANIFEST} records: its bytes were changed"
        ]
        flip(store / SHARDS[0], 5000, 1)


def test_several_folders_are_read_side_by_side_with_one_count_of_bytes(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with commit_folder(other, kind="checkpoint", inputs={}) as folder:
        tensors = [("w", torch.float32, (40, 50))]
        write_checkpoint(folder, config={}, tensors=tensors, produce=lambda _: torch.ones(40, 50))
        folder.finish()
    flip(other / "model.safetensors", 2000, 0)
    seen: list[tuple[int, int]] = []
    first, second = verify_folders([store, other], progress=lambda done, total: seen.append((done, total)))
    assert (first.damage, second.kind) == ([], "checkpoint")
    assert [str(other / "model.safetensors") in sentence for sentence in second.damage] == [True]
    assert seen[-1][0] == seen[-1][1]
    headers = sum(min(entry.start for entry in read_header(store / name).entries.values()) for name in SHARDS)
    assert seen[-1][1] == first.bytes + second.bytes - headers
