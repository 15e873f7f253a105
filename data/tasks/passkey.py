"""Passkey: digits hidden at some depth of a dull text, asked for at its end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data.loader import UNSCORED
from data.tasks.draws import Draws
from data.tasks.task import Examples, Task, register, setting
from data.tokenizer import ByteTokenizer, Tokenizer

FILLER = (
    b"A slow river runs to the sea. Old boats lie along the shore. "
    b"The wind is low and the day is long. Nobody waits on the pier. "
)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MARK, ASK = ord("#"), ord("?")


@register("passkey")
@dataclass(frozen=True)
class Passkey(Task):
    """T + 1 bytes: four sentences over and over, with `#dddd#` put into them; at the end `?` and the digits again.

    All but the last byte are read, and the digits behind `?` are the labels. Of the h = T - 2 digits - 2 bytes of
    sentences, which begin at a random place of the four, round(depth h) stand before the passkey. Mohtashami and Jaggi,
    "Landmark Attention" (2023, arXiv 2305.16300), section 4.2, made shorter.
    """

    digits: int = setting(4, "d", "of the passkey", at_least=1)
    depth: float | None = setting(
        None, "depth", "share of the text before the passkey; null = random", at_least=0, at_most=1
    )

    vocab_size = 256

    @property
    def tokenizer(self) -> Tokenizer:
        return ByteTokenizer()

    def problems(self, length: int) -> list[tuple[str, str]]:
        if length < 2 * self.digits + 2:
            most = max(0, length - 2) // 2
            return [("digits", f"a passkey with its question and answer in {length} bytes has at most {most} digits")]
        return []

    def variants(self) -> list[Task]:
        return [self] if self.depth is not None else [replace(self, depth=depth) for depth in DEPTHS]

    def examples(self, draws: Draws, length: int) -> Examples:
        passkey = ord("0") + draws.below(10, self.digits)
        phase = draws.below(len(FILLER), 1)
        hay = length - 2 * self.digits - 2
        before = draws.below(hay + 1, 1) if self.depth is None else np.full((len(draws), 1), round(self.depth * hay))
        text = np.frombuffer(FILLER, dtype=np.uint8)[(phase + np.arange(hay)) % len(FILLER)].astype(np.int64)
        rows = np.empty((len(draws), length + 1), dtype=np.int64)
        hidden = before + np.arange(self.digits + 2)
        is_hay = np.ones((len(draws), hay + self.digits + 2), dtype=bool)
        np.put_along_axis(is_hay, hidden, False, axis=1)
        rows[:, : is_hay.shape[1]][is_hay] = text.ravel()
        needle = np.pad(passkey, ((0, 0), (1, 1)), constant_values=MARK)
        np.put_along_axis(rows, hidden, needle, axis=1)
        rows[:, -self.digits - 1], rows[:, -self.digits :] = ASK, passkey
        labels = np.full((len(draws), length), UNSCORED, dtype=np.int64)
        labels[:, -self.digits :] = passkey
        return Examples(rows[:, :-1], labels)
