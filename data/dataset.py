"""A token dataset: one split of a corpus as a folder of memory-mapped token ids.

shard-00000.bin: the ids, little-endian uint8, uint16 or uint32. documents.npy: int64 [D + 1], where each
document starts, and the end. meta.json: what it is, the sizes and hashes of the others, and a checksum of its
own. All are checked when the folder is opened, and nothing in them is ever executed.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.document import Split
from data.tokenizer import Tokenizer, encode_text, from_json, token_dtype, tokenizer_hash

VERSION = 1
SHARD, DOCUMENTS, META = "shard-00000.bin", "documents.npy", "meta.json"
FULL_CHECK_BYTES = 1 << 28  # up to here all tokens are hashed at each opening (0.2 s); beyond, samples are looked at
SAMPLES, SAMPLE_TOKENS = 256, 1 << 12


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """One split of a corpus in tokens.

    tokens: uint8, uint16 or uint32 [N], memory-mapped.
    document_starts: int64 [D + 1], strictly increasing from 0 to N.
    fingerprint: sha256 of the content alone (tokens, documents, tokenizer); no path or time enters it.
    bytes, words: of the original text, the denominators of bits per byte and of word perplexity.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    fingerprint: str
    tokenizer: Tokenizer
    bytes: int
    words: int
    corpus: str
    split: str


def write_dataset(folder: Path, corpus: str, split: str, text: Split, tokenizer: Tokenizer) -> None:
    """Writes the tokens of a split into a new folder, and flushes all of it to disk."""
    folder.mkdir()
    meta = {
        "version": VERSION,
        "corpus": corpus,
        "split": split,
        "tokenizer": tokenizer.to_json(),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        **_write_text(folder, text, tokenizer),
    }
    with (folder / META).open("wb") as file:
        file.write(json.dumps({**meta, "checksum": sha256_json(meta)}, indent=1).encode())
        _sync(file)
    sync_folder(folder)


def open_dataset(folder: Path) -> TokenDataset:
    """The dataset in a folder. ValueError names the file that is missing or damaged, and how."""
    meta = _read_meta(folder / META)
    tokenizer = from_json(meta["tokenizer"])
    tokens = _map_tokens(folder / SHARD, tokenizer.vocab_size, *meta["shards"])
    starts = _read_documents(folder / DOCUMENTS, meta["documents"], len(tokens))
    return TokenDataset(
        tokens=tokens,
        document_starts=starts,
        fingerprint=_fingerprint(meta, starts),
        tokenizer=tokenizer,
        bytes=meta["text"]["bytes"],
        words=meta["text"]["words"],
        corpus=meta["corpus"],
        split=meta["split"],
    )


def _fingerprint(meta: dict[str, Any], document_starts: np.ndarray) -> str:
    shards = [[shard["name"], shard["bytes"], shard["sha256"]] for shard in meta["shards"]]
    documents = hashlib.sha256(document_starts.astype("<i8").tobytes()).hexdigest()
    return sha256_json([meta["dtype"], meta["tokenizer_sha256"], shards, documents])


def _write_text(folder: Path, text: Split, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes shard and documents; returns their part of meta.json."""
    dtype = token_dtype(tokenizer.vocab_size)
    digest, starts, words = hashlib.sha256(), [0], 0
    with (folder / SHARD).open("wb") as file:
        for document in text.documents:
            counter, num_tokens = text.counter(), 0
            for chunk, ids in encode_text(tokenizer, document):
                block = ids.astype(dtype, copy=False).tobytes()
                file.write(block)
                digest.update(block)
                counter.add(chunk)
                num_tokens += len(ids)
            starts.append(starts[-1] + num_tokens)
            words += counter.words
        _sync(file)
    with (folder / DOCUMENTS).open("wb") as file:
        np.save(file, np.array(starts, dtype="<i8"), allow_pickle=False)
        _sync(file)
    shard = {
        "name": SHARD,
        "tokens": starts[-1],
        "bytes": starts[-1] * dtype.itemsize,
        "sha256": digest.hexdigest(),
    }
    return {
        "shards": [shard],
        "documents": {
            "count": len(starts) - 1,
            "bytes": (folder / DOCUMENTS).stat().st_size,
            "sha256": _sha256(folder / DOCUMENTS),
        },
        "text": {"bytes": text.num_bytes, "words": words},
    }


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        checksum = meta.pop("checksum")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, it does not describe a token dataset") from error
    if checksum != sha256_json(meta):
        raise ValueError(f"{path}: damaged, its checksum is wrong")
    if meta["version"] != VERSION:
        raise ValueError(f"{path}: has version {meta['version']}; this program reads version {VERSION}")
    return meta


def _map_tokens(path: Path, vocab_size: int, expected: dict[str, Any]) -> np.ndarray:
    dtype = token_dtype(vocab_size)
    _check_file(path, expected)
    if expected["bytes"] != expected["tokens"] * dtype.itemsize:
        raise ValueError(f"{path}: damaged, {expected['bytes']} bytes are not {expected['tokens']} whole tokens")
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


def _read_documents(path: Path, expected: dict[str, Any], num_tokens: int) -> np.ndarray:
    _check_file(path, expected)
    starts = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a forged header claims no memory
    if starts[0] != 0 or starts[-1] != num_tokens or (np.diff(starts) <= 0).any():
        raise ValueError(f"{path}: damaged, document starts must increase from 0 to {num_tokens}")
    return np.array(starts)


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    """Compares size and, up to `FULL_CHECK_BYTES`, hash with what meta.json says."""
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{path}: damaged, it ends at byte {size} instead of {expected['bytes']}")
    if size <= FULL_CHECK_BYTES and _sha256(path) != expected["sha256"]:
        raise ValueError(f"{path}: damaged, its sha256 is not {expected['sha256']}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flushes the folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sha256_json(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
