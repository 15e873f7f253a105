"""Tokens that are no text, such as those of synthetic tasks, written as their numbers."""

import re
from typing import Any, ClassVar

import numpy as np

from data.tokenizer import EncodingError, checked_ids, token_dtype

MOST_TOKENS = 1 << 24  # more is no vocabulary, but a file that wants the memory


class NumberTokenizer:
    """Each token is its number with a blank behind it: `17 0 203 `. When read, any white space separates them."""

    name: ClassVar[str] = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(str(number)) + 1 for number in range(self.vocab_size)], dtype=np.int64)

    def encode(self, text: bytes) -> np.ndarray:
        ids = []
        for word in re.finditer(rb"\S+", text):
            if not (word[0].isdigit() and int(word[0]) < self.vocab_size):
                raise EncodingError(word.start(), f"{word[0].decode(errors='replace')!r} is no number of a token")
            ids.append(int(word[0]))
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> bytes:
        return b"".join(b"%d " % number for number in checked_ids(ids, self.vocab_size))

    def last_cut(self, text: bytes) -> int:
        return text.rfind(b" ") + 1

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "vocab_size": self.vocab_size}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "NumberTokenizer":
        size = fields.get("vocab_size")
        if type(size) is not int or not 1 <= size <= MOST_TOKENS:
            raise ValueError(f"the tokenizer `numbers` must have a vocab_size from 1 to {MOST_TOKENS}")
        return cls(size)
