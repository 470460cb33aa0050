"""A tokenizer of a few hundred tokens, made here, in the form LLaMA's has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as RawTokenizer

from qlora_pipe.data.tokenizer import Tokenizer

BOS, EOS = "<s>", "</s>"


def _raw_tokenizer() -> RawTokenizer:
    pieces = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz:.#</>"]
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s"), ("n", "o"), ("▁", "▁"), ("t", "h"), ("th", "e")]
    vocab = {piece: number for number, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", BOS, EOS)])
    return raw


MakeTokenizerFolder = Callable[..., Path]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> MakeTokenizerFolder:
    """Make a folder with the tiny tokenizer; `change` edits tokenizer.json's object, other words add JSON files."""

    def make(*, change: Callable[[dict[str, Any]], None] | None = None, **configs: Any) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        content = json.loads(_raw_tokenizer().to_str())
        if change is not None:
            change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        for name, config in (configs or {"tokenizer_config": {"eos_token": EOS}}).items():
            (folder / f"{name}.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def tiny_tokenizer(tokenizer_folder: MakeTokenizerFolder) -> Tokenizer:
    """The tiny tokenizer, with `<s>` in front."""
    return Tokenizer.open(tokenizer_folder())


@pytest.fixture
def tokenizer_without_bos(tokenizer_folder: MakeTokenizerFolder) -> Tokenizer:
    """The same, with nothing in front."""
    return Tokenizer.open(tokenizer_folder(tokenizer_config={"eos_token": EOS, "add_bos_token": False}))
