"""Letters that nobody can predict: independent, uniform, the same everywhere, read anywhere, never held in memory."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

import data.letters
from data.corpora import iid
from data.corpus import load_corpus
from data.document import Split
from data.letters import ALPHABET, Letters
from data.order import SampleOrder
from data.shards import prepare
from data.tokenizer import CharacterTokenizer


def content(of: Letters | Split) -> bytes:
    return b"".join(of.chunks())


def splitmix64(seed: int, index: int) -> int:
    """The definition, in whole numbers."""
    z = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("alphabet", [2, 4, 26])
def test_a_letter_is_a_function_of_its_place(alphabet: int) -> None:
    for start in (0, 9_999_000):
        expected = "".join(ALPHABET[(splitmix64(20250715, start + i) >> 32) * alphabet >> 32] for i in range(200))
        assert content(Letters(alphabet, start, start + 200)).decode() == expected


def test_the_text_is_what_it_has_always_been() -> None:
    """Results name this corpus, so it may not change with versions of anything."""
    assert content(Letters(4, 0, 24)) == b"cdaddcbdababdbdbbbacadca"
    digest = hashlib.sha256(content(load_corpus("iid").split("all"))).hexdigest()
    assert digest == "1fd89811b7b94230ac1acfe270a4a7b8e54ddb5b1d361a3c54cd7999940f20f9"


@pytest.mark.parametrize("block", [1, 7, 100, 1000])
def test_any_part_is_a_slice_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    whole = content(Letters(26, 0, 300))
    monkeypatch.setattr(data.letters, "BLOCK", block)
    assert content(Letters(26, 0, 300)) == whole
    piece = Letters(26, 0, 300).part(17, 290).part(3, 250)
    assert (piece.num_bytes, content(piece)) == (247, whole[20:267])
    assert max(map(len, piece.chunks())) <= block


@pytest.mark.parametrize("alphabet", [2, 3, 4, 26])
def test_letters_are_uniform_and_pairs_independent(alphabet: int) -> None:
    """Chi-squared of single letters and of pairs at several distances, each within 5 standard deviations."""
    letters = np.frombuffer(content(Letters(alphabet, 0, 1_000_000)), dtype=np.uint8) - ord("a")
    tables = [np.bincount(letters, minlength=alphabet)]
    for distance in (1, 2, 3, 31, 32, 33, 1024):
        pairs = letters[:-distance].astype(int) * alphabet + letters[distance:]
        tables.append(np.bincount(pairs, minlength=alphabet**2))
    for table in tables:
        assert len(table) in (alphabet, alphabet**2)
        expected, freedom = table.sum() / len(table), len(table) - 1
        chi_squared = ((table - expected) ** 2 / expected).sum()
        assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom) + 5


def test_the_corpus_says_how_many_letters_it_has() -> None:
    corpus = load_corpus("iid", alphabet=7)
    assert corpus.name == "iid7"
    assert set(content(corpus.split("validation"))) == set(ALPHABET[:7].encode())
    with pytest.raises(ValueError, match=r"data\.alphabet: must be from 2 to 26 letters, not 27"):
        load_corpus("iid", alphabet=27)
    with pytest.raises(ValueError, match=r"data\.path: has no effect on the corpus iid"):
        load_corpus("iid", "letters.txt")


def test_what_trains_does_not_validate_and_is_not_read_twice() -> None:
    """1,500 steps of 64 sequences of 32 are fresh; 4,096 sequences validate."""
    corpus = load_corpus("iid", validation=0.02)
    train, validation = corpus.split("train"), corpus.split("validation")
    assert content(corpus.split("all")) == content(train) + content(validation)
    order = SampleOrder(train.num_bytes, 32, seed=1)
    assert order.windows_per_epoch >= 1500 * 64
    starts = np.sort(order.starts(np.arange(1500 * 64)))
    assert (np.diff(starts) >= 32).all()
    assert validation.num_bytes > 4096 * 32


def test_another_text_may_validate(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("abcd")
    corpus = load_corpus("iid", validation=str(tmp_path / "other"))
    assert content(corpus.split("validation")) == b"abcd"


def test_each_alphabet_has_tokens_of_its_own_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iid, "LETTERS", 1000)
    found = []
    for alphabet in (2, 4, 4):
        split = load_corpus("iid", alphabet=alphabet).split("train")
        tokenizer = CharacterTokenizer.train(split)
        dataset = prepare(load_corpus("iid", alphabet=alphabet), "train", tokenizer, tmp_path)
        assert tokenizer.vocab_size == alphabet
        assert tokenizer.decode(dataset.tokens) == content(split)
        found.append(dataset.fingerprint)
    assert found[0] != found[1] == found[2]
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 2


def test_words_for_a_place() -> None:
    split = Split((Letters(4, 10, 20), Letters(2, 0, 5)))
    assert [split.locate(offset) for offset in (3, 12)] == [
        "letter 13 of 4 independent ones",
        "letter 2 of 2 independent ones",
    ]
