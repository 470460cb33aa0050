"""`qlora-pipe preview`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from qlora_pipe.cli.options import config_of, options_of
from qlora_pipe.config import PreviewConfig
from qlora_pipe.errors import DataError

if TYPE_CHECKING:
    from qlora_pipe.stages.preview import Fault, Preview, Shown, Token

# Of a longer sample the middle is left out.
_MOST_TOKENS = 400


@click.command()
@click.option("--base", required=True, help="Store or checkpoint whose tokenizer and chat template are used.")
@click.option("--data", required=True, help="Data to look at, NAME:PATH; `qlora-pipe plugins` lists the names.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@options_of(PreviewConfig)
def preview(base: str, data: str, as_json: bool, **settings: Any) -> None:
    """Show rows as the tokens that `finetune` would train on, and what would train wrongly.

    Trained tokens are green on a terminal, and stand in [brackets] elsewhere; a dot parts tokens. Ends with 65 where
    rows can't be used, answers are cut off, or nothing would teach the model to stop.
    """
    from qlora_pipe.cli.console import Console
    from qlora_pipe.plugins import load_plugins
    from qlora_pipe.stages.preview import preview as stage

    config = config_of(PreviewConfig, settings, where="preview")
    with Console(steps=0) as console:
        found = stage(base, data, config, manager=load_plugins(), note=console.note, progress=console.count)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        for number, sample in enumerate(found.shown, start=1):
            click.echo(_heading(number, sample))
            for side in (sample.source, sample.tokens):
                if side:
                    click.echo(_line(side, coloured=sys.stdout.isatty()))
            click.echo()
        for line in _summary(found, batch_size=config.batch_size):
            click.echo(line)
    if found.faults:
        raise DataError("; ".join(map(_clause, found.faults)))


def _heading(number: int, sample: "Shown") -> str:
    trained = sum(token.trained for token in sample.tokens)
    source = f"{len(sample.source)} tokens of source, " if sample.source else ""
    cut = ", cut" if sample.cut else ""
    return f"{number}  {sample.origin}   {source}{len(sample.tokens)} tokens, {trained} trained{cut}"


def _line(tokens: "Sequence[Token]", *, coloured: bool) -> str:
    """A sample's tokens in one line, the trained ones marked."""
    half = _MOST_TOKENS // 2
    runs = [tokens] if len(tokens) <= _MOST_TOKENS else [tokens[:half], tokens[-half:]]
    left_out = f" ... {len(tokens) - _MOST_TOKENS} tokens ... "
    return left_out.join(_run(run, coloured=coloured) for run in runs)


def _run(tokens: "Sequence[Token]", *, coloured: bool) -> str:
    pieces: list[str] = []
    for number, token in enumerate(tokens):
        shown = token.text.replace("\n", "\u21b5")
        if coloured:
            pieces.append(click.style(shown, fg="green", bold=True) if token.trained else shown)
            continue
        begins = token.trained and (number == 0 or not tokens[number - 1].trained)
        ends = token.trained and (number + 1 == len(tokens) or not tokens[number + 1].trained)
        pieces.append("[" * begins + shown + "]" * ends)
    return (click.style("\u00b7", dim=True) if coloured else "\u00b7").join(pieces)


def _summary(found: "Preview", *, batch_size: int) -> list[str]:
    share = found.trained / max(1, found.tokens)
    packed = "" if found.padding_packed is None else f", {found.padding_packed:.1%} with --pack"
    return [
        f"samples   {found.samples:,} of {found.rows:,} rows",
        f"tokens    {found.tokens:,}, {found.trained:,} trained ({share:.1%})",
        f"lengths   {found.shortest:,} to {found.longest:,}, median {found.median:,}",
        f"padding   {found.padding:.1%} in batches of {batch_size}{packed}",
    ]


def _clause(fault: "Fault") -> str:
    more = fault.count - len(fault.named)
    counted = f"{fault.count:,} {fault.of}{'' if fault.count == 1 else 's'}"
    return f"{counted} {fault.what}: {', '.join(fault.named)}" + (f" and {more:,} more" if more else "")
