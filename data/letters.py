"""Text that is drawn, not read: letters whose next one nobody can know. Without a file, the same on every machine."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.order import GOLDEN, mix

ALPHABET = string.ascii_lowercase
BLOCK = 1 << 20  # letters drawn at a time
SEED = np.uint64(20250715)


@dataclass(frozen=True)
class Letters:
    """Letters [start, stop) of the endless text of the first `alphabet` letters, independent and uniform.

    The text is a pure function of the position: letter i is the output i of SplitMix64 (Steele et al., 2014), scaled to
    the alphabet. So the bits per byte of whoever has not seen a letter are at least log2(alphabet), in expectation.
    """

    alphabet: int
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """One byte is one letter."""
        return self.stop - self.start

    @property
    def title(self) -> str:
        """What results of this document alone are called."""
        return f"letters {self.start} to {self.stop}"

    def chunks(self) -> Iterator[bytes]:
        """The text in pieces of at most `BLOCK` bytes."""
        letters = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)
        for first in range(self.start, self.stop, BLOCK):
            position = np.arange(first, min(first + BLOCK, self.stop), dtype=np.uint64)
            high = mix(SEED + position * GOLDEN) >> np.uint64(32)
            yield letters[(high * np.uint64(self.alphabet)) >> np.uint64(32)].tobytes()

    def part(self, first: int, last: int) -> Letters:
        """Bytes [first, last) of this document."""
        return Letters(self.alphabet, self.start + first, self.start + last)

    def locate(self, offset: int) -> str:
        """Words for the byte `offset`, for messages."""
        return f"letter {self.start + offset} of {self.alphabet} independent ones"

    def identity(self) -> list[Any]:
        """What determines the bytes, for JSON."""
        return ["letters", int(SEED), self.alphabet, self.start, self.stop]
