"""Our safetensors reader and writer against the safetensors library."""

import io
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_formats.errors import FormatError
from qlora_formats.header import read_header
from qlora_formats.loading import Load
from qlora_formats.tensorfile import DTYPES, TensorFile, TensorPlan, write_tensors

SHAPES = [(), (1,), (7, 13), (3, 1, 5), (0,), (4, 0, 2), (255, 3)]


def some_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    n_bytes = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (n_bytes,), dtype=torch.uint8).view(dtype).view(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


@pytest.fixture(params=["mmap", "read"])
def load(request: pytest.FixtureRequest) -> Load:
    way: Load = request.param
    return way


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{name}{list(shape)}": some_tensor(dtype, shape) for name, dtype in DTYPES.items() for shape in SHAPES}


def write(path: Path, tensors: dict[str, torch.Tensor], **options: object) -> None:
    layout = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    stream = io.BytesIO()
    write_tensors(stream, layout, tensors.__getitem__, **options)  # type: ignore[arg-type]
    path.write_bytes(stream.getvalue())


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_library_reads_what_we_write(tmp_path: Path, tensors: dict[str, torch.Tensor], alignment: int) -> None:
    path = tmp_path / "x.safetensors"
    write(path, tensors, metadata={"format": "pt", "a": "ü"}, alignment=alignment)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(same_bytes(read[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "ü"}
    first = next(iter(read_header(path).entries.values()))
    assert first.start % alignment == 0


def test_we_read_what_the_library_writes(tmp_path: Path, tensors: dict[str, torch.Tensor], load: Load) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile.open(tmp_path / "x.safetensors", load=load)
    assert file.metadata == {"format": "pt"}
    assert file.infos.keys() == tensors.keys()
    assert all(same_bytes(file.tensor(name), tensors[name]) for name in tensors)


def test_tensors_are_views_of_the_file_that_outlive_its_reader(tmp_path: Path) -> None:
    weight = torch.arange(1000, dtype=torch.float32)
    save_file({"w": weight, "v": weight[:10] + 1}, tmp_path / "x.safetensors")
    file = TensorFile.open(tmp_path / "x.safetensors")
    first, second, other = file.tensor("w"), file.tensor("w"), file.tensor("v")
    assert first.data_ptr() == second.data_ptr()
    assert abs(first.data_ptr() - other.data_ptr()) < 5000
    del file, second
    (tmp_path / "x.safetensors").unlink()
    assert torch.equal(first, weight)


def test_writing_to_a_view_never_reaches_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(9)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TensorFile.open(tmp_path / "x.safetensors").tensor("w").fill_(1.0)
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_a_tensor_at_an_odd_address_is_read_all_the_same(tmp_path: Path, load: Load) -> None:
    tensors = {"a": torch.tensor([7], dtype=torch.uint8), "b": torch.randn(5), "c": torch.randn(3).bfloat16()}
    write(tmp_path / "x.safetensors", tensors)
    file = TensorFile.open(tmp_path / "x.safetensors", load=load)
    assert file.infos["b"].start % 4 == 1
    assert all(torch.equal(file.tensor(name), tensors[name]) for name in tensors)


def test_the_same_tensors_give_the_same_bytes_in_the_order_of_the_layout(tmp_path: Path) -> None:
    tensors = {"z": torch.ones(3), "a": torch.zeros(5).half()}
    write(tmp_path / "1", tensors, metadata={"b": "2", "a": "1"})
    write(tmp_path / "2", {name: tensor.clone() for name, tensor in tensors.items()}, metadata={"a": "1", "b": "2"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert list(TensorFile.open(tmp_path / "1").infos) == ["z", "a"]


def test_slices_and_transposes_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "s": base[1:, ::2], "g": torch.nn.Parameter(base[0])}
    write(tmp_path / "x", tensors)
    file = TensorFile.open(tmp_path / "x")
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in tensors.items())


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    stream = io.BytesIO()
    write_tensors(stream, [TensorPlan("j", torch.uint8, (5,))], lambda _: b"{}   ")
    (tmp_path / "x").write_bytes(stream.getvalue())
    assert TensorFile.open(tmp_path / "x").tensor("j").numpy().tobytes() == b"{}   "


@pytest.mark.parametrize("new_size", [0, 100, 10_000])
@pytest.mark.parametrize("used", [False, True], ids=["before the first use", "after the first use"])
def test_a_file_that_changed_its_size_is_an_error_and_not_a_bus_error(
    tmp_path: Path, load: Load, new_size: int, used: bool
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.randn(2000)}, path)
    file = TensorFile.open(path, load=load)
    if used:
        file.tensor("w")
    with path.open("r+b") as stream:
        stream.truncate(new_size)
    if load == "read" and used and new_size == 10_000:
        # What was there is still there.
        file.tensor("w")
        return
    with pytest.raises(FormatError, match=r"x\.safetensors has changed its size since it was opened"):
        file.tensor("w")


@pytest.mark.parametrize("how", ["in place", "by another file"])
def test_a_file_that_was_written_anew_before_its_first_use_is_an_error(tmp_path: Path, load: Load, how: str) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    save_file({"w": torch.zeros(2000)}, path)
    file = TensorFile.open(path, load=load)
    save_file({"w": torch.ones(2000)}, other)
    os.utime(other, ns=(0, path.stat().st_mtime_ns + 1))
    if how == "in place":
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(0, other.stat().st_mtime_ns))
    else:
        other.replace(path)
    with pytest.raises(FormatError, match=r"x\.safetensors was changed or replaced since it was opened: run"):
        file.tensor("w")
    with pytest.raises(FormatError, match=r"was changed or replaced"):
        list(file.read(["w"]))


def test_a_file_that_is_replaced_or_deleted_after_its_first_use_is_read_as_it_was(tmp_path: Path, load: Load) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    save_file({"w": torch.zeros(2000), "v": torch.zeros(3)}, path)
    file = TensorFile.open(path, load=load)
    file.tensor("v")
    save_file({"w": torch.ones(2000), "v": torch.ones(3)}, other)
    other.replace(path)
    assert not file.tensor("w").any()
    path.unlink()
    assert not file.tensor("w").any()


def test_what_is_read_is_the_callers_own_and_nothing_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight = torch.randn(100, 30)
    save_file({"w": weight, "e": torch.empty(0, 3)}, path)
    file = TensorFile.open(path, load="read")
    first, second = file.tensor("w"), file.tensor("w")
    first.fill_(7.0)
    assert torch.equal(second, weight)
    assert file.tensor("e").shape == (0, 3)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


def test_small_tensors_are_read_in_any_order_and_across_gaps(tmp_path: Path) -> None:
    sizes = {"a": 3, "b": 5000, "c": 1, "d": 0, "e": 4096, "f": 9, "g": 2**20, "h": 2}
    tensors = {name: some_tensor(torch.uint8, (size,)) for name, size in sizes.items()}
    write(tmp_path / "x", tensors)
    file = TensorFile.open(tmp_path / "x")
    for names in (list(sizes), ["h", "c", "a"], ["g"], ["d"], [], ["f", "a"]):
        assert dict(file.read(names)) == {name: tensors[name].numpy().tobytes() for name in names}
    with pytest.raises(FormatError, match="has no tensor 'z'"):
        list(file.read(["a", "z"]))


def test_files_are_closed_when_nothing_refers_to_their_tensors(tmp_path: Path, load: Load) -> None:
    def is_held() -> bool:
        return any(fd.resolve() == path for fd in Path("/proc/self/fd").iterdir())

    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(2000)}, path)
    file = TensorFile.open(path, load=load)
    assert not is_held()
    weight = file.tensor("w")
    assert is_held()
    del file, weight
    assert not is_held()


def test_a_missing_tensor_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot read .*absent\.safetensors: No such file"):
        TensorFile.open(tmp_path / "absent.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"x\.safetensors has no tensor 'v'"):
        TensorFile.open(tmp_path / "x.safetensors").tensor("v")


def test_a_header_of_real_size_is_read(tmp_path: Path) -> None:
    layout = [TensorPlan(f"model.layers.{n}.mlp.experts.weight", torch.uint8, (1,)) for n in range(65_536)]
    stream = io.BytesIO()
    write_tensors(stream, layout, lambda _: b"x", metadata={"tags": json.dumps([{"tag": n} for n in range(20_000)])})
    (tmp_path / "x").write_bytes(stream.getvalue())
    assert len(TensorFile.open(tmp_path / "x").infos) == 65_536
