"""Checkpoints as torch pickles them, whole and hostile, put together byte by byte."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

WORDS_16 = bytes(range(64))


@dataclass(frozen=True)
class Storage:
    """A reference to the record `data/KEY`, which is claimed to have so many elements."""

    n_elements: int
    key: str = "0"
    kind: type = torch.FloatStorage


class Call:
    """What is pickled as a call of a function, and attributes that its result is given."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, attributes: Any = None) -> None:
        self._call = (function, arguments, attributes)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return ("storage", obj.kind, obj.key, "cpu", obj.n_elements)
        return None


def tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Call:
    """A tensor with whatever place, shape and strides it claims to have."""
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict())


def pickled(value: Any) -> bytes:
    """The pickle of a value, as torch writes it."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def archive(
    content: bytes | Any,
    *,
    records: Mapping[str, bytes] = {"0": WORDS_16},
    byte_order: bytes = b"little",
    extra: Mapping[str, bytes] = {},
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The zip archive of a pickle and its storages."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("m/data.pkl", content if isinstance(content, bytes) else pickled(content))
        file.writestr("m/byteorder", byte_order)
        for key, data in records.items():
            file.writestr(f"m/data/{key}", data)
        for name, data in extra.items():
            file.writestr(name, data)
        file.writestr("m/version", b"3\n")
    return stream.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def changed(data: bytes, *, at: int, to: bytes) -> bytes:
    """The same bytes with some of them replaced."""
    at %= len(data)
    return data[:at] + to + data[at + len(to) :]
