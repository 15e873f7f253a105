"""Letters that nobody can predict: drawn independently and uniformly, the same in every run."""

from data.corpora.contract import Corpus, Source
from data.holdout import hold_out
from data.letters import ALPHABET, Letters

LETTERS = 10_000_000


def iid(source: Source) -> Corpus:
    """Ten million of the first `alphabet` letters.

    Nobody predicts them better than by log2(alphabet) bits per byte, but who sees them.
    """
    if not 2 <= source.alphabet <= len(ALPHABET):
        raise ValueError(f"data.alphabet: must be from 2 to {len(ALPHABET)} letters, not {source.alphabet}")
    return Corpus(f"iid{source.alphabet}", hold_out([Letters(source.alphabet, 0, LETTERS)], source.validation))
