"""A checkpoint's own tokenizer, and the control tokens that training needs of it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from qlora_formats.errors import FormatError
from qlora_formats.strict_json import read_object
from qlora_pipe.data import sentencepiece_model
from qlora_pipe.errors import ConfigError, DataError, MissingInputError, QlorapipeError
from qlora_pipe.rows import LONE_SURROGATE

TOKENIZER_FILE = "tokenizer.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
    """sha256 of tokenizer.json, or of the SentencePiece model and what is added to it, hexadecimal."""
    inner: tokenizers.Tokenizer = field(repr=False)
    behind: tuple[int, ...] = ()
    """The ids that this tokenizer puts after a text: T5's EOS."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What templates know control tokens by, such as `eos_token`, and how they are written."""
    control: frozenset[str] = frozenset()
    """How all control tokens are written."""

    @classmethod
    def open(cls, folder: str | Path) -> "Tokenizer":
        """Open the tokenizer of a model folder.

        It is read from tokenizer.json, or where there is none from a SentencePiece model. MissingInputError where both
        are absent, DataError where it cannot be read, ConfigError where the folder does not say what ends a text.
        """
        folder = Path(folder)
        config = _read_config(folder / "tokenizer_config.json")
        path, inner, digest = _read(folder, config)
        with faults_named(f"{path} is not a tokenizer that can be read"):
            in_front, behind = _make_plain(inner)
        model_configs = [_read_config(folder / name) for name in ("generation_config.json", "config.json")]
        vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = _ControlIds(folder=folder, inner=inner, config=config, model_configs=model_configs, vocab_size=vocab_size)
        bos_id, eos_id = ids.bos(in_front=in_front), ids.eos()
        names = _names(config, _read_config(folder / "special_tokens_map.json"), inner, eos_id=eos_id)
        return cls(
            bos_id=bos_id,
            eos_id=eos_id,
            vocab_size=vocab_size,
            digest=digest,
            inner=inner,
            behind=behind,
            names=names,
            control=_control(config, names, inner),
        )

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Give a text's ids, without control tokens, and for each the half-open range of characters it covers.

        DataError where the text is none: a lone surrogate, or (some vocabularies list `</s>` as an ordinary piece)
        words that this tokenizer has no way to read but as its control token.
        """
        surrogate = LONE_SURROGATE.search(text)
        if surrogate:
            raise DataError(f"the text holds a lone surrogate at character {surrogate.start()}")
        with faults_named("the tokenizer cannot read the text"):
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


def _read(folder: Path, config: Mapping[str, Any]) -> tuple[Path, tokenizers.Tokenizer, str]:
    """Find a folder's tokenizer and make it; the digest is of all that it was made of."""
    path = folder / TOKENIZER_FILE
    if path.is_file():
        data = path.read_bytes()
        with faults_named(f"{path} is not a tokenizer that can be read"):
            return path, tokenizers.Tokenizer.from_str(data.decode()), hashlib.sha256(data).hexdigest()
    model = sentencepiece_model.find(folder)
    if model is None:
        raise MissingInputError(
            f"{folder} has neither tokenizer.json nor a SentencePiece model ({', '.join(sentencepiece_model.FILES)});"
            " copy it from the model that the folder was made of"
        )
    data, added = model.read_bytes(), _read_config(folder / "added_tokens.json")
    with faults_named(f"{model} is not a tokenizer that can be read"):
        inner = sentencepiece_model.convert(data, model, config, added)
    said = [(key, config.get(key)) for key in sentencepiece_model.SETTINGS]
    return model, inner, hashlib.sha256(data + repr((said, sorted(added.items()))).encode()).hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    """Read one JSON object; a file that is absent says nothing."""
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except FormatError as fault:
        raise ConfigError(f"{fault}.") from fault


@contextmanager
def faults_named(what: str) -> Iterator[None]:
    """Turn a fault of the tokenizers library into a DataError."""
    try:
        yield
    except QlorapipeError:
        raise
    except BaseException as fault:
        # The library raises bare Exceptions, and for a panic in its Rust a BaseException of a class it keeps private.
        if isinstance(fault, Exception) or type(fault).__name__ == "PanicException":
            raise DataError(f"{what}: {fault}") from fault
        raise


def _make_plain(inner: tokenizers.Tokenizer) -> tuple[list[int], tuple[int, ...]]:
    """Switch off what would make a text's ids depend on anything but the text; give the ids that came around it.

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
    behind: list[int] = probe.ids[len(is_text) - is_text[::-1].index(True) :] if any(is_text) else []
    inner.post_processor = None
    inner.encode_special_tokens = True
    return in_front, tuple(behind)


def _names(
    config: Mapping[str, Any], map_of_names: Mapping[str, Any], inner: tokenizers.Tokenizer, *, eos_id: int
) -> dict[str, str]:
    """How the control tokens are written that templates may name; EOS is known even where the folder says no name."""
    found = {name: _written(config.get(name)) or _written(map_of_names.get(name)) for name in _NAMES}
    found["eos_token"] = found["eos_token"] or inner.id_to_token(eos_id)
    return {name: text for name, text in found.items() if text is not None}


def _control(config: Mapping[str, Any], names: Mapping[str, str], inner: tokenizers.Tokenizer) -> frozenset[str]:
    """How control tokens are written: those that tokenizer.json calls special, and those that the config names."""
    listed = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    texts = [_written(token) for tokens in listed if isinstance(tokens, list) for token in tokens]
    named = {text for text in (*texts, *names.values()) if text and inner.token_to_id(text) is not None}
    return frozenset(named | {token.content for token in inner.get_added_tokens_decoder().values() if token.special})


def _written(token: object) -> str | None:
    """How a config writes a token: as a text, or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


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
        token = _written(self.config.get(f"{kind}_token"))
        if token is not None:
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
