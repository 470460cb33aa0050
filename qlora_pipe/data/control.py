"""Tokenise renderings, in which a template's control tokens are ids and the same characters in a message are text.

A control token is what the tokenizer calls special: `</s>`, `<|im_end|>`. In the text that is tokenised one private-use
character, its *sign*, stands for each, and the tokenizer knows it under that name alone. So its name is ordinary text
wherever it stands, also where a vocabulary lists it among its words, as T5's does.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray

from qlora_pipe.data.tokenizer import Tokenizer, faults_named
from qlora_pipe.errors import ConfigError

SIGNS = range(0x10F000, 0x10FFFE)
"""Private-use characters that stand for control tokens; no message may hold one."""


class Tokens(NamedTuple):
    """Ids [T] of a text, int32, and the half-open range of characters that each covers, starts [T] and ends [T]."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """A rendering in which signs stand for the control tokens that its template wrote."""

    text: str
    controls: list[tuple[int, int]]
    """Where the control tokens stood before, half-open ranges of characters, in order."""

    def place(self, character: int) -> int:
        """Where a character of the rendering, outside of control tokens, has come to."""
        before = bisect_right(self.controls, character, key=lambda control: control[1])
        return character - sum(end - start - 1 for start, end in self.controls[:before])

    def closing(self, start: int, end: int) -> tuple[int, int] | None:
        """The characters of the first control token between two characters and those that follow it at once, if any."""
        closing: tuple[int, int] | None = None
        for first, past in self.controls:
            if first >= start and past <= end:
                if closing is None:
                    closing = first, past
                elif closing[1] == first:
                    closing = closing[0], past
        return closing


class ControlTokens:
    """A tokenizer whose control tokens go by their signs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Make it of a tokenizer; ConfigError where it has more control tokens than there are signs."""
        if len(tokenizer.control) > len(SIGNS):
            raise ConfigError(
                f"the tokenizer has {len(tokenizer.control):,} control tokens, and {len(SIGNS):,} can be told apart."
            )
        self.tokenizer = tokenizer
        self._sign_of = {name: chr(sign) for name, sign in zip(sorted(tokenizer.control), SIGNS, strict=False)}
        content = json.loads(tokenizer.inner.to_str())
        _rename(content, self._sign_of, ids=tokenizer.inner.get_vocab(with_added_tokens=True))
        with faults_named("the tokenizer's control tokens cannot be told from text"):
            self._inner = tokenizers.Tokenizer.from_str(json.dumps(content))
        # As the tokenizers library looks for them: the longest of those that begin at a character.
        longest_first = sorted(self._sign_of, key=lambda name: (-len(name), name))
        self._names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    @lru_cache(maxsize=2)
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Make it, or give the one that was made of this tokenizer before."""
        return cls(tokenizer)

    def within(self, text: str) -> bool:
        """Whether a text holds the name of a control token."""
        return self._names.search(text) is not None

    def may_join(self, text: str) -> bool:
        """Whether a text holds a control token's name, or four characters that one begins or ends with."""
        return any(part in text for name in self._sign_of for part in (name[:4], name[-4:]))

    def sign(self, text: str, contents: Iterable[tuple[int, int]]) -> Signed:
        """Put signs in the place of control tokens, but for those that touch `contents`: there they are text."""
        parts: list[str] = []
        controls: list[tuple[int, int]] = []
        at = 0
        for start, end in (*contents, (len(text), len(text))):
            for found in self._names.finditer(text, at, start):
                parts += [text[at : found.start()], self._sign_of[found[0]]]
                controls.append(found.span())
                at = found.end()
            parts.append(text[at:end])
            at = end
        return Signed(text="".join(parts), controls=controls)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenise signed texts, in threads; DataError where the tokenizers library cannot."""
        with faults_named("the tokenizer cannot read the text"):
            encodings = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [_tokens(encoding) for encoding in encodings]


def _tokens(encoding: tokenizers.Encoding) -> Tokens:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return Tokens(np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])


def _rename(content: dict[str, Any], sign_of: Mapping[str, str], *, ids: Mapping[str, int]) -> None:
    """Give control tokens other names throughout a tokenizer.json; one that is no added token becomes one."""
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {sign_of.get(name, name): number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[sign_of.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in sign_of:
        model["unk_token"] = sign_of[model["unk_token"]]
    if "merges" in model:
        # What would join letters into a control token, or one into something else, has no place in a text.
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, sign_of)]
    added = {token["content"]: token for token in content["added_tokens"]}
    for name, sign in sign_of.items():
        plain = {"id": ids[name], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added[name] = {**plain, **added.get(name, {}), "content": sign, "special": True}
    content["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def _touches(merge: str | list[str], names: Mapping[str, str]) -> bool:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first in names or second in names or first + second in names
