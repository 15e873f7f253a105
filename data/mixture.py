"""Several texts that train together: each sample is a window of one of them, each text as often as its weight says.

Which one is a pure function of the sample's index, so that one integer resumes a run. The first text gets its share of
all samples, the second its share of those that are left, and so on: with p the share of a text among the samples left
to it, it has had round(n p) of the first n of these, and sample n is its own where that number grows. So after any
number of samples a text is away from its share by half a sample, and half a sample for each text before it, at most;
and its own are numbered without gaps, so that the order of this text alone, keyed by the seed, says which window each
of them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np

from data.dataset import TokenDataset
from data.disk import sha256_json
from data.order import SampleOrder

FINEST = 10**6  # largest denominator of a share: the products below stay in 64 bits for 10^12 samples
MIXTURE = "mixture"


@dataclass(frozen=True, eq=False)
class Mixture(TokenDataset):
    """The training splits of the `parts`, laid end to end; `shares` of the samples, which sum to 1."""

    parts: tuple[TokenDataset, ...]
    shares: tuple[Fraction, ...]

    @property
    def bytes_per_token(self) -> float:
        """Of the samples: the parts' own by their shares."""
        return sum(float(share) * part.bytes_per_token for part, share in zip(self.parts, self.shares, strict=True))


class Joined:
    """Tokens of several datasets laid end to end, none of them copied. A slice lies inside one of them."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = arrays
        self.firsts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, tokens: slice) -> np.ndarray:
        index = int(np.searchsorted(self.firsts, tokens.start, side="right")) - 1
        first, last = self.firsts[index], self.firsts[index + 1]
        assert tokens.stop <= last, "a window of one text"
        return self.arrays[index][tokens.start - first : tokens.stop - first]


def mix_datasets(parts: Sequence[TokenDataset], weights: Sequence[float]) -> Mixture:
    """The parts by their weights, whose sum does not matter; all of one tokenizer."""
    assert len({part.tokenizer.vocab_size for part in parts}) == 1
    exact = [Fraction(str(weight)) for weight in weights]
    shares = tuple(weight / sum(exact) for weight in exact)
    firsts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    starts = [part.document_starts[:-1] + first for part, first in zip(parts, firsts)]
    return Mixture(
        tokens=cast(np.ndarray, Joined([part.tokens for part in parts])),
        document_starts=np.concatenate([*starts, firsts[-1:]]),
        fingerprint=sha256_json([[part.fingerprint, str(share)] for part, share in zip(parts, shares)]),
        tokenizer=parts[0].tokenizer,
        corpus=MIXTURE,
        split=parts[0].split,
        document_bytes=np.concatenate([part.document_bytes for part in parts]),
        document_words=np.concatenate([part.document_words for part in parts]),
        titles=[title for part in parts for title in part.titles],
        parts=tuple(parts),
        shares=shares,
    )


@dataclass(frozen=True)
class MixtureOrder:
    """Where each sample begins in the joined tokens. ValueError if not even one window fits into a part."""

    orders: tuple[SampleOrder, ...]
    firsts: tuple[int, ...]
    shares: tuple[Fraction, ...]

    @classmethod
    def of(cls, mixture: Mixture, seq_len: int, seed: int) -> MixtureOrder:
        """Each part in its own order of that seed."""
        orders = tuple(SampleOrder(len(part.tokens), seq_len, seed) for part in mixture.parts)
        firsts = np.cumsum([0, *(len(part.tokens) for part in mixture.parts)])
        return cls(orders, tuple(map(int, firsts[:-1])), mixture.shares)

    def parts(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(part, index among its samples) of global sample indices; all int64 [S]."""
        part = np.full(len(samples), len(self.shares) - 1)
        index = np.asarray(samples, dtype=np.int64).copy()
        open_ = np.ones(len(samples), dtype=bool)  # not yet given to a part
        rest = Fraction(1)
        for number, share in enumerate(self.shares[:-1]):
            among = (share / rest).limit_denominator(FINEST)
            had, after = (_rounded(count, among) for count in (index, index + 1))
            own = open_ & (after > had)
            part[own] = number
            index = np.where(own, had, np.where(open_, index - had, index))
            open_ &= ~own
            rest -= share
        return part, index

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Index of the first token of each sample: global sample indices [S] -> int64 [S]."""
        part, index = self.parts(samples)
        starts = np.empty(len(part), dtype=np.int64)
        for number, (order, first) in enumerate(zip(self.orders, self.firsts, strict=True)):
            own = part == number
            starts[own] = order.starts(index[own]) + first
        return starts

    def since(self, samples: np.ndarray) -> np.ndarray:
        """Index of the first token that a reader of each sample knows: the sample's own."""
        return self.starts(samples)

    def begins(self, sample: int) -> bool:
        """Whether the rows of a step that reads this sample begin anew: always."""
        return True


def _rounded(count: np.ndarray, share: Fraction) -> np.ndarray:
    """That share of a number of samples, to the nearest whole one: int64 [S]."""
    return (count * share.numerator + share.denominator // 2) // share.denominator
