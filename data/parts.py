"""A text tokenized in parts, by several processes if asked; what is finished is found again after an interruption.

The parts are a function of the text and the tokenizer alone. part-00000.bin has the token ids of a part,
part-00000.json their sha256 and a row for each document. Nothing is flushed to disk: what a crash of the machine
damages fails its hash, and is made anew.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.disk import sha256_file, sha256_json
from data.document import Split, WordCounter
from data.tokenizer import EncodingError, Tokenizer, from_json, pieces, token_dtype

PART_BYTES = 1 << 23  # of text, about

Watch = Callable[[int, int], None]
"""Called with how many bytes of how many are tokenized."""


class Piece(NamedTuple):
    """Bytes from `start` on of a document."""

    document: int
    start: int
    text: bytes


class Row(NamedTuple):
    """What a part has of one document. opens, closes: whether it begins, ends inside a word."""

    document: int
    tokens: int
    bytes: int
    words: int
    opens: bool
    closes: bool


@dataclass(frozen=True)
class Part:
    """The file of a part's token ids, and a row for each of its documents."""

    path: Path
    rows: list[Row]


class UnencodableError(Exception):
    """A byte of a document that the tokenizer cannot encode: (document, offset, reason)."""


def make_parts(
    folder: Path, text: Split, tokenizer: Tokenizer, *, workers: int = 0, watch: Watch = lambda done, total: None
) -> list[Part]:
    """The parts of the text, in order; those that `folder` already has are checked and kept.

    workers: processes that share the work, 0: this one does it. ValueError names file and byte of what the tokenizer
    cannot encode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workers = workers if text.num_bytes > PART_BYTES else 0  # one part is not shared
    parts: dict[int, Part] = {}
    running: dict[Future[Part], int] = {}
    done, total = 0, text.num_bytes

    def collect(most: int) -> None:
        """Waits until at most so many are running."""
        nonlocal done
        while len(running) > most:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                parts[running.pop(future)] = part = future.result()
                done += sum(row.bytes for row in part.rows)
            watch(done, total)

    try:
        with _executor(workers, tokenizer) as submit:
            for index, content in enumerate(_contents(text, tokenizer)):
                found = _finished(folder, index, content)
                if found is None:
                    running[submit(folder, index, content, text.lines_are_words)] = index
                    collect(2 * workers)
                else:
                    parts[index] = found
                    done += sum(row.bytes for row in found.rows)
            collect(0)
    except UnencodableError as error:
        document, offset, reason = error.args
        raise ValueError(f"{text.documents[document].locate(offset)}: {reason}") from None
    return [parts[index] for index in sorted(parts)]


def document_sizes(parts: list[Part]) -> np.ndarray:
    """int64 [D, 3]: tokens, bytes and words of each document, whose text may lie in several parts."""
    rows = np.array([row for part in parts for row in part.rows], dtype=np.int64)
    document, opens, closes = rows[:, 0], rows[:, 4], rows[:, 5]
    goes_on = np.concatenate([[False], document[1:] == document[:-1]])
    sizes = rows[:, 1:4].copy()
    sizes[1:, 2] -= goes_on[1:] & (opens[1:] == 1) & (closes[:-1] == 1)  # one word, counted in both
    return np.add.reduceat(sizes, np.flatnonzero(~goes_on), axis=0)


def _contents(text: Split, tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """The text cut into parts: pieces of documents, `PART_BYTES` in all, or what is left."""
    content: list[Piece] = []
    size = 0
    for index, document in enumerate(text.documents):
        start = 0
        for piece in pieces(document, tokenizer.last_cut):
            content.append(Piece(index, start, piece))
            start += len(piece)
            size += len(piece)
            if size >= PART_BYTES:
                yield content
                content, size = [], 0
    if content:
        yield content


def _make(tokenizer: Tokenizer, folder: Path, index: int, content: list[Piece], lines_are_words: bool) -> Part:
    """Tokenizes a part and writes it; its record comes last, and both appear complete or not at all."""
    path = folder / f"part-{index:05}.bin"
    temporary = folder / f"{path.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            record = _write(file, tokenizer, content, lines_are_words)
        temporary.rename(path)
        temporary.write_text(json.dumps([*record, sha256_json(record)]))
        temporary.rename(path.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)
    return Part(path, record[1])


def _write(file: IO[bytes], tokenizer: Tokenizer, content: list[Piece], lines_are_words: bool) -> tuple[str, list[Row]]:
    """Writes the token ids; returns their sha256 and a row for each document."""
    dtype = token_dtype(tokenizer.vocab_size)
    digest, rows = hashlib.sha256(), []
    for document, group in itertools.groupby(content, lambda piece: piece.document):
        texts, counter, num_tokens = [], WordCounter(lines_are_words), 0
        for piece in group:
            try:
                ids = tokenizer.encode(piece.text)
            except EncodingError as error:
                raise UnencodableError(document, piece.start + error.offset, error.reason) from None
            block = ids.astype(dtype, copy=False).tobytes()
            file.write(block)
            digest.update(block)
            counter.add(piece.text)
            num_tokens += len(ids)
            texts.append(piece.text)
        rows.append(_row(document, texts, num_tokens, counter.words))
    return digest.hexdigest(), rows


def _row(document: int, texts: list[bytes], tokens: int, words: int) -> Row:
    first = texts[0][:4].decode("utf-8", "replace")[0]  # no character has more bytes
    last = texts[-1][-4:].decode("utf-8", "replace")[-1]
    return Row(document, tokens, sum(map(len, texts)), words, not first.isspace(), not last.isspace())


def _finished(folder: Path, index: int, content: list[Piece]) -> Part | None:
    """The part as it was written, if it is there, intact and of this content."""
    path = folder / f"part-{index:05}.bin"
    try:
        digest, values, checksum = json.loads(path.with_suffix(".json").read_bytes())
        rows = [Row(*row) for row in values]
        right = checksum == sha256_json([digest, values]) and digest == sha256_file(path)
    except (OSError, ValueError, TypeError):
        return None
    expected = [
        (document, sum(len(piece.text) for piece in group))
        for document, group in itertools.groupby(content, lambda piece: piece.document)
    ]
    same = [(row.document, row.bytes) for row in rows] == expected
    return Part(path, rows) if right and same else None


@contextmanager
def _executor(workers: int, tokenizer: Tokenizer) -> Iterator[Callable[..., Future[Part]]]:
    """A function that submits what `_make` takes after the tokenizer, here or to other processes. These end with it."""
    if not workers:
        yield lambda *task: _done(_make(tokenizer, *task))
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # a fork would copy the threads' locks as they are
        initializer=_begin_work,
        initargs=(tokenizer.to_json(),),
    )
    try:
        yield lambda *task: pool.submit(_work, *task)
    finally:
        pool.shutdown(cancel_futures=True)


def _done(part: Part) -> Future[Part]:
    future: Future[Part] = Future()
    future.set_result(part)
    return future


_tokenizer: Tokenizer
"""Of a process that works for another."""


def _begin_work(tokenizer: dict[str, Any]) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parts that are begun are finished
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = from_json(tokenizer)


def _end_with_parent() -> None:
    """Without it, a process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(folder: Path, index: int, content: list[Piece], lines_are_words: bool) -> Part:
    return _make(_tokenizer, folder, index, content, lines_are_words)
