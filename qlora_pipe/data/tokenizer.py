"""A checkpoint's own tokenizer, read from tokenizer.json, and the two control tokens that training needs of it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from qlora_formats.errors import FormatError
from qlora_formats.strict_json import read_object
from qlora_pipe.errors import ConfigError, DataError, MissingInputError
from qlora_pipe.rows import LONE_SURROGATE

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokenizer:
    """Text to ids and back. Nothing in a text ever becomes a control token: `</s>` in a row is four characters."""

    bos_id: int | None
    """The id that this tokenizer puts in front of a text, None where it puts none."""
    eos_id: int
    """The id that ends an answer or a document."""
    vocab_size: int
    """One more than the largest id."""
    digest: str
    """sha256 of tokenizer.json, hexadecimal."""
    inner: tokenizers.Tokenizer = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> "Tokenizer":
        """Open the tokenizer of a model folder.

        MissingInputError where tokenizer.json is absent, DataError where it cannot be read, ConfigError where the
        folder does not say what ends a text.
        """
        folder = Path(folder)
        data = _read(folder)
        with _faults_named(f"{folder / TOKENIZER_FILE} is not a tokenizer that can be read"):
            inner = tokenizers.Tokenizer.from_str(data.decode())
            in_front = _make_plain(inner)
        config = _read_config(folder / "tokenizer_config.json")
        model_configs = [_read_config(folder / name) for name in ("generation_config.json", "config.json")]
        vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = _ControlIds(folder=folder, inner=inner, config=config, model_configs=model_configs, vocab_size=vocab_size)
        return cls(
            bos_id=ids.bos(in_front=in_front),
            eos_id=ids.eos(),
            vocab_size=vocab_size,
            digest=hashlib.sha256(data).hexdigest(),
            inner=inner,
        )

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Give a text's ids, without control tokens, and for each the half-open range of characters it covers.

        DataError where the text is none: a lone surrogate, or (some vocabularies list `</s>` as an ordinary piece)
        words that this tokenizer has no way to read but as its control token.
        """
        surrogate = LONE_SURROGATE.search(text)
        if surrogate:
            raise DataError(f"the text holds a lone surrogate at character {surrogate.start()}")
        with _faults_named("the tokenizer cannot read the text"):
            encoding = self.inner.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        offsets: list[tuple[int, int]] = encoding.offsets
        if self.eos_id in ids or self.bos_id in ids:
            start, end = next(at for at, token in zip(offsets, ids, strict=True) if token in (self.bos_id, self.eos_id))
            raise DataError(
                f"the text holds {text[start:end].strip()!r} at character {start}, which this tokenizer reads as a"
                " control token; remove it from the text"
            )
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids; control tokens are dropped."""
        return self.inner.decode(list(ids), skip_special_tokens=True)


def _read(folder: Path) -> bytes:
    path = folder / TOKENIZER_FILE
    if path.is_file():
        return path.read_bytes()
    if (folder / "tokenizer.model").is_file():
        raise MissingInputError(
            f"{folder} has tokenizer.model and no tokenizer.json; convert it once with transformers:"
            f' AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
        )
    raise MissingInputError(f"{folder} has no tokenizer.json; copy it from the model that the folder was made of")


def _read_config(path: Path) -> dict[str, Any]:
    """Read one JSON object; a file that is absent says nothing."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except FormatError as fault:
        raise ConfigError(f"{fault}.") from fault


@contextmanager
def _faults_named(what: str) -> Iterator[None]:
    """Turn a fault of the tokenizers library into a DataError."""
    try:
        yield
    except BaseException as fault:
        # The library raises bare Exceptions, and for a panic in its Rust a BaseException of a class it keeps private.
        if isinstance(fault, Exception) or type(fault).__name__ == "PanicException":
            raise DataError(f"{what}: {fault}") from fault
        raise


def _make_plain(inner: tokenizers.Tokenizer) -> list[int]:
    """Switch off what would make a text's ids depend on anything but the text; give the ids that came in front of it.

    One thing is switched off for the offsets' sake: a byte-level post-processor takes the spaces out of them, so that
    a run of spaces in an answer would cover no character of it and never be trained.
    """
    inner.no_truncation()
    inner.no_padding()
    if getattr(inner.model, "dropout", None) is not None:
        inner.model.dropout = None
    probe = inner.encode("a", add_special_tokens=True)
    is_text = [mask == 0 for mask in probe.special_tokens_mask]
    in_front: list[int] = probe.ids[: is_text.index(True)] if any(is_text) else []
    inner.post_processor = None
    inner.encode_special_tokens = True
    return in_front


@dataclass(frozen=True, kw_only=True, slots=True)
class _ControlIds:
    """Where a model folder says which ids begin and end a text."""

    folder: Path
    inner: tokenizers.Tokenizer
    config: Mapping[str, Any]
    model_configs: Sequence[Mapping[str, Any]]
    vocab_size: int

    def eos(self) -> int:
        found = self._named("eos")
        if found is None:
            raise ConfigError(
                f"{self.folder} does not say which token ends a text: set eos_token in tokenizer_config.json"
            )
        return found

    def bos(self, *, in_front: Sequence[int]) -> int | None:
        wanted = self.config.get("add_bos_token")
        if wanted is None:
            if len(in_front) > 1:
                raise ConfigError(f"{self.folder}: the tokenizer puts {len(in_front)} tokens before a text, not one")
            return in_front[0] if in_front else None
        if not isinstance(wanted, bool):
            raise ConfigError(f"{self.folder / 'tokenizer_config.json'}: add_bos_token must be true or false")
        if not wanted:
            return None
        found = self._named("bos")
        if found is None:
            raise ConfigError(
                f"{self.folder / 'tokenizer_config.json'}: add_bos_token is true, and there is no bos_token"
            )
        return found

    def _named(self, kind: str) -> int | None:
        token = self.config.get(f"{kind}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found = self.inner.token_to_id(token)
            if found is None:
                raise ConfigError(
                    f"{self.folder}: {kind}_token {token!r} of tokenizer_config.json is not in tokenizer.json"
                )
            return found
        for config in self.model_configs:
            value = config.get(f"{kind}_token_id")
            first = value[0] if isinstance(value, list) and value else value
            if type(first) is int and 0 <= first < self.vocab_size:
                return first
            if first is not None:
                last = self.vocab_size - 1
                raise ConfigError(
                    f"{self.folder}: {kind}_token_id is {value!r}, and the tokenizer's ids are 0 to {last}"
                )
        return None
