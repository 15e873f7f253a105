"""Tokenizers: text as bytes in, token ids out. Bytes; characters of the training text; byte pairs; numbers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from data.disk import sha256_json
from data.document import Split


class Text(Protocol):
    """What a tokenizer reads: a document, or a whole split."""

    def chunks(self) -> Iterator[bytes]: ...
    def locate(self, offset: int) -> str: ...


class EncodingError(ValueError):
    """Text that a tokenizer cannot encode, `offset` bytes after its start."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class Tokenizer(Protocol):
    """Text to token ids and back, exactly: `decode(encode(text)) == text`."""

    name: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...

    @property
    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes of each token. Those of a text's ids sum to its length."""
        ...

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids [n] of type `token_dtype(vocab_size)`; EncodingError where the text has no tokens."""
        ...

    def decode(self, ids: np.ndarray) -> bytes:
        """The text of ids [n]; ValueError for an id that is no token."""
        ...

    def last_cut(self, text: bytes) -> int:
        """Where a text of whole characters may end at last: its ids up to there do not depend on what follows, nor
        those after it on what precedes. 0: nowhere."""
        ...

    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs; its hash is the tokenizer's identity."""
        ...

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Tokenizer": ...


class ByteTokenizer:
    """256 tokens, the bytes themselves: every text has an encoding."""

    name: ClassVar[str] = "bytes"
    vocab_size = 256

    @property
    def token_bytes(self) -> np.ndarray:
        return np.ones(self.vocab_size, dtype=np.int64)

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: np.ndarray) -> bytes:
        return checked_ids(ids, self.vocab_size).astype(np.uint8).tobytes()

    def last_cut(self, text: bytes) -> int:
        return len(text)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ByteTokenizer":
        return cls()


class CharacterTokenizer:
    """The distinct characters (Unicode code points) of a text, in the order of their code points."""

    name: ClassVar[str] = "characters"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self._codes = _code_points(self.characters)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([len(character.encode()) for character in self.characters], dtype=np.int64)

    def encode(self, text: bytes) -> np.ndarray:
        characters = decode_utf8(text)
        codes = _code_points(characters)
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        unknown = self._codes[ids] != codes
        if unknown.any():
            first = int(unknown.argmax())
            offset = len(characters[:first].encode())
            raise EncodingError(offset, f"character {characters[first]!r} is not in the training text")
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> bytes:
        codes = self._codes[checked_ids(ids, self.vocab_size)]
        return codes.tobytes().decode("utf-32-le").encode()

    def last_cut(self, text: bytes) -> int:
        return len(text)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "characters": self.characters}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "CharacterTokenizer":
        characters = fields.get("characters")
        if not isinstance(characters, str) or not characters:
            raise ValueError("the tokenizer `characters` must have its characters, a text")
        return cls(characters)

    @classmethod
    def train(cls, text: Text) -> "CharacterTokenizer":
        """The characters of a training text; ValueError names file and byte of what is none."""
        seen: set[str] = set()
        offset = 0
        for chunk in text.chunks():
            try:
                seen |= set(decode_utf8(chunk))
            except EncodingError as error:
                raise ValueError(f"{text.locate(offset + error.offset)}: {error.reason}") from None
            offset += len(chunk)
        return cls("".join(seen))


NAMES = ("bytes", "characters", "bpe")


def build_tokenizer(name: str, training_text: Split | None, vocab_size: int = 32_000) -> Tokenizer:
    """The tokenizer of that name, made from the training text if it depends on one; or that of a file.

    vocab_size: tokens of `bpe`.
    """
    from data import bpe  # it needs this module

    if name == "bytes":
        return ByteTokenizer()
    if name in NAMES:
        assert training_text is not None
        return CharacterTokenizer.train(training_text) if name == "characters" else bpe.train(training_text, vocab_size)
    if not Path(name).expanduser().is_file():
        raise ValueError(f"data.tokenizer: {name!r} is no file, nor one of {', '.join(NAMES)}")
    return bpe.read(Path(name).expanduser())


def from_json(fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described; ValueError if the fields describe none."""
    from data.bpe import BpeTokenizer  # they need this module
    from data.numbers import NumberTokenizer

    known: tuple[type[Tokenizer], ...] = (ByteTokenizer, CharacterTokenizer, BpeTokenizer, NumberTokenizer)
    name = fields.get("name") if isinstance(fields, dict) else None
    for tokenizer in known:
        if name == tokenizer.name:
            return tokenizer.from_json(fields)
    raise ValueError(f"no tokenizer is called {str(name)[:80]!r}; known: {', '.join(NAMES)}")


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's canonical JSON."""
    return sha256_json(tokenizer.to_json())


def pieces(text: Text, last_cut: Callable[[bytes], int]) -> Iterator[bytes]:
    """The text in pieces that begin and end where `last_cut` allows it, of about a chunk's size where it does."""
    held: list[bytes] = []
    for chunk in text.chunks():
        if held and (cut := last_cut(held[-1])):
            *before, last = held
            yield b"".join([*before, last[:cut]])
            held = [last[cut:]] if cut < len(last) else []
        held.append(chunk)
    if held:
        yield b"".join(held)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned little-endian type that holds the ids below `vocab_size`."""
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def decode_utf8(text: bytes) -> str:
    """The text's characters; EncodingError at the first byte that is none."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise EncodingError(error.start, "not UTF-8; the tokenizer `bytes` takes any text") from None


def _code_points(characters: str) -> np.ndarray:
    return np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")


def checked_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as an array; ValueError if one is no token."""
    ids = np.asarray(ids)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(
            f"ids from {ids.min()} to {ids.max()} cannot be decoded: the tokenizer has {vocab_size} tokens"
        )
    return ids
