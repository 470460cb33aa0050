"""Which way tensors on a CPU go, how to choose it, and what is built without a compiler."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_kernels import blockwise, cpu, dequantize, dequantize_reference, library, quantize
from tests.kernels.paths import DTYPES, PATHS, SOURCES, assert_same, bits, forced, normal

COMPILER = os.environ.get("CC", "cc").split()[0]


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "library", lambda: None)
    cpu.paths.cache_clear()
    yield
    cpu.paths.cache_clear()


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of the C library that are called from now on."""
    called = []
    call = cpu.call
    monkeypatch.setattr(cpu, "call", lambda name, task: called.append(name) or call(name, task))
    return called


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C compiler")
def test_the_c_kernels_are_built_where_there_is_a_compiler() -> None:
    assert PATHS, "`pip install -e .` builds them"


@pytest.mark.skipif(not PATHS, reason="the C kernels are not built")
def test_a_tensor_on_a_cpu_goes_through_c(monkeypatch: pytest.MonkeyPatch) -> None:
    called = _calls(monkeypatch)
    q = quantize(normal(33, 131))
    assert called == ["quantize_blocks", "quantize_scales"]
    for dtype in DTYPES:
        dequantize(q, dtype)
    assert called[2:] == ["dequantize_blocks"] * 3


def test_torch_serves_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    called = _calls(monkeypatch)
    with forced("torch"):
        q = quantize(normal(33, 131))
        dense = dequantize(q, torch.bfloat16)
        assert cpu.description() == ("plain torch, as QLORA_PIPE_CPU asks" if PATHS else _NOT_BUILT)
    assert not called
    assert_same(q, quantize(normal(33, 131)))
    assert torch.equal(dense, dequantize(q, torch.bfloat16))


_NOT_BUILT = (
    "plain torch: the C kernels, many times faster, were not built; install a C compiler, then qlora-pipe again"
)


@pytest.mark.usefixtures("not_built")
def test_torch_serves_where_nothing_was_built_and_one_line_says_so() -> None:
    assert cpu.description() == _NOT_BUILT
    weight = normal(33, 131)
    assert_same(quantize(weight), blockwise.quantize(weight))


@pytest.mark.usefixtures("not_built")
def test_a_path_that_was_not_built_is_refused() -> None:
    with forced("portable"), pytest.raises(ValueError, match=r"QLORA_PIPE_CPU=portable asks .*: choose torch$"):
        quantize(normal(64))


@pytest.mark.parametrize("wanted", ["avx1024", "AVX2"])
def test_a_path_that_there_is_not_is_refused(wanted: str) -> None:
    with forced(wanted), pytest.raises(ValueError, match=f"QLORA_PIPE_CPU={wanted} asks .* or torch|choose torch"):
        cpu.description()


@pytest.mark.skipif(not PATHS, reason="the C kernels are not built")
@pytest.mark.parametrize("path", PATHS)
def test_the_description_names_the_path(path: str) -> None:
    names = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "no vector instructions"}
    with forced(path):
        assert (cpu.path(), cpu.description()) == (path, f"C kernels, {names[path]}")
    with forced(""):
        assert cpu.description() == f"C kernels, {names[PATHS[0]]}"


@pytest.mark.skipif(not PATHS, reason="the C kernels are not built")
def test_a_library_of_other_sources_counts_as_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "INTERFACE", -1)
    assert library.library.__wrapped__() is None


def test_what_c_cannot_take_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantize(normal(33, 131))
    called = _calls(monkeypatch)
    twice = torch.stack((q.codes, q.codes), dim=1)
    for other, dtype in (
        (q, torch.float64),
        (q._replace(codes=twice[:, 0]), torch.float32),
        (q._replace(nested_levels=q.nested_levels.double()), torch.float32),
        (q._replace(codes=torch.cat((q.codes, q.codes))), torch.float32),
    ):
        assert torch.equal(dequantize(other, dtype), dequantize_reference(other, dtype))
    assert not called


def test_too_few_codes_are_an_error_and_no_crash() -> None:
    q = quantize(normal(3, 64))
    for missing in ("codes", "absmax", "nested_absmax"):
        with pytest.raises((RuntimeError, IndexError)):
            dequantize(q._replace(**{missing: getattr(q, missing)[:-1]}), torch.float32)


def test_a_strided_weight_is_quantized_like_its_contiguous_copy() -> None:
    for weight in (normal(40, 70).T, normal(400)[::3], normal(7, 1).expand(7, 50)):
        assert_same(quantize(weight), blockwise.quantize(weight.contiguous()))


def test_a_read_only_file_is_quantized_in_place(tmp_path: Path) -> None:
    weight = normal(100, 77)
    file = tmp_path / "weight"
    file.write_bytes(bits(weight).numpy().tobytes())
    file.chmod(0o444)
    mapped = torch.from_file(str(file), shared=False, size=7700, dtype=torch.float32).view(100, 77)
    assert_same(quantize(mapped), blockwise.quantize(weight))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the library is built from."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    root = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SOURCES.parents[1] / name, root)
    for package in ("qlora_pipe", "formats/qlora_formats", "kernels/qlora_kernels", "plugins/qlora_plugins"):
        shutil.copytree(
            SOURCES.parents[1] / package, root / package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo")
        )
    return root


def _build(root: Path, *, compiler: str) -> subprocess.CompletedProcess[str]:
    code = "from setuptools import setup; setup()"
    return subprocess.run(
        [sys.executable, "-c", code, "build_ext", "--inplace"],
        cwd=root,
        env=os.environ | {"CC": compiler},
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_build_without_a_compiler_succeeds_and_torch_serves(sources: Path) -> None:
    done = _build(sources, compiler="/bin/false")
    assert done.returncode == 0, done.stderr
    assert 'building extension "qlora_kernels._blockwise" failed' in done.stderr
    code = "from qlora_kernels import cpu; print(cpu.description())"
    environment = {name: value for name, value in os.environ.items() if name != cpu.VARIABLE}
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources / "kernels",
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == _NOT_BUILT


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C compiler")
def test_the_c_sources_compile_without_a_warning(sources: Path) -> None:
    done = subprocess.run(
        [*os.environ.get("CC", "cc").split(), "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        + [str(file) for file in (sources / "kernels/qlora_kernels").glob("*.c")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
