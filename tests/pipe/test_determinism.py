"""The same inputs give the same store, wherever and with however many threads it is made."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_pipe.cli import execute
from tests.pipe.runs import command, contents, small_checkpoint


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("settings", [{}, {"type": "fp4", "block_size": 128}, {"shard_mib": 1}], ids=str)
def test_a_store_does_not_depend_on_its_place(tmp_path: Path, settings: dict[str, object]) -> None:
    source = small_checkpoint(tmp_path / "source", num_hidden_layers=3)
    copied = small_checkpoint(tmp_path / "another" / "source", num_hidden_layers=3)
    assert execute(command("quantize", source, tmp_path / "a", **settings)) == 0
    assert execute(command("quantize", copied, tmp_path / "deep" / "b", **settings)) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "deep" / "b")


def test_a_store_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    # More than 32,768 blocks a weight: below, torch takes their mean in one thread whatever it may use.
    source = small_checkpoint(tmp_path / "source", hidden_size=62, intermediate_size=40_001)
    stores = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert execute(command("quantize", source, tmp_path / f"{threads}")) == 0
        stores.append(contents(tmp_path / f"{threads}"))
    assert stores[0] == stores[1] == stores[2]
