"""Make a tokenizer of a SentencePiece model (`tokenizer.model`, `spiece.model`), which older checkpoints have alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from qlora_pipe.errors import ConfigError, DataError, MissingInputError

FILES = ("tokenizer.model", "spiece.model")
SETTINGS = ("tokenizer_class", "extra_ids", "add_bos_token", "add_eos_token", "added_tokens_decoder")
"""Keys of tokenizer_config.json that decide what a model becomes."""

_MAX_BYTES = 64 * 2**20
_UNIGRAM, _BPE = 1, 2
# Kinds of pieces.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"
# How many sentinels T5 has where its config does not say.
_T5_SENTINELS = 100


def find(folder: Path) -> Path | None:
    """The SentencePiece model of a folder, None where it has none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def convert(data: bytes, path: Path, config: Mapping[str, Any], added: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Make the tokenizer whose ids are SentencePiece's, with the tokens that a folder adds to the model's.

    (One thing differs: a unigram model with byte fallback takes a text that spells a byte, `<0x0A>`, for that byte.)

    `data` are the model's bytes and `path` where they lie; `config` is what tokenizer_config.json holds, `added` what
    added_tokens.json does. T5's kind (spiece.model) puts EOS after a text, LLaMA's BOS before it, unless the config
    says otherwise. MissingInputError without the sentencepiece library, DataError for what is no such model,
    ConfigError where added tokens do not go on from the model's ids.
    """
    proto = _parsed(data, path)
    spec, norm = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type not in (_UNIGRAM, _BPE) or not len(proto.pieces):
        raise DataError(f"{path} is neither a unigram nor a BPE model of SentencePiece.")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    sentinels = _sentinels(path, config)
    if spec.model_type == _UNIGRAM:
        vocabulary = [*pieces, *((name, 0.0) for name in sentinels)]
        model: Any = models.Unigram(vocabulary, spec.unk_id, spec.byte_fallback)
    else:
        ids = {piece: number for number, (piece, _) in enumerate([*pieces, *((name, 0.0) for name in sentinels)])}
        model = models.BPE(
            vocab=ids,
            merges=[*_merges(pieces)],
            unk_token=pieces[spec.unk_id][0],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer(norm)
    if spec.model_type == _UNIGRAM and spec.split_by_whitespace:
        # No piece goes over a space, so the best pieces of a text are the best of each word.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")
    end = [decoders.Strip(" ", 1, 0)] if norm.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    of_model = [
        AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
        for piece in proto.pieces
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens([*of_model, *(AddedToken(name, normalized=False, special=True) for name in sentinels)])
    _add(tokenizer, config, added, path.parent)
    _put_around(tokenizer, path, config, pieces, bos_id=spec.bos_id, eos_id=spec.eos_id)
    return tokenizer


def _parsed(data: bytes, path: Path) -> Any:
    try:
        # Heavy, and only of use for folders without a tokenizer.json.
        from google.protobuf.message import DecodeError  # noqa: PLC0415
        from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415
    except ImportError as fault:
        raise MissingInputError(
            f"{path} needs the library sentencepiece to be read: pip install 'qlora-pipe[spm]' ({fault})."
        ) from fault
    if len(data) > _MAX_BYTES:
        raise DataError(f"{path} has {len(data):,} bytes; a SentencePiece model has at most {_MAX_BYTES:,}.")
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as fault:
        raise DataError(f"{path} is not a SentencePiece model: {fault}.") from fault
    return proto


def _sentinels(path: Path, config: Mapping[str, Any]) -> list[str]:
    """T5's sentinels, which its SentencePiece model lacks, in the order of their ids: the last one first."""
    is_t5 = str(config.get("tokenizer_class", "")).startswith("T5")
    count = config.get("extra_ids", _T5_SENTINELS if is_t5 else 0)
    if type(count) is not int or not 0 <= count <= 100_000:
        raise ConfigError(f"{path.parent / 'tokenizer_config.json'}: extra_ids is {count!r}, no such number.")
    return [f"<extra_id_{number}>" for number in reversed(range(count))]


def _merges(pieces: Sequence[tuple[str, float]]) -> Iterator[tuple[str, str]]:
    """The pairs that BPE joins, the best piece first: SentencePiece keeps the pieces' scores instead."""
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    for piece, _ in sorted(pieces, key=lambda piece: -piece[1]):
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        yield from sorted(
            ((one, other) for one, other in cuts if one in ids and other in ids),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """What SentencePiece does to a text before it looks for pieces."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        extra = ((r"\A +", ""), (r" +\z", ""), (" {2,}", " "))
        steps += [normalizers.Replace(Regex(pattern), into) for pattern, into in extra]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _add(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], added: Mapping[str, Any], folder: Path) -> None:
    """Add the tokens that the folder lists besides the model's, each with the id that it says."""
    found: dict[int, dict[str, Any]] = {}
    for name, number in added.items():
        if type(number) is not int:
            raise ConfigError(f"{folder / 'added_tokens.json'}: the id of {name!r} is {number!r}.")
        found[number] = {"content": name, "special": True}
    listed = config.get("added_tokens_decoder", {})
    for number, token in listed.items() if isinstance(listed, dict) else ():
        if not number.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ConfigError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder[{number!r}] is no token.")
        found[int(number)] = token
    for number, token in sorted(found.items()):
        flags = {name: token.get(name) is True for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        if tokenizer.token_to_id(token["content"]) != number:
            raise ConfigError(
                f"{folder}: the added token {token['content']!r} has the id {number}, and the next free one is"
                f" {tokenizer.token_to_id(token['content'])}."
            )


def _put_around(
    tokenizer: tokenizers.Tokenizer,
    path: Path,
    config: Mapping[str, Any],
    pieces: Sequence[tuple[str, float]],
    *,
    bos_id: int,
    eos_id: int,
) -> None:
    """Let the tokenizer put BOS before a text, EOS after it, or neither, as its kind does."""
    is_t5 = path.name == "spiece.model"
    wanted = (("add_bos_token", bos_id, not is_t5), ("add_eos_token", eos_id, is_t5))
    bos, eos = (
        pieces[number][0] if config.get(name, usual) is True and 0 <= number < len(pieces) else None
        for name, number, usual in wanted
    )
    around = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    if around:
        single = " ".join(part for part in (bos, "$A", eos) if part is not None)
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
