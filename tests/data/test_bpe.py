"""Byte-pair encoding is exact, and the same in pieces as in one."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.bpe
from data.bpe import BYTE_OF, BpeTokenizer, last_word_end, read, train
from data.corpus import Corpus
from data.document import Document, Split
from data.tokenizer import EncodingError, from_json, pieces, tokenizer_hash
from data.vocabulary import TOKENIZER, corpus_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXT = "It's the naïve cat's 1234 hats,\n\n  and don't the   hats\tfit 文字 the cat? <DW52> <DW52>\r\n".encode() * 40
SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2007\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
texts = st.text(st.one_of(st.sampled_from("ab'st 1.<>\n " + SPACES), st.characters(exclude_categories=["Cs"])))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> BpeTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "text.txt"
    path.write_bytes(TEXT)
    return train(Split((Document.whole(path),)), 290)


def whole(tokenizer: BpeTokenizer, text: str) -> list[int]:
    """What the library says, of the whole text at once."""
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_file_json()))
    return library.encode(text, add_special_tokens=False).ids


def test_the_vocabulary_is_the_librarys_own(bpe: BpeTokenizer) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([TEXT.decode()], trainer)
    assert library.get_vocab() == {token: index for index, token in enumerate(bpe.vocab)}
    assert set(BYTE_OF) == set(alphabet)
    assert bpe.vocab_size == 290
    assert any(len(token) > 3 for token in bpe.tokens)
    assert not any(b"<DW52>" in token for token in bpe.tokens[:256])


@given(texts)
def test_every_text_comes_back(bpe: BpeTokenizer, text: str) -> None:
    ids = bpe.encode(text.encode())
    assert ids.dtype == np.dtype("<u2")
    assert ids.tolist() == whole(bpe, text)
    assert bpe.decode(ids) == text.encode()
    assert bpe.token_bytes[ids].sum() == len(text.encode())


@given(texts.filter(bool), st.integers(1, 12))
def test_pieces_encode_as_the_whole(bpe: BpeTokenizer, text: str, size: int) -> None:
    content = text.encode()

    class Chunks:
        def chunks(self):
            for start in range(0, len(text), size):
                yield text[start : start + size].encode()

    cut = list(pieces(Chunks(), bpe.last_cut))
    assert b"".join(cut) == content
    assert [index for piece in cut for index in bpe.encode(piece)] == whole(bpe, text)


def test_no_character_joins_the_white_space_behind_it(bpe: BpeTokenizer) -> None:
    splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    allowed = 0
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x3400), *range(0xF900, 0x10000)]):
        for space in "\n ":
            text = f"{character}{space}x"
            if last_word_end(text.encode()):
                allowed += 1
                assert next(span for _, span in splitter.pre_tokenize_str(text)) == (0, 1), repr(text)
    assert allowed > 100_000


def test_long_texts_are_encoded_in_parts_that_change_nothing(
    bpe: BpeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(bpe, TEXT.decode())
    monkeypatch.setattr(data.bpe, "AT_ONCE", 7)
    assert bpe.encode(TEXT).tolist() == expected
    assert bpe.encode(b"x" * 100).tolist() == whole(bpe, "x" * 100)  # no place to cut


def test_invalid_utf8_is_named_with_its_byte(bpe: BpeTokenizer, text_corpus: Callable[..., Corpus]) -> None:
    with pytest.raises(EncodingError, match="not UTF-8") as caught:
        bpe.encode(b"abc\xff")
    assert caught.value.offset == 3
    with pytest.raises(ValueError, match=r"0001\.txt, byte 4: not UTF-8"):
        train(text_corpus(b"a text", b"abc \xff d").split("all"), 300)


def test_a_tokenizer_is_restored_from_json(bpe: BpeTokenizer) -> None:
    restored = from_json(json.loads(json.dumps(bpe.to_json())))
    assert tokenizer_hash(restored) == tokenizer_hash(bpe)
    assert restored.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()


def test_a_bounded_sample_is_spread_over_the_text(
    text_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_corpus(*(f"{index:02} ".encode() * 10 for index in range(30))).split("all")
    assert [piece[:2] for piece in data.bpe._sample(text)] == [f"{index:02}" for index in range(30)]
    monkeypatch.setattr(data.bpe, "SAMPLE_BYTES", 300)
    kept = [int(piece[:2]) for piece in data.bpe._sample(text)]
    assert kept == list(range(0, 30, 3))


def test_a_trained_tokenizer_is_kept_and_a_damaged_one_made_anew(
    text_corpus: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = text_corpus(TEXT)
    first = corpus_tokenizer("bpe", corpus, 300, tmp_path / "cache")
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert folder.name.startswith("text-bpe300-")
    with monkeypatch.context() as patch:
        patch.setattr(data.bpe, "train", None)
        again = corpus_tokenizer("bpe", corpus, 300, tmp_path / "cache")
        of_file = read(folder / TOKENIZER)
    assert tokenizer_hash(first) == tokenizer_hash(again) == tokenizer_hash(of_file)
    content = (folder / TOKENIZER).read_bytes()
    (folder / TOKENIZER).write_bytes(content.replace(b'"h"', b'"i"', 1))
    with pytest.warns(UserWarning, match=rf"damaged cache, made anew: .*{TOKENIZER}"):
        anew = corpus_tokenizer("bpe", corpus, 300, tmp_path / "cache")
    assert tokenizer_hash(anew) == tokenizer_hash(first)


def file_of(bpe: BpeTokenizer, folder: Path, *keys: str, value: object = None) -> Path:
    """A tokenizer.json with one field changed."""
    fields = json.loads(json.dumps(bpe.to_file_json()))
    inner = fields
    for key in keys[:-1]:
        inner = inner[key]
    if keys:
        inner[keys[-1]] = value
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder / "tokenizer.json"


SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,2}|\w+\s*"}, "behavior": "Isolated", "invert": False}
LOSING = {**SPLIT, "behavior": "Removed"}
SPELT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def test_another_pattern_is_never_cut(bpe: BpeTokenizer, tmp_path: Path) -> None:
    sequence = {"type": "Sequence", "pretokenizers": [SPLIT, SPELT]}
    tokenizer = read(file_of(bpe, tmp_path, "pre_tokenizer", value=sequence))
    assert tokenizer.encode(TEXT).tolist() == whole(tokenizer, TEXT.decode()) != bpe.encode(TEXT).tolist()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.last_cut(TEXT) == 0


def test_special_tokens_stand_for_no_text(bpe: BpeTokenizer, tmp_path: Path) -> None:
    added = [{"id": 290, "content": "the cat", "special": True, "normalized": False}]
    tokenizer = read(file_of(bpe, tmp_path, "added_tokens", value=added))
    assert tokenizer_hash(tokenizer) == tokenizer_hash(bpe)


def test_what_changes_no_token_does_not_change_the_identity(bpe: BpeTokenizer, tmp_path: Path) -> None:
    older = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    assert tokenizer_hash(read(file_of(bpe, tmp_path, "pre_tokenizer", value=older))) == tokenizer_hash(bpe)
    pairs = [" ".join(pair) for pair in bpe.merges]
    assert tokenizer_hash(read(file_of(bpe, tmp_path, "model", "merges", value=pairs))) == tokenizer_hash(bpe)
    assert tokenizer_hash(read(file_of(bpe, tmp_path, "model", "merges", value=bpe.merges[:-1]))) != tokenizer_hash(bpe)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["normalizer"], {"type": "NFC"}, "its normalizer changes the text"),
        (["added_tokens"], [{"id": 290, "content": "cat", "special": False}], "added tokens that are not special"),
        (["model", "dropout"], 0.1, "drops merges at random"),
        (["model", "type"], "WordPiece", "its model is not BPE"),
        (["model", "end_of_word_suffix"], "</w>", "marks words"),
        (["model", "vocab", "zz"], 1000, "its ids are not 0, 1, 2"),
        (["model", "vocab", "z z"], 290, "'z z' does not stand for bytes"),
        (["model", "merges"], [["zz", "zzz"]], "it merges what are no tokens"),
        (["model", "merges"], [3], "malformed"),
        (["model", "vocab"], {"a": 0}, "no token for the byte 0x00 and 254 more"),
        (["pre_tokenizer"], {"type": "Whitespace"}, "ends with Whitespace, not with ByteLevel"),
        (["pre_tokenizer", "add_prefix_space"], True, "adds a space in front"),
        (["pre_tokenizer"], {"type": "Sequence", "pretokenizers": [LOSING, SPELT]}, "may lose text"),
        (["pre_tokenizer"], {"type": "Sequence", "pretokenizers": []}, "malformed|cannot be used"),
        (["pre_tokenizer"], {"type": "Sequence", "pretokenizers": [{"type": "Split"}, SPELT]}, "cannot be used"),
        (["pre_tokenizer"], None, "must have a vocab, merges and the pre_tokenizer"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_exact_is_refused(
    bpe: BpeTokenizer, tmp_path: Path, keys: list[str], value: object, message: str
) -> None:
    path = file_of(bpe, tmp_path, *keys, value=value)
    with pytest.raises(ValueError, match=rf"data\.tokenizer: .*tokenizer\.json: .*({message})"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*tokenizer\.json: "):
        read(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "fields",
    [{}, {"vocab": 3}, {"vocab": [[]]}, {"merges": [[1, 2]]}, {"merges": [[]]}, {"pre_tokenizer": {"type": []}}],
)
def test_forged_fields_are_refused(bpe: BpeTokenizer, fields: dict) -> None:
    with pytest.raises(ValueError, match=r"token|merges"):
        from_json({**bpe.to_json(), **fields} if fields else {"name": "bpe"})
