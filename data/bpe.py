"""Byte-pair encoding on bytes: trained from a text with the package `tokenizers`, or read from a tokenizer.json.

Every text of valid UTF-8 has tokens, and these join to it byte for byte. There are no special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.document import Split
from data.tokenizer import EncodingError, checked_ids, decode_utf8, pieces, token_dtype

SAMPLE_BYTES = 100_000_000  # of the training text that a vocabulary is made from
AT_ONCE = 1 << 16  # bytes of a text that the library encodes in one go
LARGEST_FILE = 1 << 28  # bytes of a tokenizer.json
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
"""GPT-2's: words with the space before them, numbers, punctuation, white space."""

# GPT-2's pattern never joins a character that is no white space to white space behind it, and looks at nothing before
# a match. So a text may be cut there. White space is Unicode's.
_WORD_END = re.compile(
    rb"[!-~\x80-\xff](?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)"
    rb"(?<!\xe3\x80\x80)(?=[ \n])"
)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a vocabulary: itself if it is printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_PROBE = "".join(map(chr, [*range(0x2100), *range(0x3000, 0x3100), 0x1F388])).encode()
BYTE_OF = {letter: byte for byte, letter in enumerate(_byte_letters())}


class BpeTokenizer:
    """Pairs of tokens become one, in the order of `merges`, within the words that the pre-tokenizer makes.

    vocab: the tokens in order of their ids, spelt in the letters of `BYTE_OF`. pre_tokenizer: as in a tokenizer.json.
    ignore_merges: a whole word that is a token stays one. ValueError if texts would not come back byte for byte.
    """

    name: ClassVar[str] = "bpe"

    def __init__(
        self,
        vocab: Sequence[str],
        merges: Sequence[Sequence[str]],
        pre_tokenizer: dict[str, Any] = PRE_TOKENIZER,
        ignore_merges: bool = False,
    ) -> None:
        wrong = [*_vocabulary_problems(vocab, merges), *_pre_tokenizer_problems(pre_tokenizer)]
        if wrong:
            raise ValueError("; ".join(wrong))
        self.vocab = list(vocab)
        self.merges = [list(pair) for pair in merges]
        self.pre_tokenizer = pre_tokenizer
        self.ignore_merges = ignore_merges
        self.tokens = [bytes(BYTE_OF[letter] for letter in token) for token in vocab]
        self.token_bytes = np.array([len(token) for token in self.tokens], dtype=np.int64)
        self._cuts = pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True)
        if pre_tokenizer != PRE_TOKENIZER and self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError("its pre_tokenizer loses text")

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def encode(self, text: bytes) -> np.ndarray:
        decode_utf8(text)
        parts = [part.decode() for part in self._parts(text)]
        encoded = self.library.encode_batch_fast(parts, add_special_tokens=False)
        dtype = token_dtype(self.vocab_size)
        ids = np.concatenate([np.zeros(0, dtype), *(np.array(each.ids, dtype=dtype) for each in encoded)])
        if self.token_bytes[ids].sum() != len(text):
            raise EncodingError(0, f"the tokens of the text have {self.token_bytes[ids].sum()} bytes, not {len(text)}")
        return ids

    def decode(self, ids: np.ndarray) -> bytes:
        return b"".join(self.tokens[index] for index in checked_ids(ids, self.vocab_size).tolist())

    def last_cut(self, text: bytes) -> int:
        return last_word_end(text) if self._cuts else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "vocab": self.vocab,
            "merges": self.merges,
            "pre_tokenizer": self.pre_tokenizer,
            "ignore_merges": self.ignore_merges,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> BpeTokenizer:
        kinds = {"vocab": list, "merges": list, "pre_tokenizer": dict, "ignore_merges": bool}
        for name, kind in kinds.items():
            if not isinstance(fields.get(name), kind):
                raise ValueError(f"the tokenizer bpe must have {name}, of type {kind.__name__}")
        try:
            return cls(**{name: fields[name] for name in kinds})
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError("the tokenizer bpe is malformed") from error

    def to_file_json(self) -> dict[str, Any]:
        """The content of a tokenizer.json, which other programs read too."""
        return {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": self.pre_tokenizer, "post_processor": None, "decoder": PRE_TOKENIZER,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                "ignore_merges": self.ignore_merges,
                "vocab": {token: index for index, token in enumerate(self.vocab)}, "merges": self.merges,
            },
        }  # fmt: skip

    def _parts(self, text: bytes) -> Iterator[bytes]:
        """The text in parts of about `AT_ONCE` bytes, which have the same tokens."""
        start = 0
        while self._cuts and start + AT_ONCE < len(text):
            end = _WORD_END.search(text, start + AT_ONCE)
            if end is None:
                break
            yield text[start : end.end()]
            start = end.end()
        if start < len(text):
            yield text[start:]

    @cached_property
    def library(self) -> Any:
        """The `tokenizers.Tokenizer` that encodes."""
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(json.dumps(self.to_file_json()))
        except Exception as error:  # the library has no type of its own
            raise ValueError(str(error)) from error


def train(text: Split, vocab_size: int) -> BpeTokenizer:
    """A vocabulary of `vocab_size` tokens (fewer if the text has no more) of a sample of the text, spread over it.

    The sample is a function of the text alone, and so is the result. ValueError names file and byte of what is not
    UTF-8.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(_sample(text), trainer)
    return _of_file(json.loads(learner.to_str()))


def read(path: Path) -> BpeTokenizer:
    """The tokenizer of a tokenizer.json; ValueError names the file and all that keeps it from being exact."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE:,} bytes")
        return _of_file(json.loads(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"data.tokenizer: {path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"data.tokenizer: {path}: not JSON") from error
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"data.tokenizer: {path}: malformed, no tokenizer.json") from error
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {path}: cannot be used: {error}") from error


def _sample(text: Split) -> Iterator[str]:
    """Pieces of the text, about `SAMPLE_BYTES` in all, at even distances."""
    seen = kept = 0
    for document in text.documents:
        offset = 0
        for piece in pieces(document, last_word_end):
            if kept * text.num_bytes <= SAMPLE_BYTES * seen:
                kept += len(piece)
                try:
                    yield decode_utf8(piece)
                except EncodingError as error:
                    raise ValueError(f"{document.locate(offset + error.offset)}: {error.reason}") from None
            offset += len(piece)
            seen += len(piece)


def last_word_end(text: bytes) -> int:
    """The last place where words of GPT-2's pattern end, whatever follows; 0 if there is none."""
    for start in (max(0, len(text) - 4096), 0):
        ends = [match.end() for match in _WORD_END.finditer(text, start)]
        if ends:
            return ends[-1]
    return 0


def _of_file(fields: Any) -> BpeTokenizer:
    """The tokenizer of what a tokenizer.json holds. Its special tokens stand for no text and are left out."""
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("its model is not BPE")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(fields.get("pre_tokenizer"), dict):
        raise ValueError("it must have a vocab, merges and the pre_tokenizer ByteLevel")
    wrong = _file_problems(fields, model)
    if wrong:
        raise ValueError("; ".join(wrong))
    pre_tokenizer = fields["pre_tokenizer"]
    if {
        **PRE_TOKENIZER,
        **pre_tokenizer,
        "trim_offsets": True,
    } == PRE_TOKENIZER and "add_prefix_space" in pre_tokenizer:
        pre_tokenizer = PRE_TOKENIZER  # offsets are not asked for
    return BpeTokenizer(
        sorted(vocab, key=vocab.__getitem__),
        [pair.split(" ") if isinstance(pair, str) else pair for pair in merges],
        pre_tokenizer,
        bool(model.get("ignore_merges", False)),
    )


def _file_problems(fields: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What in a tokenizer.json would keep a text from coming back, or from having always the same tokens."""
    added = fields.get("added_tokens") or []
    vocab = model["vocab"]
    found = {
        "its normalizer changes the text": fields.get("normalizer")
        not in (None, {"type": "Sequence", "normalizers": []}),
        "it drops merges at random (dropout)": bool(model.get("dropout")),
        "its model marks words (continuing_subword_prefix, end_of_word_suffix)": bool(
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        "it has added tokens that are not special": any(not token.get("special") for token in added),
        "its ids are not 0, 1, 2, ...": sorted(vocab.values()) != list(range(len(vocab))),
    }
    return [problem for problem, is_so in found.items() if is_so]


def _vocabulary_problems(vocab: Sequence[str], merges: Sequence[Sequence[str]]) -> Iterator[str]:
    known = set(vocab)
    missing = [byte for letter, byte in BYTE_OF.items() if letter not in known]
    if len(known) < len(vocab):
        yield "it has a token twice"
    if missing:
        yield f"it has no token for the byte {missing[0]:#04x}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
    strange = [token for token in vocab if not token or not BYTE_OF.keys() >= set(token)]
    if strange:
        yield f"its token {strange[0]!r} does not stand for bytes"
    if not all(len(pair) == 2 and {*pair, "".join(pair)} <= known for pair in merges):
        yield "it merges what are no tokens"


def _pre_tokenizer_problems(pre_tokenizer: dict[str, Any]) -> Iterator[str]:
    """Words must be cut from the text without loss, and be spelt in bytes at the end."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    *before, last = steps
    if last.get("type") != "ByteLevel":
        yield f"its pre_tokenizer ends with {last.get('type')}, not with ByteLevel"
    elif last.get("add_prefix_space", True):
        yield "its pre_tokenizer adds a space in front (add_prefix_space)"
    for step in before:
        keeps_all = step.get("type") == "Digits" or (step.get("type") == "Split" and step.get("behavior") != "Removed")
        if not keeps_all:
            yield f"its pre_tokenizer {step.get('type')} may lose text"
