"""The house rules that no type checker knows."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_pipe import hookspecs
from qlora_pipe.cli import COMMANDS, document
from qlora_pipe.cli.document import cli_page, config_page, with_tables
from qlora_pipe.plugins import PluginEntry, load_plugins

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "qlora_kernels": set(),
    "qlora_formats": set(),
    "qlora_pipe": {"qlora_kernels", "qlora_formats"},
    "qlora_plugins": {"qlora_kernels", "qlora_formats", "qlora_pipe"},
}
FOLDERS = {
    "qlora_kernels": ROOT / "kernels/qlora_kernels",
    "qlora_formats": ROOT / "formats/qlora_formats",
    "qlora_pipe": ROOT / "qlora_pipe",
    "qlora_plugins": ROOT / "plugins/qlora_plugins",
}
# Inside qlora_pipe, from the ground up: a module imports from its own row and those above it in this list.
STOREYS = (
    {"errors", "config", "settings", "architecture", "rows", "chat_template", "exporter"},
    {"dataset"},
    {"hookspecs", "lanes"},
    {"plugins", "plugin_items", "plugin_loading", "plugin_probe"},
    {"hub", "model", "artifacts", "confined", "precision", "model_card", "nn", "data", "generate", "residency"},
    {"optim"},
    {"train"},
    {"stages"},
    {"demo", "testing", "skeleton", "cli"},
    {"__main__"},
)


def sources(package: str) -> Iterator[Path]:
    yield from sorted(FOLDERS[package].rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_a_package_imports_only_from_the_floors_below(package: str) -> None:
    for path in sources(package):
        ours = {name.split(".")[0] for name in imported(path)} & FLOORS.keys()
        assert ours <= FLOORS[package] | {package}, path


def test_inside_qlora_pipe_imports_point_downwards() -> None:
    storey_of = {name: number for number, names in enumerate(STOREYS) for name in names}
    for path in sources("qlora_pipe"):
        parts = path.relative_to(FOLDERS["qlora_pipe"]).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in imported(path):
            target = name.split(".")
            if target[0] == "qlora_pipe" and len(target) > 1:
                assert storey_of[target[1]] <= storey_of[parts[0]], f"{path} imports {name}"


@pytest.mark.parametrize("root", ["kernels", "formats", "plugins"])
def test_nothing_importable_lies_beside_a_package_in_its_root(root: str) -> None:
    names = {path.name for path in (ROOT / root).iterdir() if not path.name.endswith(".egg-info")}
    assert names - {"__pycache__"} == {f"qlora_{root}"}


def test_only_the_commit_protocol_opens_files_for_writing() -> None:
    writers = re.compile(
        r"""\.write_text\(|\.write_bytes\(|open\([^)]*["'][wax]b?\+?["']|O_WRONLY|O_RDWR|save_file\("""
    )
    # The commit protocol, and a throw-away file for the disassembler.
    allowed = {"commit.py", "disk.py", "ahead_of_time.py"}
    for package in FLOORS:
        for path in sources(package):
            if path.name not in allowed:
                assert not writers.search(path.read_text()), path


def test_only_hub_imports_huggingface_hub() -> None:
    for package in FLOORS:
        for path in sources(package):
            if path != FOLDERS["qlora_pipe"] / "hub.py":
                assert not any(name.startswith("huggingface_hub") for name in imported(path)), path


def test_the_product_does_not_run_on_its_peers() -> None:
    peers = {"transformers", "peft", "bitsandbytes", "accelerate"}
    # The one place that runs on one of them, which its extra installs.
    room = FOLDERS["qlora_plugins"] / "transformers_models"
    for package in FLOORS:
        for path in sources(package):
            allowed = {"transformers"} if path.parent == room else set()
            assert not {name.split(".")[0] for name in imported(path)} & (peers - allowed), path


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "--json"], *([name, "--help"] for name in COMMANDS)])
def test_the_light_path_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from qlora_pipe.cli import execute\n"
        f"code = execute({arguments!r})\n"
        "heavy = {'torch', 'rich', 'jinja2', 'transformers', 'huggingface_hub', 'pydantic'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "formats", ROOT / "kernels", ROOT / "plugins"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def hooks() -> list[str]:
    manager = load_plugins()
    return sorted(name for name in vars(hookspecs) if not name.startswith("_") and hasattr(manager.hook, name))


def test_every_hook_is_documented_with_its_signature() -> None:
    page = (ROOT / "docs/plugins.md").read_text()
    for name in hooks():
        assert re.search(rf"^## `{name}\(", page, re.MULTILINE), f"docs/plugins.md has no heading for {name}"


def test_every_hook_is_tested() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in hooks():
        assert re.search(rf"def {name}\(", tests), f"no test implements {name}"


def test_every_hook_is_called() -> None:
    product = "".join(path.read_text() for path in sources("qlora_pipe"))
    for name in hooks():
        assert f"hook.{name}(" in product or f'hook="{name}"' in product, f"nothing calls {name}"


@pytest.mark.parametrize(("page", "made"), [("cli.md", cli_page), ("config.md", config_page)], ids=["cli", "config"])
def test_generated_pages_are_current(page: str, made) -> None:  # type: ignore[no-untyped-def]
    assert (ROOT / "docs" / page).read_text() == made(), "run `make docs`"


def test_the_readmes_tables_are_current() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_tables(readme) == readme, "run `make docs`"
    for name in ("llama", "alpaca", "chip2", "flan-v2", "hh-rlhf", "longform", "oasst1", "self-instruct"):
        assert f"| `{name}` |" in readme


def test_the_tables_hold_what_comes_with_the_package_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, *, distribution: str) -> PluginEntry:
        return PluginEntry(
            name=name, kind="dataset", plugin="p", distribution=distribution, version="1", help="a|b of <human> and *"
        )

    entries = [entry("ours", distribution="qlora-pipe"), entry("theirs", distribution="another")]
    monkeypatch.setattr(document, "list_plugins", lambda manager: entries)
    assert document.plugin_tables() == "| dataset | |\n|---|---|\n| `ours` | a\\|b of \\<human> and \\* |\n"


def test_source_files_stay_short() -> None:
    for package in FLOORS:
        for path in sources(package):
            assert len(path.read_text().splitlines()) <= 320, f"{path} has grown; split it"
