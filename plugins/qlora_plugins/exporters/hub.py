"""Export to the Hugging Face Hub: check that a folder is whole, write its card, push both."""

import re
from pathlib import Path

from qlora_pipe.config import ExportConfig
from qlora_pipe.errors import MissingInputError, UsageProblem

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def push(path: Path, config: ExportConfig) -> str:
    """Push an adapter, a store, a merged folder or a run's adapter to `config.repo`; return the repository's address.

    Every file is checked against the folder's manifest first. Raises UsageProblem where the repository is not named
    USER/NAME, MissingInputError where the folder is absent or unfinished, FormatError where it is damaged, and what
    `qlora_pipe.hub.push` raises.
    """
    # What follows needs torch and the Hub's library, and listing the plugins should not load them.
    from qlora_formats.manifest import Manifest
    from qlora_pipe import hub
    from qlora_pipe.artifacts import Adapter, Run, open_model
    from qlora_pipe.model_card import folder_kind, model_card

    if config.repo is None or not _REPO.fullmatch(config.repo):
        given = "none was given" if config.repo is None else f"{config.repo!r} was given"
        raise UsageProblem(f"--to hub needs the repository's name, --repo USER/NAME; {given}.")
    folder = hub.resolve(str(path.absolute())).path
    if Run.is_run(folder):
        folder = Run(folder).adapter_path
    kind = folder_kind(folder)
    manifest = Manifest.read_if_present(folder)
    if kind is None or (manifest is not None and manifest.kind == "training"):
        raise MissingInputError(
            f"{path} is no adapter, store or merged folder: name one, or the run whose adapter is meant."
        )
    # Opening checks the headers of the weights; a folder with a manifest is also read in full.
    whole = Adapter.open(folder) if kind == "adapter" else open_model(folder)
    if manifest is not None:
        manifest.verify(whole.path)
    return hub.push(whole.path, repo=config.repo, private=config.private, card=model_card(whole.path, repo=config.repo))
