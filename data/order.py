"""The order of training samples: a pure function of (seed, sample index), so that one integer resumes a run.

Frozen: any change here changes what runs of a given seed read; `tests/data/test_order.py` holds it fast.

Of N tokens, with windows of T, epoch e has n = floor((N - T) / T) windows, which begin at o, o + T, o + 2T,
..., where o = random(seed, e) mod T. (If n would be 0 there is one window, at 0.) Sample s is window pi(s mod
n) of epoch e = s div n. It spans T + 1 tokens: T inputs and, shifted by one, T targets.

pi, a permutation of range(n) selected by (seed, e), is a Feistel network over the next power of 4, walked
along its cycle until it lands below n. So it needs no memory, and none of numpy's random streams, which may
change (NEP 19).
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: steps along it visit every 64-bit number


@dataclass(frozen=True)
class SampleOrder:
    """Where each training sample begins. ValueError if not even one window fits into the tokens."""

    num_tokens: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len: must be at least 1, not {self.seq_len}")
        if self.num_tokens < self.seq_len + 1:
            raise ValueError(
                f"data.seq_len: a window of {self.seq_len} and the target of its last token take "
                f"{self.seq_len + 1} tokens, but the training text has {self.num_tokens}"
            )

    @property
    def windows_per_epoch(self) -> int:
        return max(1, self.num_tokens // self.seq_len - 1)

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Index of the first token of each sample: global sample indices [S] -> int64 [S]."""
        samples = np.asarray(samples, dtype=np.uint64)
        n = np.uint64(self.windows_per_epoch)
        keys = _epoch_keys(self.seed, samples // n)
        starts = permute(samples % n, int(n), keys) * np.uint64(self.seq_len)
        if self.num_tokens >= 2 * self.seq_len:
            starts += mix(keys) % np.uint64(self.seq_len)
        return starts.astype(np.int64)

    def since(self, samples: np.ndarray) -> np.ndarray:
        """Index of the first token that a reader of each sample knows: the sample's own."""
        return self.starts(samples)

    def begins(self, sample: int) -> bool:
        """Whether the rows of a step that reads this sample begin anew: always."""
        return True


@dataclass(frozen=True)
class StreamOrder:
    """Where each sample begins if the rows of a batch are continuous streams, for state carried across segments.

    The N tokens are cut into `rows` lanes of L = N div rows. Row g of step b, sample b rows + g, reads segment b mod n
    of lane g, the tokens from gL + (b mod n) T on, with n = (L - 1) div T. So a row goes on where it stopped one step
    before, until all lanes are read: then they begin again. ValueError if a lane is shorter than a segment.
    """

    num_tokens: int
    seq_len: int
    rows: int

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise ValueError(
                f"data.stream: the {self.rows} rows of a step read a lane of {self.num_tokens // self.rows} tokens "
                f"each, and a segment of data.seq_len {self.seq_len} with the target of its last token takes "
                f"{self.seq_len + 1}: fewer rows (train.batch_tokens), a shorter data.seq_len or more text"
            )

    @property
    def segments(self) -> int:
        """Segments of a lane."""
        return (self.num_tokens // self.rows - 1) // self.seq_len

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Index of the first token of each sample: global sample indices [S] -> int64 [S]."""
        step = np.asarray(samples, dtype=np.int64) // self.rows
        return self.since(samples) + step % self.segments * self.seq_len

    def since(self, samples: np.ndarray) -> np.ndarray:
        """Index of the first token that a reader of each sample knows: that of its lane."""
        return np.asarray(samples, dtype=np.int64) % self.rows * (self.num_tokens // self.rows)

    def begins(self, sample: int) -> bool:
        """Whether the rows of a step that reads this sample begin anew: at the beginning of the lanes."""
        return sample // self.rows % self.segments == 0


Ranges = tuple[tuple[int, int], ...]
"""Samples that are never read, as ascending ranges [first, last)."""


def read_ranges(text: str | None) -> Ranges:
    """The ranges of `1000:1100, 5000:5200`, in ascending order; ValueError says which one is none."""
    ranges = []
    for word in (text or "").split(",") if text else ():
        first, _, last = (part.strip() for part in word.partition(":"))
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last) < 1 << 62):
            raise ValueError(f"data.skip: {word.strip()!r} must be two samples first:last, first < last")
        ranges.append((int(first), int(last)))
    return tuple(sorted(ranges))


def readable(first: int, number: int, skip: Ranges) -> np.ndarray:
    """The `number` samples from `first` on that lie in no range of `skip`: int64 [number]."""
    found = []
    for start, stop in skip:
        before = min(number, max(0, start - first))
        found.append(np.arange(first, first + before))
        number -= before
        if not number:
            break
        first = max(first, stop)
    return np.concatenate([*found, np.arange(first, first + number)])


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Image of each value [S] under the permutation of range(size) that its key [S] selects; all uint64."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    images = _feistel(values, half_bits, keys)
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], half_bits, keys[outside])
    return images


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection that scatters 64-bit numbers: the output function of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _epoch_keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    seeds = np.full(epochs.shape, seed % 2**64, dtype=np.uint64)
    return mix(mix(seeds + GOLDEN) + (epochs + np.uint64(1)) * GOLDEN)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of range(4^half_bits), selected by the key."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for _ in range(ROUNDS):
        keys = keys + GOLDEN
        left, right = right, left ^ (mix(mix(keys) ^ right) & mask)
    return left << bits | right
