"""Every kernel test passes in Triton's interpreter, whatever the machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "triton").glob("test_*.py"))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton exists on Linux only")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_pass_in_the_interpreter(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed(?!.*skipped)", done.stdout, re.MULTILINE), done.stdout
