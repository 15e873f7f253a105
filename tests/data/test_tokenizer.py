"""Tokenizers are exact in both directions and name what they cannot encode."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.document
from data.corpus import Corpus
from data.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    EncodingError,
    Tokenizer,
    build_tokenizer,
    from_json,
    pieces,
    token_dtype,
    tokenizer_hash,
)


@given(st.binary(max_size=50))
def test_bytes_round_trip(text: bytes) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(text)
    assert tokenizer.decode(ids.astype(np.int64)) == text


@given(st.text(min_size=1, max_size=50).filter(lambda text: text.encode("utf-8", "ignore").decode() == text))
def test_characters_round_trip(text: str) -> None:
    tokenizer = CharacterTokenizer(text)
    ids = tokenizer.encode(text.encode())
    assert ids.tolist() == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_token_bytes() -> None:
    assert ByteTokenizer().token_bytes.tolist() == [1] * 256
    assert CharacterTokenizer("🎈a文é").token_bytes.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("hello 文")])
def test_a_tokenizer_is_restored_from_json(tokenizer: Tokenizer) -> None:
    restored = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert type(restored) is type(tokenizer)
    assert restored.vocab_size == tokenizer.vocab_size
    assert tokenizer_hash(restored) == tokenizer_hash(tokenizer)
    assert restored.encode(b"hello").tolist() == tokenizer.encode(b"hello").tolist()


def test_other_characters_make_another_tokenizer() -> None:
    assert tokenizer_hash(CharacterTokenizer("abc")) == tokenizer_hash(CharacterTokenizer("cabba"))
    assert tokenizer_hash(CharacterTokenizer("abc")) != tokenizer_hash(CharacterTokenizer("abd"))


def test_dtype_is_the_smallest_that_holds_the_vocabulary() -> None:
    assert [token_dtype(size).str for size in (1, 256, 257, 65536, 65537)] == [
        "|u1",
        "|u1",
        "<u2",
        "<u2",
        "<u4",
    ]
    many = CharacterTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 300))))
    assert many.encode("一".encode()).dtype == np.dtype("<u2")


def test_what_cannot_be_encoded_is_named_with_its_offset() -> None:
    tokenizer = CharacterTokenizer("文abc")
    with pytest.raises(EncodingError, match="'z' is not in the training text") as caught:
        tokenizer.encode("文az".encode())
    assert caught.value.offset == 4
    with pytest.raises(EncodingError, match="'🎈'") as caught:  # beyond the last known character
        tokenizer.encode("ab🎈".encode())
    assert caught.value.offset == 2
    with pytest.raises(EncodingError, match="not UTF-8") as caught:
        tokenizer.encode(b"abc\xffa")
    assert caught.value.offset == 3


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("abc")])
def test_an_id_that_is_no_token_cannot_be_decoded(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"the tokenizer has {tokenizer.vocab_size} tokens"):
        tokenizer.decode(np.array([0, tokenizer.vocab_size]))
    with pytest.raises(ValueError, match="from -1"):
        tokenizer.decode(np.array([-1]))
    assert tokenizer.decode(np.array([], dtype=np.int64)) == b""


def test_an_unknown_tokenizer_is_refused_with_the_known_ones(text_corpus: Callable[..., Corpus]) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer: 'words' is no file, nor one of bytes, characters, bpe"):
        build_tokenizer("words", text_corpus(b"x").split("all"))
    with pytest.raises(ValueError, match="no tokenizer is called 'words'; known: bytes, characters, bpe"):
        from_json({"name": "words"})


def test_characters_are_those_of_the_whole_training_text(
    text_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.document, "CHUNK", 2)
    tokenizer = build_tokenizer("characters", text_corpus("文b".encode(), "🎈a".encode()).split("all"))
    assert tokenizer.to_json()["characters"] == "ab文🎈"


def test_files_and_offsets_are_named(text_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.document, "CHUNK", 2)
    text = text_corpus(b"abcabc", b"abca\xffbc").split("all")
    with pytest.raises(ValueError, match=r"0001\.txt, byte 4: not UTF-8"):
        build_tokenizer("characters", text)


def test_pieces_end_where_the_tokenizer_allows_it(
    text_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "naïve 文字 🎈, words".encode() * 5
    text = text_corpus(content).split("all")
    monkeypatch.setattr(data.document, "CHUNK", 3)
    everywhere = list(pieces(text, len))
    assert b"".join(everywhere) == content
    assert len(everywhere) > 20
    in_front_of_spaces = list(pieces(text, lambda chunk: max(0, chunk.rfind(b" "))))
    assert b"".join(in_front_of_spaces) == content
    assert all(piece.startswith(b" ") for piece in in_front_of_spaces[1:])
    assert list(pieces(text, lambda chunk: 0)) == [content]


def test_tiny_shakespeare_has_65_characters(shipped_data) -> None:
    text = (shipped_data / "tinyshakespeare/input.txt").read_bytes()
    tokenizer = CharacterTokenizer(text.decode())
    assert tokenizer.vocab_size == 65
    assert tokenizer.decode(tokenizer.encode(text)) == text
