"""The order of training samples: a pure function of (seed, sample index), so that a run resumes from one integer.

Frozen: a change of any number here changes what every run with a given seed reads. `tests/data/test_order.py` holds it fast.

Of N tokens, with windows of T, epoch e uses n = floor((N - T) / T) windows that begin at o_e, o_e + T, o_e + 2T, ...,
where o_e = random(seed, e) mod T. (If n would be 0 there is one window, at 0.) Sample s is window pi_e(s mod n) of epoch
e = s div n. It spans T + 1 tokens: T inputs and, shifted by one, T targets.

pi_e is a Feistel network over the next power of 4, walked along its cycle until it lands below n: a bijection that needs no
memory, and no promise of numpy's about its random streams (NEP 19 gives none).
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: steps along it visit every 64-bit number


@dataclass(frozen=True)
class SampleOrder:
    """Where each training sample begins. ValueError if not one window of `seq_len` + 1 tokens fits into `num_tokens`."""

    num_tokens: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len: must be at least 1, not {self.seq_len}")
        if self.num_tokens < self.seq_len + 1:
            raise ValueError(
                f"data.seq_len: a window of {self.seq_len} and its last target need {self.seq_len + 1} tokens, "
                f"but the training text has {self.num_tokens}"
            )

    @property
    def windows_per_epoch(self) -> int:
        return max(1, (self.num_tokens - self.seq_len) // self.seq_len)

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Index of the first token of each sample. samples: global sample indices, any shape -> int64, same shape."""
        samples = np.asarray(samples, dtype=np.uint64)
        n = np.uint64(self.windows_per_epoch)
        epoch_keys = _epoch_keys(self.seed, samples // n)
        windows = permute(samples % n, int(n), epoch_keys)
        starts = (windows * np.uint64(self.seq_len)).astype(np.int64)
        if self.num_tokens < 2 * self.seq_len:
            return starts
        return starts + (mix(epoch_keys) % np.uint64(self.seq_len)).astype(np.int64)


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The image of each value under the permutation of range(size) that its key selects. uint64 arrays of one shape."""
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    result = _feistel(values, half_bits, keys)
    outside = result >= size
    while outside.any():
        result[outside] = _feistel(result[outside], half_bits, keys[outside])
        outside = result >= size
    return result


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that scatters them: SplitMix64's output function (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _epoch_keys(seed: int, epochs: np.ndarray) -> np.ndarray:
    seed_key = mix(np.array(seed % 2**64, dtype=np.uint64) + _GOLDEN)
    return mix(seed_key + (epochs + np.uint64(1)) * _GOLDEN)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of range(4 ** half_bits), selected by the key."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for _ in range(ROUNDS):
        keys = keys + _GOLDEN
        left, right = right, left ^ (mix(mix(keys) ^ right) & mask)
    return left << bits | right
