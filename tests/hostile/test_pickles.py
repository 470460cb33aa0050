"""Hostile and damaged pickles: each gives one sentence, no code runs, and no mutation ends in anything else."""

import base64
import json
import os
import random
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from qlora_formats.header import read_header
from qlora_pipe.cli import execute
from qlora_pipe.confined import Limits, run_confined
from qlora_pipe.stages import unpickle
from qlora_pipe.testing import tiny_checkpoint
from tests.hostile.pickle_files import WORDS_16, Call, Storage, archive, changed, pickled, saved, tensor

INDEX = "pytorch_model.bin.index.json"
WEIGHT = tensor(Storage(16), 0, (4, 4), (4, 1))
GOOD = saved({"w": torch.arange(12.0).view(3, 4), "b": torch.ones(3, dtype=torch.bfloat16)})
BYTES_OF_ITS_OWN = "its tensor 'w' does not have the bytes that its shape and strides need"


def deprecated(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


class Odd(torch.Tensor):
    """A tensor of a class of its own."""


def with_attributes(value: torch.Tensor, **attributes: object) -> torch.Tensor:
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


def of_itself(name: str) -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop[name] = loop
    return loop


def deep_list(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def twice_in_one_archive() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return archive({"w": WEIGHT}, extra={"m/data/0": bytes(64)})


# Each with the end of the sentence it must give.
CASES: dict[str, tuple[bytes, str]] = {
    "call of os.system": (archive({"w": Call(os.system, "true")}), "it asks for posix.system, which no file of"),
    "call of eval": (archive({"w": Call(eval, "1")}), "it asks for eval, which no file of weights needs"),
    "call of getattr in a tensor": (
        archive({"w": Call(torch._utils._rebuild_tensor_v2, Call(getattr, "", "join"), 0, (1,), (1,), False, None)}),
        "it asks for getattr",
    ),
    "torch.load in a tensor's state": (
        archive({"w": Call(torch._tensor._rebuild_from_type_v2, torch.load, torch.Tensor, ("/etc/passwd",), {})}),
        "it asks for torch.serialization.load",
    ),
    "call of a storage's method": (
        archive({"w": Call(torch.UntypedStorage.from_file, "/etc/passwd", False, 9)}),
        "it asks for getattr",
    ),
    "call of what is no function": (archive(b"\x80\x02K\x01)R."), "or holds more than weights (UnpicklingError)"),
    "code in a newer protocol": (
        archive(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."),
        "or holds more than weights (UnpicklingError)",
    ),
    "name of a global with control bytes": (archive(b"\x80\x02cos\x1b[31m\nsystem\n."), "it asks for os"),
    "module of a stranger": (archive(b"\x80\x02cno.such\nThing\n)R."), "it asks for no.such.Thing"),
    "numpy array": (saved({"w": np.ones(3)}), "it asks for numpy"),
    "array of objects": (saved({"w": np.array([{}, os], dtype=object)[:1]}), "it asks for numpy"),
    "tensor of a class of its own": (
        archive({"w": Call(torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_tensor_v2, Odd, (), {})}),
        "it asks for tests.hostile.test_pickles.Odd",
    ),
    "tensor with attributes": (
        saved({"w": with_attributes(torch.ones(3), numel=7, is_conj=None)}),
        "its tensor 'w' is of a class or has attributes of its own",
    ),
    "dict with methods of its own": (
        archive(
            Call(OrderedDict, [("w", 1)], attributes=dict.fromkeys(("items", "get", "values", "keys"), OrderedDict))
        ),
        "its entry 'w' is a int and no tensor",
    ),
    "deep nesting": (archive(deep_list(500_000)), "it holds a list where a dict from names to tensors is needed"),
    "dict in itself": (archive(pickled(of_itself("a"))), "its entry 'a' is a dict and no tensor"),
    "state_dict in itself": (archive(pickled(of_itself("state_dict"))), "its entry 'state_dict' is a dict and no"),
    "list of tensors": (archive([WEIGHT]), "it holds a list where a dict"),
    "one tensor": (archive(WEIGHT), "it holds a Tensor where a dict"),
    "no tensor": (archive({}), "it holds no tensor"),
    "entry that is no tensor": (archive({"w": WEIGHT, "step": 3}), "its entry 'step' is a int and no tensor"),
    "tensor beside a state_dict": (
        archive({"state_dict": {"w": WEIGHT}, "v": WEIGHT}),
        "its entry 'state_dict' is a dict and no tensor",
    ),
    "name a number": (archive({3: WEIGHT}), "one of its names is a int and no text"),
    "name of bytes": (archive({b"w": WEIGHT}), "and no text"),
    "name empty": (archive({"": WEIGHT}), "'' is no tensor name (printable, 1 to 512 bytes)"),
    "name with a newline": (archive({"a\nb": WEIGHT}), r"'a\nb' is no tensor name"),
    "name of half a pair": (archive({"\ud800": WEIGHT}), r"'\ud800' is no tensor name"),
    "name of 513 bytes": (archive({"n" * 513: WEIGHT}), "is no tensor name (printable, 1 to 512 bytes)"),
    "name of the metadata": (archive({"__metadata__": WEIGHT}), "'__metadata__' is no tensor name"),
    "65,537 tensors": (archive({f"t{n}": WEIGHT for n in range(65_537)}), "it has 65,537 tensors; at most 65,536"),
    "storage larger than its record": (archive({"w": tensor(Storage(17), 0, (4,), (1,))}), BYTES_OF_ITS_OWN),
    "storage smaller than its record": (archive({"w": tensor(Storage(15), 0, (4,), (1,))}), BYTES_OF_ITS_OWN),
    "storage of 4 TiB": (archive({"w": tensor(Storage(2**40), 0, (2**20, 2**20), (2**20, 1))}), BYTES_OF_ITS_OWN),
    "storage of a negative size": (archive({"w": tensor(Storage(-16), 0, (4,), (1,))}), BYTES_OF_ITS_OWN),
    "storage of no record": (archive({"w": tensor(Storage(16, "1"), 0, (4,), (1,))}), "it is damaged"),
    "storage outside the archive": (archive({"w": tensor(Storage(2, "../byteorder"), 0, (1,), (1,))}), "it is damaged"),
    "tensor behind its storage": (archive({"w": tensor(Storage(16), 16, (1,), (1,))}), BYTES_OF_ITS_OWN),
    "tensor beyond its storage": (archive({"w": tensor(Storage(16), 4, (4, 4), (4, 1))}), BYTES_OF_ITS_OWN),
    "tensor before its storage": (archive({"w": tensor(Storage(16), -1, (4,), (1,))}), "it is damaged"),
    "strides that wrap": (archive({"w": tensor(Storage(16), 0, (2,), (2**61,))}), BYTES_OF_ITS_OWN),
    "strides beyond the storage": (archive({"w": tensor(Storage(16), 0, (2,), (2**50,))}), BYTES_OF_ITS_OWN),
    "strides just beyond the storage": (archive({"w": tensor(Storage(16), 0, (2, 2), (15, 1))}), BYTES_OF_ITS_OWN),
    "fewer strides than sizes": (archive({"w": tensor(Storage(16), 0, (4, 4), (1,))}), "it is damaged"),
    "negative size": (archive({"w": tensor(Storage(16), 0, (-4,), (1,))}), "it is damaged"),
    "sizes whose product wraps": (archive({"w": tensor(Storage(16), 0, (2**40, 2**40), (1, 1))}), "it is damaged"),
    "rank 9": (archive({"w": tensor(Storage(16), 0, (1,) * 9, (1,) * 9)}), "has 9 dimensions; at most 8"),
    "one element, a million times": (
        saved({"w": torch.ones(1).expand(1000, 1000)}),
        "its tensors have 4,000,000 bytes, which is more than 4 times the file's",
    ),
    "memory without end": (archive({"w": Call(bytearray, 2**36)}), "memory"),
    "a tensor of 256 GiB of its own": (archive({"w": Call(torch.FloatTensor, 2**36)}), "memory"),
    "a tensor of its own": (archive({"w": Call(torch.FloatTensor, 3)}), BYTES_OF_ITS_OWN),
    "tensor on meta": (saved({"w": torch.ones(3, device="meta")}), BYTES_OF_ITS_OWN),
    "sparse tensor": (saved({"w": torch.eye(3).to_sparse()}), "its tensor 'w' is sparse or quantized"),
    "sparse rows": (saved({"w": deprecated(torch.eye(3).to_sparse_csr)}), "its tensor 'w' is sparse or quantized"),
    "quantized tensor": (
        saved({"w": deprecated(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))}),
        "it is damaged, or holds more than weights",
    ),
    "complex doubles": (
        saved({"w": torch.ones(2, dtype=torch.complex128)}),
        "its tensor 'w' is of torch.complex128, which safetensors does not know",
    ),
    "conjugate view": (
        saved({"w": torch.ones(2, dtype=torch.complex64).conj()}),
        "its tensor 'w' is a conjugate or negated view",
    ),
    "compressed pickle": (
        archive({"w": WEIGHT}, compression=zipfile.ZIP_DEFLATED),
        "its entry 'm/data.pkl' is compressed or encrypted",
    ),
    "zip bomb": (
        archive(b"\x80\x02" + b"0" * 2**26, compression=zipfile.ZIP_BZIP2),
        "its entry 'm/data.pkl' is compressed or encrypted",
    ),
    "pickle of 64 MiB and a byte": (archive(bytes(2**26 + 1)), "its pickle has 67,108,865 bytes"),
    "archive cut off": (GOOD[:-1], "its zip archive is cut off or damaged"),
    "archive cut in half": (GOOD[: len(GOOD) // 2], "its zip archive is cut off or damaged"),
    "archive with a path out of it": (
        archive({"w": WEIGHT}, extra={"../../etc/cron.d/x": b""}),
        "has the entry '../../etc/cron.d/x', which torch does not write",
    ),
    "archive with two dots in it": (
        archive({"w": WEIGHT}, extra={"m/../../x": b""}),
        "has the entry 'm/../../x', which torch does not write",
    ),
    "archive with an absolute path": (archive({"w": WEIGHT}, extra={"/etc/x": b""}), "has the entry '/etc/x'"),
    "archive with a record twice": (twice_in_one_archive(), "its zip archive has an entry twice"),
    "archive of 70,000 entries": (
        archive({"w": WEIGHT}, extra={f"m/{n}": b"" for n in range(70_000)}),
        "its zip archive has 70,004 entries; at most 65,552 are read",
    ),
    "archive without a pickle": (changed(GOOD, at=GOOD.rindex(b"data.pkl"), to=b"data.pkk"), "it is damaged"),
    "archive of nothing": (b"PK\x05\x06" + bytes(18), "it is no zip archive"),
    "numbers of another byte order": (archive({"w": WEIGHT}, byte_order=b"big"), "another byte order"),
    "byte order of a stranger": (archive({"w": WEIGHT}, byte_order=b"middle"), "another byte order"),
    "TorchScript": (archive({"w": WEIGHT}, extra={"m/constants.pkl": pickled(())}), "more than weights (RuntimeError)"),
    "empty file": (b"", "it is empty"),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS"),
    "format of before torch 1.6": (
        saved({"w": torch.ones(3)}, _use_new_zipfile_serialization=False),
        "it is no zip archive, so it is no checkpoint of torch, or one from before torch 1.6",
    ),
    "plain pickle": (pickled({"w": [1.0]}), "it is no zip archive"),
    "text": (b"<!DOCTYPE html>", "it is no zip archive"),
}


def outcomes(files: Mapping[str, bytes], folder: Path) -> dict[str, dict[str, str]]:
    """What becomes of each file, all of them in one confined process with the product's own limits."""
    folder.mkdir()
    numbered = {f"{number:05}": data for number, data in enumerate(files.values())}
    for number, data in numbered.items():
        (folder / number).write_bytes(data)
    answer = bytearray()
    limits = Limits(memory_bytes=unpickle.ALLOWANCE_BYTES, cpu_seconds=300, wait_seconds=600, output_bytes=2**28)
    request = {"folder": str(folder)}
    run_confined("tests.hostile.pickle_batch", request, what="batch", limits=limits, write=answer.extend)
    found = [json.loads(line) for line in answer.splitlines()]
    assert [one.pop("name") for one in found] == list(numbered)
    return dict(zip(files, found, strict=True))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return outcomes({name: data for name, (data, _) in CASES.items()}, tmp_path_factory.mktemp("table") / "files")


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_pickle_gives_one_sentence(table: Mapping[str, dict[str, str]], case: str) -> None:
    said = table[case].get("refused") or table[case].get("failed") or "accepted"
    assert CASES[case][1] in said
    assert "\n" not in said
    assert ("failed" in table[case]) == (CASES[case][1] == "memory")


def test_negative_strides_give_the_bytes_of_the_file_in_its_own_order(tmp_path: Path) -> None:
    # torch reads them onto meta as if they were not there; what counts is that nothing outside the record is read.
    files = {str(n): archive({"w": tensor(Storage(16), 0, (4, 4), (n, -1))}) for n in (-4, 4)}
    for one in outcomes(files, tmp_path / "files").values():
        assert load(base64.b64decode(one["written"]))["w"].numpy().tobytes() == WORDS_16


SHARED = torch.arange(12.0).view(3, 4)
WHOLE: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "one storage under several names": (
        {"embed": SHARED, "head": SHARED, "rows": SHARED[1:], "transposed": SHARED.t()},
        {"embed": SHARED, "head": SHARED, "rows": SHARED[1:], "transposed": SHARED.t()},
    ),
    "NaN and infinity": ({"w": torch.tensor([float("nan"), float("inf")])},) * 2,
    "parameters of a module": (
        torch.nn.Linear(3, 2).requires_grad_(True).state_dict(keep_vars=True) | {"x": torch.nn.Parameter(SHARED)},
    )
    * 2,
    "state_dict of a training checkpoint": ({"state_dict": {"w": SHARED}, "epoch": 3, "best": 0.5}, {"w": SHARED}),
    "model of a training checkpoint": ({"model": {"w": SHARED}, "optimizer": {"state": {}}}, {"w": SHARED}),
    "every dtype": (
        {
            str(dtype): torch.ones(3).to(dtype)
            for dtype in (
                *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
                *(torch.float8_e5m2, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8),
                *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
            )
        },
    )
    * 2,
    "empty tensors": ({"none": torch.empty(0, 3), "wide": torch.empty(0, 2**40, 2**20), "v": SHARED},) * 2,
    "odd shapes": (
        {"scalar": torch.tensor(3.5), "none": torch.empty(0, 3), "step": SHARED[:, ::2], "odd": torch.ones(7)[1:4]},
    )
    * 2,
    "more than a piece, transposed": ({"w": torch.arange(700_003.0).view(1, -1).t(), "v": SHARED},) * 2,
    "rows longer than a piece": ({"w": torch.arange(1_200_006.0).view(2, 3, 200_001).permute(1, 0, 2)[:, :, ::1]},) * 2,
}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return outcomes({name: saved(value) for name, (value, _) in WHOLE.items()}, tmp_path_factory.mktemp("x") / "files")


@pytest.mark.parametrize("case", WHOLE)
def test_what_torch_saves_is_read_to_the_bit(read: Mapping[str, dict[str, str]], case: str) -> None:
    expected = WHOLE[case][1]
    result = load(base64.b64decode(read[case]["written"]))
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert (result[name].dtype, result[name].shape) == (value.dtype, value.shape)
        assert save({"": result[name]}) == save({"": value.detach().clone(memory_format=torch.contiguous_format)}), name


def mutations(whole: bytes, *, count: int, seed: int) -> Iterator[bytes]:
    """Files with some bytes changed, lost or doubled; not in the long runs of zeros, where most are padding."""
    draws = random.Random(seed)
    spots = [position for position, byte in enumerate(whole) if byte]
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draws.choice((1, 1, 1, 2, 5))):
            at = draws.choice(spots) % len(data)
            length = min(draws.choice((1, 2, 4, 8, 64)), len(data) - at)
            match draws.randrange(6):
                case 0:
                    data[at] ^= 1 << draws.randrange(8)
                case 1:
                    data[at : at + length] = draws.randbytes(length)
                case 2:
                    data[at : at + length] = draws.choice((b"\0", b"\xff", b"\x7f")) * length
                case 3:
                    del data[at : at + length]
                case 4:
                    data[at:at] = data[at : at + length]
                case 5:
                    del data[max(at, 8) :]
        yield bytes(data)


def test_no_mutation_ends_in_anything_but_a_sentence_or_whole_tensors(
    tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    whole = saved({"w": SHARED, "t": SHARED.t(), "b": torch.ones(5, dtype=torch.bfloat16)})
    files = {str(number): data for number, data in enumerate(mutations(whole, count=3000, seed=0))}
    found = outcomes(files, tmp_path / "files")
    assert not [one["failed"] for one in found.values() if "failed" in one]
    counts = Counter("written" if "written" in one else "refused" for one in found.values())
    record_property("counted", f"{len(files)} mutated pickles: {counts['refused']} refused, {counts['written']} read")
    assert counts["refused"] > counts["written"] > 0
    for name, one in found.items():
        if "written" in one:
            (tmp_path / name).write_bytes(base64.b64decode(one["written"]))
            assert read_header(tmp_path / name).entries


def model_of(folder: Path, data: bytes) -> Path:
    tiny_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(data)
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for n in (1, 2):
        name = f"pytorch_model-0000{n}-of-00002.bin"
        (folder / name).write_bytes(saved({f"layers.{n}.weight": torch.ones(n)}))
        weight_map[f"layers.{n}.weight"] = name
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))
    return folder


def place(name: str, file: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][name] = file
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def instead_of_shard_1(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        shard = folder / "pytorch_model-00001-of-00002.bin"
        shard.rename(folder.parent / "elsewhere.bin")
        make(shard)

    return damage


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "index broken": (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} is not valid JSON"),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX} has no weight_map"),
    "file in the folder above": (
        place("x", "../pytorch_model.bin"),
        "in '../pytorch_model.bin', which is no file name",
    ),
    "file by an absolute path": (place("x", "/etc/passwd"), "in '/etc/passwd', which is no file name"),
    "file name a number": (place("x", 3), "in '3', which is no file name"),
    "shard missing": (instead_of_shard_1(lambda _: None), "lacks the shard pytorch_model-00001-of-00002.bin"),
    "shard a pipe": (
        instead_of_shard_1(os.mkfifo),
        "model-00001-of-00002.bin is a pipe or a device where a file is needed",
    ),
    "shard a folder": (instead_of_shard_1(Path.mkdir), "model-00001-of-00002.bin is a folder where a file is needed"),
    "shard a link out": (
        instead_of_shard_1(lambda shard: shard.symlink_to(shard.parent.parent / "elsewhere.bin")),
        "pytorch_model-00001-of-00002.bin is a link that leads out of its folder",
    ),
    "config missing": (lambda folder: (folder / "config.json").unlink(), "is not a model: it has no config.json"),
    "config broken": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "already in 4 bits": (
        lambda folder: (folder / "config.json").write_text(
            '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}'
        ),
        "is already a 4-bit checkpoint, and of those only safetensors are read",
    ),
    "tokenizer a link out": (
        lambda folder: (folder / "tokenizer.json").symlink_to("/etc/hostname"),
        "tokenizer.json is a link that leads out of its folder",
    ),
    "one file that is a link out": (
        lambda folder: (folder / "pytorch_model.bin").symlink_to("/etc/hostname"),
        "pytorch_model.bin is a link that leads out of its folder",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_hostile_folder_of_pickles_gives_one_sentence_before_one_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unpickle, "run_confined", lambda *_, **__: pytest.fail("a pickle was read"))
    damage, sentence = FOLDERS[case]
    damage(sharded(tmp_path / "model"))
    assert execute(["quantize", str(tmp_path / "model"), str(tmp_path / "store"), "--allow-pickle"]) == 65
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert sentence in last


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (lambda proof: archive({"w": Call(os.system, f"touch {proof}")}), "it asks for posix.system"),
        (lambda proof: archive({"w": Call(bytearray, 2**36)}), "it needs more than the 512 MiB of memory that it may"),
    ],
    ids=["code", "memory"],
)
def test_the_command_prints_the_sentence_and_leaves_nothing_behind(
    payload: Callable[[Path], bytes], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = model_of(tmp_path / "source", payload(tmp_path / "proof"))
    assert execute(["quantize", str(source), str(tmp_path / "store"), "--allow-pickle"]) == 65
    printed = capfd.readouterr().err
    assert f"error: cannot read {source / 'pytorch_model.bin'}: {sentence}" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "store").exists()
