"""Tests of Triton kernels: on a GPU, and in Triton's interpreter on any machine.

Whether a kernel is interpreted is settled when Triton is imported, so ../test_interpreter.py runs each file of this
folder in a process of its own, started with TRITON_INTERPRET=1. Tensors go to the GPU where there is one.
"""

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where kernels can neither run nor be interpreted."""
    here = Path(__file__).parent
    nowhere = pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU; ../test_interpreter.py runs it without"
    )
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(nowhere)
