"""Write docs/cli.md and docs/config.md from the commands themselves: `python -m qlora_pipe.cli.document`."""

import dataclasses
import sys
from pathlib import Path

import click

from qlora_formats.commit import write_file
from qlora_pipe.cli import COMMANDS, qlora_pipe
from qlora_pipe.cli.options import describe_setting
from qlora_pipe.config import ExportConfig, FinetuneConfig, GenerateConfig, MergeConfig, QuantizeConfig

CONFIGS = (QuantizeConfig, FinetuneConfig, MergeConfig, GenerateConfig, ExportConfig)
_WIDTH = 100


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


def write_pages(folder: Path) -> None:
    """Write both pages into a folder."""
    write_file(folder / "cli.md", cli_page().encode())
    write_file(folder / "config.md", config_page().encode())


if __name__ == "__main__":
    write_pages(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
