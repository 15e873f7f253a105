"""A token dataset: one split of a corpus as a folder of memory-mapped token ids.

    shard-00000.bin  token ids, little-endian uint8, uint16 or uint32
    documents.npy    int64 [D + 1]: where each document starts, and the end
    meta.json        what it is (`_describe`), with a checksum of its own

Every file is checked when the folder is opened.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.document import Split, WordCounter
from data.tokenizer import Tokenizer, encode_text, from_json, token_dtype, tokenizer_hash

VERSION = 1
SHARD, DOCUMENTS, META = "shard-00000.bin", "documents.npy", "meta.json"
FULL_CHECK_BYTES = 1 << 28  # up to here opening hashes all tokens (0.2 s); beyond, it samples them
SAMPLES, SAMPLE_TOKENS = 256, 1 << 12


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """One split of a corpus in tokens.

    tokens: uint [N], memory-mapped. document_starts: int64 [D + 1], strictly increasing from 0 to N.
    fingerprint: sha256 of the content alone (tokens, documents, tokenizer); paths and times do not enter.
    bytes, words: of the original text, the denominators of bits per byte and word perplexity.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    fingerprint: str
    tokenizer: Tokenizer
    bytes: int
    words: int
    corpus: str
    split: str


def open_dataset(folder: Path) -> TokenDataset:
    """The dataset in a folder. ValueError names the file that is missing or damaged and what is wrong with it."""
    meta = _read_meta(folder / META)
    dtype, shard = np.dtype(meta["dtype"]), meta["shards"][0]
    path = folder / SHARD
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"] or size != shard["tokens"] * dtype.itemsize:
        raise ValueError(
            f"{path}: {'missing' if size is None else f'{size} bytes'}, must have {shard['bytes']}"
        )
    tokens = np.memmap(path, dtype=dtype, mode="r")
    _check_tokens(tokens, path, shard["sha256"], meta["vocab_size"])
    starts = _read_documents(folder / DOCUMENTS, meta["documents"], len(tokens))
    return TokenDataset(
        tokens=tokens,
        document_starts=starts,
        fingerprint=meta["fingerprint"],
        tokenizer=from_json(meta["tokenizer"]),
        bytes=meta["text"]["bytes"],
        words=meta["text"]["words"],
        corpus=meta["corpus"],
        split=meta["split"],
    )


def write_dataset(folder: Path, corpus: str, split: str, text: Split, tokenizer: Tokenizer) -> None:
    """Writes the tokens of a split into a new folder, and flushes all of it to disk."""
    folder.mkdir()
    shard, starts, words = _write_tokens(folder / SHARD, text, tokenizer)
    with (folder / DOCUMENTS).open("wb") as file:
        np.save(file, starts, allow_pickle=False)
        _sync(file)
    with (folder / META).open("wb") as file:
        meta = _describe(corpus, split, text, tokenizer, shard, starts, words)
        file.write(json.dumps(meta, indent=1).encode())
        _sync(file)
    sync_folder(folder)


def _write_tokens(path: Path, text: Split, tokenizer: Tokenizer) -> tuple[dict[str, Any], np.ndarray, int]:
    dtype = token_dtype(tokenizer.vocab_size)
    digest, starts, words = hashlib.sha256(), [0], 0
    with path.open("wb") as file:
        for document in text.documents:
            counter, tokens = WordCounter(), 0
            for chunk, ids in encode_text(tokenizer, document):
                block = ids.astype(dtype, copy=False).data
                file.write(block)
                digest.update(block)
                counter.add(chunk)
                tokens += len(ids)
            starts.append(starts[-1] + tokens)
            words += counter.words
        _sync(file)
    shard = {
        "name": path.name,
        "tokens": starts[-1],
        "bytes": starts[-1] * dtype.itemsize,
        "sha256": digest.hexdigest(),
    }
    return shard, np.array(starts, dtype="<i8"), words


def _describe(
    corpus: str,
    split: str,
    text: Split,
    tokenizer: Tokenizer,
    shard: dict[str, Any],
    starts: np.ndarray,
    words: int,
) -> dict[str, Any]:
    """The content of meta.json."""
    dtype = token_dtype(tokenizer.vocab_size).str
    documents = {"count": len(starts) - 1, "sha256": hashlib.sha256(starts.data).hexdigest()}
    content = [
        dtype,
        tokenizer_hash(tokenizer),
        [[shard["name"], shard["bytes"], shard["sha256"]]],
        documents["sha256"],
    ]
    meta = {
        "version": VERSION,
        "corpus": corpus,
        "split": split,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.to_json(),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "shards": [shard],
        "documents": documents,
        "text": {"bytes": text.num_bytes, "words": words},
        "fingerprint": sha256_json(content),
    }
    return {**meta, "checksum": sha256_json(meta)}


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        checksum = meta.pop("checksum")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, not the description of a token dataset") from error
    if checksum != sha256_json(meta):
        raise ValueError(f"{path}: damaged, its checksum is wrong")
    if meta["version"] != VERSION:
        raise ValueError(f"{path}: version {meta['version']}, this program reads {VERSION}")
    return meta


def _check_tokens(tokens: np.ndarray, path: Path, sha256: str, vocab_size: int) -> None:
    if tokens.nbytes <= FULL_CHECK_BYTES:
        pieces = [0]
        length = len(tokens)
        if hashlib.sha256(tokens.data).hexdigest() != sha256:
            raise ValueError(f"{path}: damaged, its sha256 is not {sha256}")
    else:
        length = SAMPLE_TOKENS
        pieces = np.linspace(0, len(tokens) - length, SAMPLES).astype(np.int64).tolist()
    for start in pieces:
        piece = tokens[start : start + length]
        if piece.max() >= vocab_size:
            where = start + int((piece >= vocab_size).argmax())
            raise ValueError(
                f"{path}: token {where} is {tokens[where]}, but the vocabulary has {vocab_size} tokens"
            )


def _read_documents(path: Path, expected: dict[str, Any], num_tokens: int) -> np.ndarray:
    try:
        starts = np.load(
            path, mmap_mode="r", allow_pickle=False
        )  # mapped: a forged header cannot claim memory
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from error
    if (
        starts.shape != (expected["count"] + 1,)
        or hashlib.sha256(starts.data).hexdigest() != expected["sha256"]
    ):
        raise ValueError(f"{path}: damaged, its sha256 is not {expected['sha256']}")
    if starts[0] != 0 or starts[-1] != num_tokens or (np.diff(starts) <= 0).any():
        raise ValueError(f"{path}: document starts must increase from 0 to {num_tokens}")
    return np.array(starts)


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
