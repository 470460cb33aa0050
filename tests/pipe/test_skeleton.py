"""`qlora-pipe plugins new`: what it writes installs as a stranger's plugin would, and passes its own test."""

import os
import site
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from qlora_formats.errors import CommitError
from qlora_formats.target import partial_path
from qlora_formats.tree import write_tree
from qlora_pipe.skeleton import Kind
from qlora_pipe.skeleton.writing import EXAMPLES, plugin_files
from qlora_pipe.testing import RunCli

pytest_plugins = ["qlora_pipe.testing.fixtures"]

ROOT = Path(__file__).resolve().parents[2]
KINDS: tuple[Kind, ...] = get_args(Kind)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """A Python of its own that sees what is installed here, and this checkout before it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    Path(packages, "here.pth").write_text("\n".join(lines) + "\n")
    ours = [str(path) for path in (ROOT, ROOT / "formats", ROOT / "kernels", ROOT / "plugins")]
    return python, {**os.environ, "PYTHONPATH": os.pathsep.join(ours), "OMP_NUM_THREADS": "1"}


def test_a_new_plugin_of_each_kind_installs_and_passes_its_test(here: Path, run_cli: RunCli) -> None:
    names = {kind: f"my-{kind}" for kind in KINDS}
    for kind, name in names.items():
        assert run_cli("plugins", "new", name, "--kind", kind).exit_code == 0
    python, variables = environment(here / "env")

    def run(*words: str) -> str:
        done = subprocess.run(
            [python, "-m", *words], cwd=here, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *(f"./{name}" for name in names.values()))
    listed = [line.split()[:4] for line in run("qlora_pipe", "plugins").splitlines()]
    for kind, name in names.items():
        assert [name, kind, f"qlora-pipe-{name}", "0.1.0"] in listed
    said = run(
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "-W",
        "error::pytest.PytestWarning",
        *names.values(),
    )
    assert "6 passed" in said
    run("pip", "uninstall", "--quiet", "--yes", *(f"qlora-pipe-{name}" for name in names.values()))
    assert "my-" not in run("qlora_pipe", "plugins")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_example_is_left_in_a_new_plugin(kind: Kind) -> None:
    files = plugin_files("best-yet", kind=kind)
    word = EXAMPLES[kind].word
    for path, text in files.items():
        assert word not in (path + text).lower()
        assert "skeleton" not in text
        if path.endswith(".py"):
            compile(text, path, "exec")
    assert {"pyproject.toml", "README.md", "qlora_pipe_best_yet/__init__.py"} <= files.keys()
    assert any(path.startswith("tests/test_") for path in files)


def test_the_words_of_a_name_are_the_classes(here: Path) -> None:
    model = plugin_files("best-yet", kind="architecture")["qlora_pipe_best_yet/model.py"]
    assert "class BestYet(CausalModel):" in model
    assert "class BestYetConfig:" in model


def test_an_existing_folder_is_left_as_it_is(here: Path, run_cli: RunCli) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "README.md").write_text("precious")
    done = run_cli("plugins", "new", "mine")
    assert (done.exit_code, done.stdout) == (73, "")
    assert "mine already exists" in done.stderr
    assert [(path.name, path.read_text()) for path in (here / "mine").iterdir()] == [("README.md", "precious")]


@pytest.mark.parametrize("name", ["My", "1st", "a_b", "a--b", "a-", "", "../up", "a/b", "x" * 41, "naïve", "--", "."])
def test_a_name_that_no_distribution_could_have_is_refused(name: str, here: Path, run_cli: RunCli) -> None:
    done = run_cli("plugins", "new", "--", name)
    assert done.exit_code == 2
    assert "is no name of a plugin: it has small letters and digits" in done.stderr
    assert [*here.iterdir()] == []


def test_the_distributions_prefix_is_not_given_twice(here: Path, run_cli: RunCli) -> None:
    done = run_cli("plugins", "new", "qlora-pipe-mine")
    assert done.exit_code == 2
    assert "begins with qlora-pipe, which the distribution's name gets by itself: leave it out" in done.stderr


def test_a_tree_appears_whole_over_what_an_interrupted_call_left(tmp_path: Path) -> None:
    target, files = tmp_path / "tree", {"a.txt": b"a", "b/c.txt": b"c"}
    left = partial_path(target)
    (left / "b").mkdir(parents=True)
    (left / "b" / ".c.txt.writing").write_bytes(b"half")
    (left / "a.txt").write_bytes(b"old")
    write_tree(target, files)
    assert {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()} == files
    assert not left.exists()


def test_a_partial_tree_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    left = partial_path(tmp_path / "tree")
    left.mkdir()
    (left / "other.txt").write_bytes(b"precious")
    with pytest.raises(CommitError, match=r"other\.txt is in the way") as raised:
        write_tree(tmp_path / "tree", {"a.txt": b"a"})
    assert raised.value.reason == "conflict"
    assert [path.name for path in left.iterdir()] == ["other.txt"]
