"""Write a new plugin as a distribution that installs and passes its test, for its author to go on from."""

import importlib.metadata
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from qlora_formats.tree import write_tree
from qlora_pipe.errors import UsageProblem
from qlora_pipe.skeleton import Kind

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST_NAME = 40
_PREFIX = "qlora-pipe"


class _Example(NamedTuple):
    """What a skeleton is copied from."""

    word: str
    """The example's own name: of its package here, in its texts and, capitalised, of its classes."""
    what: str
    use: str
    """A command that uses it."""


EXAMPLES: dict[Kind, _Example] = {
    "architecture": _Example("toy", "model family", "qlora-pipe quantize CHECKPOINT STORE"),
    "dataset": _Example("riddles", "dataset", "qlora-pipe finetune BASE --data toy:FILE --out RUN"),
    "exporter": _Example("tarball", "export target", "qlora-pipe export RUN --to toy"),
}


def write_plugin(name: str, *, kind: Kind, inside: Path) -> list[str]:
    """Write the distribution `qlora-pipe-NAME` into the new folder NAME inside another, and give its files.

    Raises UsageProblem for a name that can't be one, CommitError "conflict" where the folder exists already.
    """
    _check(name)
    files = plugin_files(name, kind=kind)
    write_tree(inside / name, {path: text.encode() for path, text in files.items()})
    return sorted(files)


def plugin_files(name: str, *, kind: Kind) -> dict[str, str]:
    """Give the files of a new plugin by their paths in its folder."""
    example = EXAMPLES[kind]
    package = f"{_PREFIX}-{name}".replace("-", "_")
    files = {"pyproject.toml": _pyproject(name, package, example.what), "README.md": _readme(name, example)}
    for source in resources.files("qlora_pipe.skeleton").joinpath(example.word).iterdir():
        if not source.is_file():
            continue
        is_test = source.name.startswith("test_") or not source.name.endswith(".py")
        file = source.name.replace(f"test_{example.word}.py", f"test_{package}.py")
        text = source.read_text(encoding="utf-8")
        files[f"{'tests' if is_test else package}/{file}"] = renamed(text, example.word, name=name, package=package)
    return files


def renamed(text: str, word: str, *, name: str, package: str) -> str:
    """Write a text of an example for another name."""
    text = text.replace(f"qlora_pipe.skeleton.{word}", package)
    text = re.sub(rf"\b{word}\b", name, text)
    return re.sub(rf"\b{word.capitalize()}(?=[A-Z]|\b)", "".join(part.capitalize() for part in name.split("-")), text)


def _check(name: str) -> None:
    if name.startswith(_PREFIX):
        raise UsageProblem(
            f"{name!r} begins with {_PREFIX}, which the distribution's name gets by itself: leave it out."
        )
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise UsageProblem(
            f"{name!r} is no name of a plugin: it has small letters and digits, begins with a letter, may have single"
            f" hyphens in between, and is at most {_LONGEST_NAME} characters long, such as my-data."
        )


def _pyproject(name: str, package: str, what: str) -> str:
    version = importlib.metadata.version(_PREFIX)
    return f"""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{_PREFIX}-{name}"
version = "0.1.0"
description = "The {what} {name} for {_PREFIX}."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["{_PREFIX}>={version}"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.qlora_pipe]
{name} = "{package}"

[tool.setuptools.packages.find]
include = ["{package}*"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""


def _readme(name: str, example: _Example) -> str:
    return f"""\
# {_PREFIX}-{name}

The {example.what} `{name}` for {_PREFIX}.

```console
$ pip install -e '.[test]'
$ pytest
$ qlora-pipe plugins
$ {example.use.replace("toy", name)}
```
"""
