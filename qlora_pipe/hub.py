"""To and from the Hugging Face Hub: models by folder or id, files of datasets, and finished folders with their card.

The only module that imports huggingface_hub. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean
to that library.
"""

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils.tqdm import disable_progress_bars

from qlora_formats.journal import JOURNAL
from qlora_formats.manifest import MANIFEST, Manifest
from qlora_formats.target import partial_path
from qlora_pipe.errors import DiskError, ExistsError, MissingInputError, NetworkError, QlorapipeError

# The library tells the Hub with each request which agent runs it and which torch is installed; this project does not.
constants.HF_HUB_DISABLE_TELEMETRY = True

CARD = "README.md"

# What a model, a store or an adapter is read from, and nothing else: a repository may hold other formats too.
_READ = (
    *("*.json", "*.safetensors", "tokenizer*", "*.model", "vocab*", "merges*", "chat_template*"),
    *("LICENSE*", "NOTICE*", CARD),
)
_PICKLES = ("pytorch_model*.bin",)
_NOT_READ = ("*/*", "consolidated*.safetensors")
_NOT_PUSHED = (".*", "*/*", "*.lock", "*.partial", JOURNAL)
_WEIGHTS = (".safetensors", ".safetensors.index.json")

_PARTIAL = re.compile(r"\..+\.partial")
_TOKEN = re.compile(r"hf_\w{8,}")


class Resolved(NamedTuple):
    """Where a named model lies: its folder, and its Hub id and commit if it came from there."""

    path: Path
    repo: str | None
    revision: str | None


def resolve(name: str, *, allow_pickle: bool = False) -> Resolved:
    """Find a model by its folder, or fetch it by its Hub id `NAME`, `USER/NAME` or either with `@REVISION`.

    A folder comes first. From the Hub come only the files that are read here, into the library's cache; pickled
    weights (`pytorch_model*.bin`) only if `allow_pickle` and the repository has no safetensors. An interrupted download
    goes on where it was. Raises MissingInputError where there is neither folder nor repository, NetworkError where the
    Hub does not answer or refuses.
    """
    folder = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if _is_folder(folder, name):
        return Resolved(folder, None, None)
    repo, at, revision = name.partition("@")
    if at and not revision:
        raise MissingInputError(f"{name!r} names no revision after the @: give a branch, a tag or a commit.")
    endpoint = _endpoint()
    try:
        huggingface_hub.utils.validate_repo_id(repo)  # type: ignore[attr-defined]
        _announce(f"fetching what the cache lacks of {name} from {_shown(endpoint)}")
        path = _fetch(repo, _READ, revision=revision or None, endpoint=endpoint)
        if allow_pickle and not any(path.glob("*.safetensors")):
            path = _fetch(repo, _PICKLES, revision=path.name, endpoint=endpoint)
    # A server may answer anything, and the library raises as many kinds of error.
    except Exception as fault:
        raise _fetch_error(fault, name, repo=repo, revision=revision, endpoint=endpoint) from fault
    if not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
        raise MissingInputError(
            f"the Hub repository {repo!r} holds neither config.json nor adapter_config.json,"
            " so it is no model and no adapter: check the name."
        )
    return Resolved(path, repo, path.name)


class DataListing(NamedTuple):
    """The files of a dataset's repository at one commit."""

    revision: str
    names: tuple[str, ...]


def list_data(repo: str, *, revision: str | None) -> DataListing:
    """Ask for the files of a dataset; MissingInputError where there is none, NetworkError where the Hub is silent."""
    endpoint = _endpoint()
    with _fetching_data(repo, revision, endpoint):
        huggingface_hub.utils.validate_repo_id(repo)  # type: ignore[attr-defined]
        info = huggingface_hub.HfApi(endpoint=endpoint).dataset_info(repo, revision=revision)
        return DataListing(str(info.sha), tuple(sorted(file.rfilename for file in info.siblings or [])))


def fetch_data(repo: str, listing: DataListing, names: Sequence[str]) -> Path:
    """Fetch these files of a dataset, each under its own name, into the library's cache; give the folder."""
    endpoint = _endpoint()
    with _fetching_data(repo, listing.revision, endpoint):
        _announce(f"fetching what the cache lacks of {repo}, {len(names)} files, from {_shown(endpoint)}")
        these = [*map(glob.escape, names)]
        found = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=listing.revision, endpoint=endpoint, allow_patterns=these
        )
    for name in names:
        if not (Path(found) / name).is_file():
            raise NetworkError(f"the Hub's cache lacks {name!r} of {repo!r}: fetch it while the Hub is in reach.")
    return Path(found)


def _fetch(repo: str, patterns: Sequence[str], *, revision: str | None, endpoint: str) -> Path:
    found = huggingface_hub.snapshot_download(
        repo, revision=revision, endpoint=endpoint, allow_patterns=[*patterns], ignore_patterns=[*_NOT_READ]
    )
    return Path(found)


def push(folder: Path, *, repo: str, private: bool, card: str | None) -> str:
    """Push the files of a finished folder to the Hub and return the repository's address.

    The repository `USER/NAME` is created if it does not exist. `card` becomes README.md, in place of one that lies in
    the folder. Weights come first, then card and manifest, so that an interrupted push is seen to be unfinished; the
    same call completes it. Raises ExistsError where the repository holds other weights, or is public and `private` is
    asked; NetworkError where the Hub does not answer or refuses.
    """
    api = huggingface_hub.HfApi(endpoint=(endpoint := _endpoint()))
    _announce(f"pushing {folder} to {_shown(endpoint)}/{repo}")
    with _pushing(repo, endpoint):
        try:
            found = api.model_info(repo)
        except errors.RepositoryNotFoundError:
            api.create_repo(repo, private=private or None)
            found = api.model_info(repo)
    if private and not found.private:
        raise ExistsError(
            f"the repository {repo!r} exists and is public, and --private is asked:"
            " make it private in its settings on the Hub, or name another --repo."
        )
    _refuse_mixing(folder, {file.rfilename for file in found.siblings or []}, repo=repo)
    last = _written_last(folder, card)
    with _pushing(repo, endpoint):
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=[*_NOT_PUSHED, *last],
            commit_message="Upload weights and configuration",
        )
        if last:
            api.create_commit(
                repo,
                operations=[huggingface_hub.CommitOperationAdd(path, data) for path, data in last.items()],
                commit_message="Upload model card and manifest",
            )
    return f"{_shown(endpoint)}/{repo}"


def _is_folder(folder: Path, name: str) -> bool:
    """Whether there is such a folder; MissingInputError where there is not and the Hub is not meant either."""
    partial = folder if _PARTIAL.fullmatch(folder.name) else partial_path(folder) if folder.name else None
    try:
        if name and folder != partial and folder.is_dir():
            return True
        unfinished = partial is not None and partial.is_dir()
        other = bool(name) and not unfinished and folder.exists()
    except OSError as fault:
        raise MissingInputError(f"cannot look for the folder {name[:200]!r}: {fault.strerror}.") from fault
    if unfinished:
        raise MissingInputError(
            f"{name!r} is unfinished, its files lie in {str(partial)!r}:"
            " run the command that was making it again, and it goes on from there."
        )
    if other:
        raise MissingInputError(f"{name!r} is not a folder: name the folder that holds the model's files.")
    if not name or name.startswith(("./", "../", "/", "~")) or "\\" in name or name in (".", ".."):
        raise MissingInputError(f"there is no folder {name!r}: check the path.")
    return False


def _endpoint() -> str:
    # Read at each call, since the library reads it only once, when it is imported.
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _announce(line: str) -> None:
    """Say on stderr what may take long, where the library's progress bars would only fill a log."""
    if not sys.stderr.isatty():
        disable_progress_bars()
        print(line, file=sys.stderr)  # noqa: T201


def _refuse_mixing(folder: Path, held: set[str], *, repo: str) -> None:
    """ExistsError where a push would leave its weights beside others: a reader may take those for the model's."""
    strays = sorted(
        name for name in held if name.endswith(_WEIGHTS) and "/" not in name and not (folder / name).exists()
    )
    if strays:
        raise ExistsError(
            f"the repository {repo!r} already holds {strays[0]}, which is not part of {folder}:"
            " delete it on the Hub, or name another --repo."
        )


def _written_last(folder: Path, card: str | None) -> dict[str, bytes]:
    """The files that complete a push, by name: the card, and the manifest that says that all is there."""
    last = {}
    if card is not None:
        last[CARD] = card.encode()
    manifest = Manifest.read_if_present(folder)
    if manifest is not None:
        # A card is edited on the Hub's pages, so the manifest of a pushed folder does not vouch for it.
        files = {name: record for name, record in manifest.files.items() if name != CARD}
        pushed = Manifest.build(kind=manifest.kind, inputs=manifest.inputs, files=files, fields=manifest.fields)
        last[MANIFEST] = pushed.to_bytes()
    return last


@contextmanager
def _fetching_data(repo: str, revision: str | None, endpoint: str) -> Iterator[None]:
    try:
        yield
    # A server may answer anything, and the library raises as many kinds of error.
    except Exception as fault:
        if isinstance(fault, errors.HFValidationError):
            raise MissingInputError(f"{repo!r} cannot be a dataset of the Hub: write USER/NAME.") from fault
        name, hub = repo if revision is None else f"{repo}@{revision}", _shown(endpoint)
        unknown = isinstance(fault, errors.RepositoryNotFoundError | errors.RevisionNotFoundError)
        if unknown and not isinstance(fault, errors.GatedRepoError):
            raise MissingInputError(f"the Hub at {hub} has no dataset {name!r} that may be read: check it.") from fault
        raise _hub_error(fault, f"fetch the dataset {name!r}", endpoint=endpoint) from fault


@contextmanager
def _pushing(repo: str, endpoint: str) -> Iterator[None]:
    """Turn whatever the library raises into one sentence."""
    try:
        yield
    # A server may answer anything, and the library raises as many kinds of error.
    except Exception as fault:
        raise _hub_error(fault, f"push to {repo!r}", endpoint=endpoint) from fault


def _fetch_error(fault: Exception, name: str, *, repo: str, revision: str, endpoint: str) -> QlorapipeError:
    """Say why a model that is named by a Hub id could not be fetched."""
    hub = _shown(endpoint)
    if isinstance(fault, errors.HFValidationError):
        return MissingInputError(
            f"there is no folder {name!r}, and a Hub repository cannot have that name:"
            " give an existing folder, USER/NAME or USER/NAME@REVISION."
        )
    if isinstance(fault, errors.GatedRepoError):
        return NetworkError(
            f"the Hub repository {repo!r} is gated: accept its licence at {hub}/{repo},"
            " and set HF_TOKEN to a token of that account."
        )
    if isinstance(fault, errors.RepositoryNotFoundError):
        return MissingInputError(
            f"there is neither a folder {name!r} here nor a Hub repository {repo!r} at {hub} that may be read:"
            " check the name; for a private repository set HF_TOKEN."
        )
    if isinstance(fault, errors.RevisionNotFoundError):
        return MissingInputError(
            f"the Hub repository {repo!r} has no revision {revision!r}: name a branch, a tag or a commit of it."
        )
    if isinstance(fault, errors.LocalEntryNotFoundError) and not isinstance(fault.__cause__, errors.HfHubHTTPError):
        if isinstance(fault.__cause__, errors.OfflineModeIsEnabled):
            return MissingInputError(
                f"there is no folder {name!r} here, and the Hub's cache does not hold all of {name!r} while"
                " HF_HUB_OFFLINE is set: unset it once to fetch the model."
            )
        # Where nobody can be asked, a bare name or a path into an existing folder is more likely a slip of the path.
        if Path(name).parent.is_dir():
            return MissingInputError(
                f"there is no folder {name!r} here, and the Hub at {hub} cannot be reached to look for a repository"
                " of that name: check the path, or the connection and HF_ENDPOINT."
            )
    return _hub_error(fault, f"fetch {name!r}", endpoint=endpoint)


def _hub_error(fault: BaseException, task: str, *, endpoint: str) -> QlorapipeError:
    """Say in one sentence why the Hub could not do its part of `task`."""
    # The library wraps what the Hub answered when it finds no copy in its cache, or uploads in a thread.
    while isinstance(fault, errors.LocalEntryNotFoundError | RuntimeError) and fault.__cause__ is not None:
        fault = fault.__cause__
    hub = f"the Hub at {_shown(endpoint)}"
    if isinstance(fault, errors.OfflineModeIsEnabled):
        return NetworkError(f"cannot {task}: HF_HUB_OFFLINE is set; unset it to reach the Hub.")
    if isinstance(fault, errors.HfHubHTTPError):
        status = fault.response.status_code
        said = f"{status} ({_redacted(fault.server_message)})" if fault.server_message else str(status)
        if status in (401, 403, 404):
            return NetworkError(
                f"cannot {task}: {hub} refused with {said}; check the name, and set HF_TOKEN to a token that may do it."
            )
        return NetworkError(f"cannot {task}: {hub} answered {said}; try again later.")
    if isinstance(fault, OSError) and fault.errno is not None and not isinstance(fault, ConnectionError | TimeoutError):
        return DiskError(f"cannot {task}: {fault.filename or constants.HF_HUB_CACHE}: {fault.strerror}.")
    said = f"{type(fault).__name__}: {_redacted(str(fault))}" if str(fault) else type(fault).__name__
    if isinstance(fault, ValueError | LookupError | TypeError | AttributeError | AssertionError):
        return NetworkError(f"cannot {task}: {hub} gave an answer that makes no sense ({said}); check HF_ENDPOINT.")
    return NetworkError(f"cannot {task}: {hub} cannot be reached ({said}); check the connection and HF_ENDPOINT.")


def _shown(endpoint: str) -> str:
    """The endpoint as it may be printed: without a password that stands in it."""
    parts = urlsplit(endpoint)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _redacted(text: str) -> str:
    """One line of foreign text, short and without tokens."""
    for secret in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        if secret:
            text = text.replace(secret, "hf_***")
    line = " ".join(_TOKEN.sub("hf_***", text).split())
    return line if len(line) <= 200 else f"{line[:197]}..."
