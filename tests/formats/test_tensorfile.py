"""Our safetensors reader and writer against the safetensors library."""

import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_formats.errors import FormatError
from qlora_formats.header import read_header
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


def test_we_read_what_the_library_writes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile.open(tmp_path / "x.safetensors")
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


def test_a_tensor_at_an_odd_address_is_read_all_the_same(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([7], dtype=torch.uint8), "b": torch.randn(5), "c": torch.randn(3).bfloat16()}
    write(tmp_path / "x.safetensors", tensors)
    file = TensorFile.open(tmp_path / "x.safetensors")
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
@pytest.mark.parametrize("mapped", [False, True], ids=["before mapping", "after mapping"])
def test_a_file_that_changed_its_size_is_an_error_and_not_a_bus_error(
    tmp_path: Path, new_size: int, mapped: bool
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.randn(2000)}, path)
    file = TensorFile.open(path)
    if mapped:
        file.tensor("w")
    with path.open("r+b") as stream:
        stream.truncate(new_size)
    with pytest.raises(FormatError, match=r"cannot map|changed its size since it was opened"):
        file.tensor("w")


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
