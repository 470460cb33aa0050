"""Write what the code knows of itself: docs/cli.md, docs/config.md, and the tables of README.md.

`python -m qlora_pipe.cli.document docs` writes them all; README.md is the one beside the folder. The examples in
docs/plugins.md are the files that `plugins new` writes, and are put there, too.
"""

import dataclasses
import re
import sys
from itertools import groupby
from pathlib import Path

import click

from qlora_formats.commit import write_file
from qlora_pipe.cli import COMMANDS, qlora_pipe
from qlora_pipe.cli.options import describe_setting
from qlora_pipe.config import ExportConfig, FinetuneConfig, GenerateConfig, MergeConfig, PreviewConfig, QuantizeConfig
from qlora_pipe.plugins import list_plugins, load_plugins
from qlora_pipe.skeleton.writing import EXAMPLES, plugin_files

CONFIGS = (QuantizeConfig, PreviewConfig, FinetuneConfig, MergeConfig, GenerateConfig, ExportConfig)
DISTRIBUTION = "qlora-pipe"
_WIDTH = 100
_BEGIN, _END = "<!-- made by `make docs` -->\n", "<!-- end of what is made -->\n"
_KINDS = {"architecture": "model family", "exporter": "export target"}
_BLOCK = re.compile(r"^```(\w+)\n# (\S+)\n.*?^```$", re.MULTILINE | re.DOTALL)


def cli_page() -> str:
    """The command line as Markdown: what `--help` says of each command."""
    root = click.Context(qlora_pipe, info_name="qlora-pipe", terminal_width=_WIDTH, **qlora_pipe.context_settings)
    parts = [
        "# Command line\n\nMade from the commands themselves by `make docs`; a test keeps it current.\n",
        _help(root),
    ]
    for name in COMMANDS:
        command = qlora_pipe.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, terminal_width=_WIDTH)
        parts.append(f"## qlora-pipe {name}\n\n{_help(context)}")
        for inner, sub in command.commands.items() if isinstance(command, click.Group) else ():
            below = click.Context(sub, info_name=inner, parent=context, terminal_width=_WIDTH)
            parts.append(f"## qlora-pipe {name} {inner}\n\n{_help(below)}")
    return "\n".join(parts)


def _help(context: click.Context) -> str:
    return f"```\n{context.command.get_help(context).strip()}\n```\n"


def config_page() -> str:
    """Every setting as Markdown: a table per command."""
    parts = [
        "# Settings\n\nMade from the code by `make docs`; a test keeps it current. Every setting is a flag"
        " (`learning_rate` is `--learning-rate`) and a key in `run.yaml` or in its stage's section of `pipeline.yaml`."
        " Flags win over the file, the file wins over the defaults; an unknown key is an error.\n"
    ]
    for config in CONFIGS:
        rows = [describe_setting(config, item) for item in dataclasses.fields(config)]
        table = "".join(f"| `{name}` | {takes} | {default} | {text} |\n" for name, takes, default, text in rows)
        title = (config.__doc__ or "").splitlines()[0]
        parts.append(f"## {title}\n\n| setting | takes | default | what it does |\n|---|---|---|---|\n{table}")
    return "\n".join(parts)


def plugin_tables() -> str:
    """What the built-in plugins bring, as Markdown: a table for each kind of thing."""
    ours = [entry for entry in list_plugins(load_plugins()) if entry.distribution == DISTRIBUTION]
    parts = []
    for kind, entries in groupby(ours, key=lambda entry: entry.kind):
        rows = "".join(f"| `{entry.name}` | {_cell(entry.help)} |\n" for entry in entries)
        parts.append(f"| {_KINDS.get(kind, kind)} | |\n|---|---|\n{rows}")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """A text that Markdown shows as it is."""
    return re.sub(r"([*<|])", r"\\\1", text)


def with_tables(readme: str) -> str:
    """The README with its tables made anew, all else as it was; they stand between two marks."""
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert end, "the README has lost the marks that its tables stand between"
    return f"{before}{begin}\n{plugin_tables()}\n{end}{after}"


def plugins_page(page: str) -> str:
    """The page with the files of new plugins as they are now: in the blocks that begin with their paths, `# PATH`."""
    files = {
        f"{example.word}/{path}": text
        for kind, example in EXAMPLES.items()
        for path, text in plugin_files(example.word, kind=kind).items()
    }

    def current(block: re.Match[str]) -> str:
        language, path = block.groups()
        return f"```{language}\n# {path}\n{files[path]}```" if path in files else block.group()

    return _BLOCK.sub(current, page)


def write_pages(folder: Path) -> None:
    """Write the pages of a folder that are made from the code, and the tables into the README beside it."""
    plugins = folder / "plugins.md"
    write_file(plugins, plugins_page(plugins.read_text(encoding="utf-8")).encode())
    write_file(folder / "cli.md", cli_page().encode())
    write_file(folder / "config.md", config_page().encode())
    readme = folder.parent / "README.md"
    write_file(readme, with_tables(readme.read_text()).encode())


if __name__ == "__main__":
    write_pages(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
