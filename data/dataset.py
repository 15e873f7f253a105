"""A token dataset: one split of a corpus as a folder of memory-mapped token ids.

shard-00000.bin: the ids, little-endian uint8, uint16 or uint32. documents.npy: int64 [D + 1], where each
document starts, and the end. document_bytes.npy, document_words.npy: int64 [D], of each document's text.
titles.json: the documents' titles, a list of D strings. meta.json: what it is, the sizes and hashes of the
others, and a checksum of its own. All are checked when the folder is opened, and nothing in them is ever executed.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.disk import sha256_file, sha256_json, sync_file, sync_folder
from data.document import AnyDocument, Split
from data.parts import Part, Watch, document_sizes, make_parts
from data.tokenizer import Tokenizer, from_json, token_dtype, tokenizer_hash

VERSION = 2
SHARD, DOCUMENTS, META = "shard-00000.bin", "documents.npy", "meta.json"
DOCUMENT_BYTES, DOCUMENT_WORDS, TITLES = "document_bytes.npy", "document_words.npy", "titles.json"
FILES = (SHARD, DOCUMENTS, DOCUMENT_BYTES, DOCUMENT_WORDS, TITLES)
FULL_CHECK_BYTES = 1 << 28  # up to here all tokens are hashed at each opening (0.2 s); beyond, samples are looked at
SAMPLES, SAMPLE_TOKENS = 256, 1 << 12
LONGEST_TITLE = 200  # characters; the rest of a title is left out
META_BYTES = 1 << 26  # more is no description of a dataset, even with a tokenizer of 10^6 tokens
_META_FIELDS: dict[str, type] = {
    "corpus": str, "split": str, "tokenizer": dict, "tokenizer_sha256": str, "tokens": int, "documents": int,
    "files": dict,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """One split of a corpus in tokens.

    tokens: uint8, uint16 or uint32 [N], memory-mapped.
    document_starts: int64 [D + 1], strictly increasing from 0 to N.
    fingerprint: sha256 of the content alone (tokens, documents, tokenizer); no path, title or time enters it.
    document_bytes, document_words: int64 [D], of the original text of each document, memory-mapped.
    titles: what each document is called, D strings of at most `LONGEST_TITLE` characters.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    fingerprint: str
    tokenizer: Tokenizer
    corpus: str
    split: str
    document_bytes: np.ndarray
    document_words: np.ndarray
    titles: list[str]

    @cached_property
    def bytes(self) -> int:
        """Of the original text, the denominator of bits per byte."""
        return int(self.document_bytes.sum())

    @property
    def bytes_per_token(self) -> float:
        """Of the original text, on average."""
        return self.bytes / len(self.tokens)

    @cached_property
    def words(self) -> int:
        """Of the original text, the denominator of word perplexity."""
        return int(self.document_words.sum())


def write_dataset(
    folder: Path,
    corpus: str,
    split: str,
    text: Split,
    tokenizer: Tokenizer,
    *,
    parts: Path | None = None,
    workers: int = 0,
    watch: Watch = lambda done, total: None,
) -> None:
    """Writes the tokens of a split into a new folder, and flushes all of it to disk.

    parts: where tokenized parts are kept over interruptions (`data.parts`, as are workers and watch); None: nowhere.
    """
    folder.mkdir()
    made = make_parts(parts or folder / "parts", text, tokenizer, workers=workers, watch=watch)
    digest = _join(folder / SHARD, made)
    if parts is None:
        shutil.rmtree(folder / "parts")
    num_tokens, num_bytes, num_words = document_sizes(made).T
    _write_array(folder / DOCUMENTS, np.concatenate([[0], np.cumsum(num_tokens)]))
    _write_array(folder / DOCUMENT_BYTES, num_bytes)
    _write_array(folder / DOCUMENT_WORDS, num_words)
    _write_json(folder / TITLES, [_title(document) for document in text.documents])
    hashes = {SHARD: digest, **{name: sha256_file(folder / name) for name in FILES if name != SHARD}}
    meta = {
        "version": VERSION,
        "corpus": corpus,
        "split": split,
        "tokenizer": tokenizer.to_json(),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "tokens": int(num_tokens.sum()),
        "documents": len(num_tokens),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in FILES},
    }
    _write_json(folder / META, {**meta, "checksum": sha256_json(meta)})
    sync_folder(folder)


def open_dataset(folder: Path) -> TokenDataset:
    """The dataset in a folder. ValueError names the file that is missing or damaged, and how."""
    meta = _read_meta(folder / META)
    tokenizer = _read_tokenizer(folder / META, meta)
    number, num_tokens = meta["documents"], meta["tokens"]
    for name in FILES:
        _check_file(folder / name, meta["files"][name])
    tokens = _map_tokens(folder / SHARD, tokenizer.vocab_size, num_tokens)
    starts = np.array(_map_array(folder / DOCUMENTS, number + 1))
    if starts[0] != 0 or starts[-1] != num_tokens or (np.diff(starts) <= 0).any():
        raise ValueError(f"{folder / DOCUMENTS}: damaged, document starts must increase from 0 to {num_tokens}")
    document_bytes = _map_array(folder / DOCUMENT_BYTES, number)
    document_words = _map_array(folder / DOCUMENT_WORDS, number)
    _check_sizes(folder / DOCUMENT_BYTES, document_bytes, 1, np.iinfo(np.int64).max // number)
    _check_sizes(folder / DOCUMENT_WORDS, document_words, 0, document_bytes)
    return TokenDataset(
        tokens=tokens,
        document_starts=starts,
        fingerprint=_fingerprint(meta, tokenizer, starts),
        tokenizer=tokenizer,
        corpus=meta["corpus"],
        split=meta["split"],
        document_bytes=document_bytes,
        document_words=document_words,
        titles=_read_titles(folder / TITLES, number),
    )


def _fingerprint(meta: dict[str, Any], tokenizer: Tokenizer, document_starts: np.ndarray) -> str:
    shard = meta["files"][SHARD]
    documents = hashlib.sha256(document_starts.astype("<i8").tobytes()).hexdigest()
    dtype = token_dtype(tokenizer.vocab_size).str
    return sha256_json([dtype, meta["tokenizer_sha256"], [[SHARD, shard["bytes"], shard["sha256"]]], documents])


def _join(path: Path, parts: list[Part]) -> str:
    """Writes the tokens of the parts one after another into a file; returns its sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            block = part.path.read_bytes()
            file.write(block)
            digest.update(block)
        sync_file(file)
    return digest.hexdigest()


def _write_array(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, values.astype("<i8"), allow_pickle=False)
        sync_file(file)


def _write_json(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        file.write(json.dumps(value, indent=1).encode())
        sync_file(file)


def _title(document: AnyDocument) -> str:
    """The document's title, bounded, and printable whatever bytes a file name has."""
    return document.title[:LONGEST_TITLE].encode("utf-8", "replace").decode()


def _read_meta(path: Path) -> dict[str, Any]:
    meta = _read_json(path, META_BYTES)
    checksum = meta.pop("checksum", None) if isinstance(meta, dict) else None
    if checksum is None:
        raise ValueError(f"{path}: damaged, it does not describe a token dataset")
    if checksum != sha256_json(meta):
        raise ValueError(f"{path}: damaged, its checksum is wrong")
    if meta.get("version") != VERSION:
        raise ValueError(f"{path}: has version {meta.get('version')}; this program reads version {VERSION}")
    for name, kind in _META_FIELDS.items():
        if type(meta.get(name)) is not kind:
            raise ValueError(f"{path}: damaged, {name} must be of type {kind.__name__}")
    for name in FILES:
        entry = meta["files"].get(name)
        if not isinstance(entry, dict) or [type(entry.get(key)) for key in ("bytes", "sha256")] != [int, str]:
            raise ValueError(f"{path}: damaged, it does not say bytes and sha256 of {name}")
    if not 1 <= meta["documents"] <= meta["tokens"]:
        raise ValueError(f"{path}: damaged, {meta['documents']} documents of {meta['tokens']} tokens")
    return meta


def _read_tokenizer(path: Path, meta: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = from_json(meta["tokenizer"])
    except ValueError as error:
        raise ValueError(f"{path}: damaged, its tokenizer cannot be used: {error}") from error
    if tokenizer_hash(tokenizer) != meta["tokenizer_sha256"]:
        raise ValueError(f"{path}: damaged, its tokenizer is not the one of tokenizer_sha256")
    return tokenizer


def _read_titles(path: Path, number: int) -> list[str]:
    titles = _read_json(path, number * (12 * LONGEST_TITLE + 8) + 8)  # \ud83c\udf88 is the longest character
    if not isinstance(titles, list) or len(titles) != number:
        raise ValueError(f"{path}: damaged, not a list of {number} titles")
    for index, title in enumerate(titles):
        if not isinstance(title, str) or len(title) > LONGEST_TITLE:
            raise ValueError(f"{path}: damaged, title {index} is no text of at most {LONGEST_TITLE} characters")
    return titles


def _read_json(path: Path, most_bytes: int) -> Any:
    """The value in a file that is not larger than it can rightly be."""
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"{path}: damaged, {size} bytes are more than the {most_bytes} it can have")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON") from error


def _map_tokens(path: Path, vocab_size: int, num_tokens: int) -> np.ndarray:
    dtype = token_dtype(vocab_size)
    size = path.stat().st_size
    if size != num_tokens * dtype.itemsize:
        raise ValueError(f"{path}: damaged, {size} bytes are not {num_tokens} tokens of {dtype.itemsize} bytes")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    length, starts = len(tokens), np.zeros(1, dtype=np.int64)
    if tokens.nbytes > FULL_CHECK_BYTES:
        length, starts = SAMPLE_TOKENS, np.linspace(0, len(tokens) - SAMPLE_TOKENS, SAMPLES).astype(np.int64)
    for start in starts:
        piece = tokens[start : start + length]
        if piece.max() >= vocab_size:
            first = start + int((piece >= vocab_size).argmax())
            raise ValueError(
                f"{path}: damaged, the token at byte {first * tokens.itemsize} is {tokens[first]}, "
                f"but the vocabulary has {vocab_size} tokens"
            )
    return tokens


def _map_array(path: Path, length: int) -> np.ndarray:
    """int64 [length], memory-mapped: a forged header claims no memory."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a forged header numpy raises whatever Python's own parser does
        raise ValueError(f"{path}: damaged, not an array of numbers") from error
    if values.dtype != np.dtype("<i8") or values.shape != (length,):
        raise ValueError(f"{path}: damaged, {values.dtype} {list(values.shape)} is not int64 [{length}]")
    return values


def _check_sizes(path: Path, values: np.ndarray, least: int, most: int | np.ndarray) -> None:
    wrong = (values < least) | (values > most)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"{path}: damaged, document {first} cannot have the size {values[first]}")


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    """Compares size and, up to `FULL_CHECK_BYTES`, hash with what meta.json says."""
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{path}: damaged, it ends at byte {size} instead of {expected['bytes']}")
    if size <= FULL_CHECK_BYTES and sha256_file(path) != expected["sha256"]:
        raise ValueError(f"{path}: damaged, its sha256 is not {expected['sha256']}")
