"""What qlora_pipe expects of every model family, with transformers' logits beside it."""

from collections.abc import Callable
from pathlib import Path

import torch
from peer import theirs
from torch import Tensor

from qlora_pipe.nn.language import Inputs
from qlora_pipe.testing import check_architecture
from qlora_pipe_gemma2 import ARCHITECTURE


def reference(folder: Path) -> Callable[[Inputs], Tensor]:
    model = theirs(folder, torch.float32)
    return lambda inputs: model(inputs.ids).logits


def test_the_family_keeps_every_promise() -> None:
    assert not check_architecture(ARCHITECTURE, reference=reference).left_out
