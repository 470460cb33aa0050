"""The command line: a command parses, calls one stage, prints the result. Nothing here imports torch before it must."""

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from qlora_formats.errors import CommitError, FormatError
from qlora_pipe.errors import QlorapipeError

# In the order a newcomer meets them; each is a module of this package with a click command of the same name.
COMMANDS = (
    "quantize", "preview", "finetune", "merge", "generate", "export", "run", "inspect", "verify", "plugins", "demo"
)  # fmt: skip
_COMMIT_CODES = {"conflict": 73, "locked": 75, "disk": 74}


class Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Name the commands in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command; None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"qlora_pipe.cli.{cmd_name}"), cmd_name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qlora-pipe", prog_name="qlora-pipe")
@click.option("--no-plugins", is_flag=True, help="Leave out all plugins but those that come with qlora-pipe.")
@click.pass_context
def qlora_pipe(context: click.Context, no_plugins: bool) -> None:
    """Fine-tune a large language model on one GPU, or on a CPU.

    quantize a checkpoint to 4 bits, finetune a LoRA adapter on it, merge the two, generate, and export. Models and
    adapters are folders or Hub ids (user/name[@revision]). QLORA_PIPE_DEBUG=1 shows tracebacks.
    """
    if no_plugins:
        from qlora_pipe.plugins import built_ins_alone

        context.with_resource(built_ins_alone())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; every known error becomes one sentence here."""
    sys.exit(execute(arguments))


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    try:
        result: Any = qlora_pipe.main(args=arguments, prog_name="qlora-pipe", standalone_mode=False)
    except click.ClickException as fault:
        fault.show()
        return fault.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("error: interrupted; what was reported saved is on disk.", err=True)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has gone; Python's complaint when it flushes at exit would help nobody.
        os._exit(128 + signal.SIGPIPE)
    except Exception as fault:
        if os.environ.get("QLORA_PIPE_DEBUG") == "1":
            traceback.print_exc()
        code, message = explain(fault)
        click.echo(f"error: {message}", err=True)
        return code
    return result if isinstance(result, int) else 0


def explain(fault: Exception) -> tuple[int, str]:
    """Turn an error into its exit code and its sentence; what we do not know is our own bug, 70."""
    if isinstance(fault, QlorapipeError):
        return fault.exit_code, str(fault)
    if isinstance(fault, CommitError):
        return _COMMIT_CODES[fault.reason], str(fault)
    if isinstance(fault, FormatError):
        return 65, str(fault)
    if isinstance(fault, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return 66, f"{fault.filename}: {fault.strerror}."
    if isinstance(fault, OSError):
        return 74, f"the system refused: {fault}."
    if isinstance(fault, MemoryError):
        return 70, "there is not enough memory; lower --batch-size or --max-tokens."
    # Imported where it is needed: no command waits for it that ends well.
    from qlora_pipe.plugin_loading import culprit

    kind = type(fault).__name__
    if (plugin := culprit(fault)) is not None:
        return 70, (
            f"{plugin} failed ({kind}: {fault}). QLORA_PIPE_DEBUG=1 shows where; tell its author, or go on without it:"
            " --no-plugins."
        )
    return 70, f"a bug of ours ({kind}: {fault}). Run again with QLORA_PIPE_DEBUG=1 and report what it prints."
