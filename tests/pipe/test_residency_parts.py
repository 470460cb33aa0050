"""What residencies are made of: images, lanes, the ring's order, held memory, and the choice."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_formats.errors import FormatError
from qlora_formats.tensorfile import TensorFile
from qlora_pipe.artifacts import QuantizedCheckpoint
from qlora_pipe.cli import execute
from qlora_pipe.lanes import LateLane, Mark
from qlora_pipe.plugins import find_architecture, load_plugins
from qlora_pipe.residency.choice import choose
from qlora_pipe.residency.feeder import Feeder
from qlora_pipe.residency.image import Image, Part
from qlora_pipe.residency.pinned import anonymous, hold, hold_file
from qlora_pipe.residency.ring import Ring
from qlora_pipe.stages.load import placed
from qlora_pipe.testing import tiny_checkpoint
from qlora_pipe.train.estimate import step_bytes

CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is so without a GPU")


def file_of(path: Path, tensors: dict[str, Tensor]) -> TensorFile:
    save_file(tensors, path)
    return TensorFile.open(path)


def filled(image: Image, piece_bytes: int) -> Tensor:
    out = torch.full((image.n_bytes,), 0xFF, dtype=torch.uint8)
    for piece in image.pieces(piece_bytes):
        assert piece.n_bytes <= piece_bytes
        piece.read(out[piece.at : piece.at + piece.n_bytes])
    return out


@pytest.mark.parametrize("piece_bytes", [4, 1000, 1 << 20])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.float16], ids=str)
def test_an_image_holds_the_tensors_of_its_files(tmp_path: Path, wanted: torch.dtype | None, piece_bytes: int) -> None:
    draws = torch.Generator().manual_seed(0)
    tensors = {
        "codes": torch.randint(0, 256, (333,), dtype=torch.uint8, generator=draws),
        "scales": torch.randn(7, generator=draws),
        "norm": torch.randn(33, generator=draws).bfloat16(),
        "nothing": torch.empty(0, 5),
        "one": torch.tensor(2.5),
    }
    files = [file_of(tmp_path / "a", tensors), file_of(tmp_path / "b", {"else": torch.randn(3, 5, generator=draws)})]
    parts = [
        Part(name, file, wanted if wanted is not None and info.dtype.is_floating_point else info.dtype)
        for file in files
        for name, info in file.infos.items()
    ]
    image = Image.of(parts)
    views = image.views(filled(image, piece_bytes))
    assert set(views) == {"codes", "scales", "norm", "one", "else"}
    for part in parts:
        if part.n_bytes:
            assert torch.equal(views[part.name], part.file.tensor(part.name).to(part.dtype))
            assert views[part.name].shape == part.shape


def test_a_block_of_a_store_is_one_stretch_of_its_file(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", hidden_size=256, intermediate_size=512, dtype=torch.bfloat16)
    assert execute(["quantize", str(source), str(tmp_path / "store")]) == 0
    base = QuantizedCheckpoint.open(tmp_path / "store")
    tensors = placed(base, find_architecture(load_plugins(), "llama"), dtype=torch.bfloat16)
    for block in ("model.layers.0", "model.layers.1"):
        parts = [each.part for each in tensors if each.block == block]
        image = Image.of(parts)
        assert image.is_stretch
        assert image.stretches[0].start % 4096 == 0
        assert image.n_bytes <= 1.02 * sum(part.n_bytes for part in parts)
        assert all(image.places[name] % 64 == 0 for name in image.places if name.endswith("_proj.weight"))
        converted = Image.of(part._replace(dtype=torch.float32) if "norm" in part.name else part for part in parts)
        assert not converted.is_stretch


def test_an_image_of_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a", {"w": torch.randn(3000)})
    image = Image.of([Part("w", file, torch.float32)])
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(FormatError, match="changed"):
        filled(image, 1 << 20)


def test_a_late_copy_is_nan_until_it_is_waited_for_and_reads_its_source_then() -> None:
    lane, source = LateLane(), torch.zeros(4)
    first, second = torch.zeros(4), torch.zeros(4)
    mark = lane.copy(first, source)
    later = lane.copy(second, first, after=lane.here())
    assert bool(first.isnan().all())
    source += 1
    later.wait()
    assert first.tolist() == second.tolist() == [1.0] * 4
    source += 1
    mark.wait()
    assert first.tolist() == [1.0] * 4


def test_a_feeder_brings_an_image_piece_by_piece_whatever_the_threads(tmp_path: Path) -> None:
    values = torch.randint(0, 256, (100_003,), dtype=torch.uint8)
    image = Image.of([Part("w", file_of(tmp_path / "a", {"w": values}), torch.uint8)])
    for threads in (1, 3):
        lane = LateLane()
        feeder = Feeder(lane, CPU, threads=threads, piece_bytes=777)
        target = torch.zeros(image.n_bytes, dtype=torch.uint8)
        feeder.send(image, target).wait()
        assert torch.equal(target, values)
        feeder.close()


class Journal:
    """Notes what a ring asks for."""

    def __init__(self, n_blocks: int, n_slots: int) -> None:
        self.asked: list[int] = []
        self.lane = LateLane()
        self.slots = [torch.zeros(4, dtype=torch.uint8) for _ in range(n_slots)]
        self.ring = Ring(sizes=[4] * n_blocks, slots=self.slots, send=self.send, lane=self.lane)
        self.n_slots = n_slots

    def send(self, number: int, slot: Tensor, after: Mark | None) -> Mark:
        self.asked.append(number)
        return self.lane.copy(slot, torch.full((4,), number, dtype=torch.uint8), after=after)

    def enter(self, numbers: Sequence[int], *, around: bool = False) -> list[int]:
        """Enter blocks, look at what is in their slots then, and give what was asked for meanwhile."""
        before = len(self.asked)
        for number in numbers:
            self.ring.enter(number, around=around)
            assert self.slots[number % self.n_slots].tolist() == [number] * 4
        return self.asked[before:]


def test_a_ring_fetches_the_next_block_in_the_direction_of_travel() -> None:
    journal = Journal(5, 2)
    assert journal.enter([0]) == [0, 1]
    assert journal.enter([1]) == [2]
    assert journal.enter([2, 3, 4]) == [3, 4]
    assert journal.enter([4, 3]) == [2]
    assert journal.enter([2, 1, 0]) == [1, 0]
    assert journal.enter([0, 0, 1]) == [2]


def test_a_larger_ring_fetches_further_ahead() -> None:
    journal = Journal(6, 3)
    assert journal.enter([0]) == [0, 1, 2]
    assert journal.enter([1]) == [3]
    assert journal.enter([2, 3, 4, 5]) == [4, 5]
    assert journal.enter([5, 4]) == [2]
    assert journal.enter([3]) == [1]
    assert journal.enter([2, 1, 0]) == [0]


def test_a_ring_goes_around_where_nobody_turns() -> None:
    journal = Journal(4, 2)
    assert journal.enter([0, 1, 2, 3], around=True) == [0, 1, 2, 3, 0]
    assert journal.enter([0, 1, 2, 3], around=True) == [1, 2, 3, 0]


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("around", [False, True])
def test_a_ring_is_right_in_whatever_order_it_is_entered(slots: int, around: bool) -> None:
    draws = torch.Generator().manual_seed(slots)
    for blocks in (1, 2, 3, 5):
        numbers = torch.randint(0, blocks, (60,), generator=draws).tolist()
        Journal(blocks, slots).enter(numbers, around=around)


@needs_no_gpu
def test_without_a_driver_no_memory_is_held(tmp_path: Path) -> None:
    assert hold(anonymous(5000)) is None
    file = file_of(tmp_path / "a", {"w": torch.randn(3000)})
    assert hold_file(file) is None


def test_a_file_s_own_pages_are_its_bytes(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a", {"w": torch.randn(3000)})
    with file.shared() as pages:
        assert pages[:] == (tmp_path / "a").read_bytes()
        with pytest.raises(TypeError):
            pages[0] = 1


@pytest.mark.parametrize(("free", "way"), [(30, "resident"), (29, "streamed")])
def test_the_choice_says_which_and_why(free: int, way: str) -> None:
    gb = 10**9
    found, said = choose(weight_bytes=20 * gb, step_bytes=10 * gb, free_bytes=free * gb)
    assert found == way
    assert f"--residency {way}" in said
    assert f"the weights take 20.0 GB and the work on them about 10.0 GB, of {free}.0 GB that are free" in said


def test_the_estimate_of_a_step_counts_adapters_and_grows_with_the_tokens(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    assert execute(["quantize", str(source), str(tmp_path / "store")]) == 0
    base = QuantizedCheckpoint.open(tmp_path / "store")
    family = find_architecture(load_plugins(), "llama")

    def estimate(*, rank: int, tokens: int) -> int:
        return step_bytes(base, family, rank=rank, tokens=tokens, dtype=torch.bfloat16)

    # q, k, v, o, gate, up and down, twice: parameter, gradient and two moments of 4 bytes.
    widths = 2 * (64 + 48 + 48 + 64 + 3 * 104)
    assert estimate(rank=9, tokens=7) - estimate(rank=8, tokens=7) == 16 * widths
    assert estimate(rank=8, tokens=8) > estimate(rank=8, tokens=7) > 1 << 30
