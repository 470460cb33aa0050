"""A Hugging Face model folder: config.json beside model.safetensors, or beside shards and their index."""

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from qlora_formats.commit import PartialFolder
from qlora_formats.errors import FormatError
from qlora_formats.folder import has_file, is_plain_name, require_inside
from qlora_formats.loading import Load
from qlora_formats.manifest import Manifest
from qlora_formats.strict_json import MAX_BYTES, pretty, read_object
from qlora_formats.target import partial_path
from qlora_formats.tensorfile import TensorFile, TensorInfo, TensorPlan, write_tensors

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"

# What belongs to a model without being its weights or its config, and goes along with every model made from it.
CARRIED = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION_CONFIG,
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)

_MIB = 2**20


class CheckpointFolder:
    """A model folder whose config, index and headers were checked. Tensors are mapped or read when asked for.

    `infos` has dtype, shape and place of each, in the order of the shards and of the bytes in them.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        files: Mapping[str, TensorFile],
        manifest: Manifest | None,
        load: Load = "mmap",
    ) -> None:
        self.path = path
        self.load = load
        self.config = config
        self.generation_config = generation_config
        self.manifest = manifest
        self.shards = [file.path for file in files.values()]
        self.infos = {name: info for file in files.values() for name, info in file.infos.items()}
        self._files = {name: file for file in files.values() for name in file.infos}

    @classmethod
    def open(cls, path: Path, *, load: Load = "mmap") -> Self:
        """Check the folder `path`, against its manifest where it has one; FormatError says what is wrong with it.

        `load` says how its tensors come into memory later.
        """
        require_folder(path)
        if not has_file(path, CONFIG):
            raise FormatError(f"{path} is not a model: it has no {CONFIG}{_instead(path)}")
        has_generation = has_file(path, GENERATION_CONFIG)
        with collector_paused():
            return cls(
                path,
                config=read_object(path / CONFIG),
                generation_config=read_object(path / GENERATION_CONFIG) if has_generation else {},
                files=_open_weights(path, load=load),
                manifest=Manifest.read_if_present(path, kinds=("store", "checkpoint")),
                load=load,
            )

    @property
    def names(self) -> list[str]:
        """The tensors' names, in the order of the shards and of the bytes in them."""
        return list(self._files)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor; FormatError if the folder has none of that name."""
        self.file_of(name)
        return self.infos[name]

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped shard or a new tensor, as `TensorFile.tensor`."""
        return self.file_of(name).tensor(name)

    def release(self, name: str) -> None:
        """As `TensorFile.release`."""
        self.file_of(name).release(name)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """The bytes of a few small tensors, shard by shard, without mapping one."""
        by_file: dict[TensorFile, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_of(name), []).append(name)
        for file, wanted in by_file.items():
            yield from file.read(wanted)

    def carried_files(self) -> list[Path]:
        """Tokenizer, generation config, chat template and licence files, which are copied to what is made from this.

        FormatError if one is a link that leads out of the folder.
        """
        found = sorted({file for pattern in CARRIED for file in self.path.glob(pattern) if file.is_file()})
        for file in found:
            require_inside(self.path, file)
        return found

    def file_of(self, name: str) -> TensorFile:
        """The file that holds a tensor; FormatError if the folder has none of that name."""
        file = self._files.get(name)
        if file is None:
            raise FormatError(f"{self.path} has no tensor {name!r}")
        return file


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector from running: headers become many objects, and none of them is garbage.

    They would set off a collection that walks through all of torch, which takes longer than opening a large model.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def require_folder(path: Path) -> None:
    """FormatError unless `path` is a folder; says so if it is one that was never finished."""
    if path.is_dir():
        return
    if partial_path(path).is_dir():
        raise FormatError(f"{path} is unfinished: rerun the command that was writing it, it will go on from there")
    if path.exists():
        raise FormatError(f"{path} is a file where a folder is needed")
    raise FormatError(f"there is no folder {path}")


def write_checkpoint(
    folder: PartialFolder,
    *,
    config: Mapping[str, Any],
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
    shard_mib: int = 4096,
) -> None:
    """Write config.json and the weights, sharded where they exceed `shard_mib`, tensor by tensor in the given order.

    Shards that `folder.done` already holds are left as they are and `produce` isn't asked for their tensors. The
    caller copies what else belongs to a model (`carried_files`) and finishes the folder.
    """
    plans = [TensorPlan(*tensor) for tensor in tensors]
    shards = list(_split(plans, shard_mib * _MIB))
    names = shard_names(len(shards))
    for name, layout in zip(names, shards, strict=True):
        if name not in folder.done:
            with folder.create(name) as stream:
                write_tensors(stream, layout, produce, metadata={"format": "pt"})
    write_index(folder, dict(zip(names, shards, strict=True)))
    folder.write(CONFIG, pretty(config))


def shard_names(count: int) -> list[str]:
    """The file names transformers looks for: one file, or numbered shards."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(folder: PartialFolder, shards: Mapping[str, Sequence[TensorPlan]]) -> None:
    """Write the index that says which shard holds which tensor, if there is more than one shard."""
    if len(shards) > 1:
        weight_map = {plan.name: name for name, layout in shards.items() for plan in layout}
        total_size = sum(plan.n_bytes for layout in shards.values() for plan in layout)
        folder.write(INDEX, pretty({"metadata": {"total_size": total_size}, "weight_map": weight_map}))


def _split(plans: Sequence[TensorPlan], most: int) -> Iterator[list[TensorPlan]]:
    shard: list[TensorPlan] = []
    for plan in plans:
        if shard and sum(other.n_bytes for other in shard) + plan.n_bytes > most:
            yield shard
            shard = []
        shard.append(plan)
    yield shard


def _open_weights(path: Path, *, load: Load) -> dict[str, TensorFile]:
    if has_file(path, WEIGHTS):
        return {WEIGHTS: TensorFile.open(path / WEIGHTS, load=load)}
    if not has_file(path, INDEX):
        raise FormatError(f"{path} holds no weights: neither {WEIGHTS} nor {INDEX}{_instead(path)}")
    index = path / INDEX
    weight_map = read_index(index)
    files = {name: TensorFile.open(shard_path(index, name), load=load) for name in sorted(set(weight_map.values()))}
    for name, file in files.items():
        check_shard(index, weight_map, name, tensors=file.infos)
    return files


def read_index(index: Path) -> dict[str, str]:
    """Which file holds which tensor, by an index; FormatError unless every file is named plainly."""
    weight_map = read_object(index, limit=MAX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index} has no weight_map from tensors to files")
    known: set[str] = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or (name not in known and not is_plain_name(name)):
            raise FormatError(f"{index} places the tensor {tensor[:80]!r} in {str(name)[:80]!r}, which is no file name")
        known.add(name)
    return weight_map


def shard_path(index: Path, name: str) -> Path:
    """The file that an index names; FormatError unless it lies in the index's own folder."""
    if not has_file(index.parent, name):
        raise FormatError(
            f"{index.parent} lacks the shard {name} that {index.name} names: fetch or make the folder again"
        )
    return index.parent / name


def check_shard(index: Path, weight_map: Mapping[str, str], name: str, *, tensors: Collection[str]) -> None:
    """FormatError unless the shard `name` holds just the tensors that its index places there."""
    path = index.parent / name
    for tensor in tensors:
        if weight_map.get(tensor) != name:
            there = f"in {weight_map[tensor]}" if tensor in weight_map else "nowhere"
            raise FormatError(f"{path} holds the tensor {tensor!r}, which {index.name} places {there}")
    # All that it holds is placed there, so it holds all that is if it holds as many.
    if list(weight_map.values()).count(name) != len(tensors):
        lost = next(tensor for tensor, holder in weight_map.items() if holder == name and tensor not in tensors)
        raise FormatError(f"{path} lacks the tensor {lost!r} that {index.name} places there")


def _instead(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return "; it is an adapter, which is used together with its base model"
    for name in (PICKLED_WEIGHTS, PICKLED_INDEX):
        if (path / name).is_file():
            return (
                f"; its weights are pickles ({name}), and loading one can run code: convert them to safetensors,"
                " or quantize with --allow-pickle, which reads them in a confined process"
            )
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        return f"; {pickled[0]} is a pickle, which is not read: convert it to safetensors first"
    return ""
