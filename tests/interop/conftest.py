"""What the comparisons with peers share: one thread, and adapters trained here on bases of either kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_pipe.cli import execute
from qlora_pipe.testing import tiny_checkpoint

_TEXT = "Once upon a time there was a very small fox. It had one big red ball, and it was happy.\n"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Compute with one thread: some sums depend on their number, and the peers' own threads would fight for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["16-bit", "4-bit", "real 16-bit", "real 4-bit"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a run of a few steps on it: a checkpoint and a store, of random weights and of a real model."""
    folder = tmp_path_factory.mktemp("trained")
    if request.param.startswith("real"):
        base = request.getfixturevalue("shared_data") / "models" / "stories260K"
    else:
        base = tiny_checkpoint(folder / "source", seed=5, hidden_size=64, intermediate_size=192, mlp_bias=True)
    if request.param.endswith("4-bit"):
        source, base = base, folder / "store"
        assert execute(["quantize", str(source), str(base)]) == 0
    (folder / "text.txt").write_text(_TEXT * 40)
    words = f"finetune {base} --data text:{folder / 'text.txt'} --out {folder / 'run'} --steps 5 --learning-rate 2e-2"
    words += " --batch-size 2 --max-tokens 48 --rank 3 --alpha 7 --held-out 0.2"
    assert execute(words.split()) == 0
    return base, folder / "run"
