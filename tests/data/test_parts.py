"""Parts: the same tokens and counts however the work is shared, interrupted or damaged; a row for each document."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.document
import data.parts
import data.shards
from data.corpus import Corpus, load_corpus
from data.document import Split
from data.parts import Part, document_sizes, make_parts
from data.shards import prepare
from data.tokenizer import ByteTokenizer, CharacterTokenizer
from tests.processes import begin, wait_until

ROOT = Path(data.parts.__file__).parents[1]
TEXTS = [f"some words of document {index}, naïve 文字\n".encode() * (3 * index + 1) for index in range(9)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.document, "CHUNK", 16)
    monkeypatch.setattr(data.parts, "PART_BYTES", 64)


@pytest.fixture
def text(text_corpus: Callable[..., Corpus]) -> Split:
    return text_corpus(*TEXTS).split("all")


def tokens_of(parts: Sequence[Part]) -> bytes:
    return b"".join(part.path.read_bytes() for part in parts)


@pytest.mark.usefixtures("small_parts")
def test_parts_hold_the_text_and_count_every_document(text: Split, tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "parts", text, ByteTokenizer())
    assert len(parts) > 20
    assert tokens_of(parts) == b"".join(TEXTS)
    expected = [[len(text), len(text), len(text.decode().split())] for text in TEXTS]
    assert document_sizes(parts).tolist() == expected


class Written:
    """Text in given chunks as a document, without a file."""

    title = "written"

    def __init__(self, chunks: list[str]) -> None:
        self.content = [chunk.encode() for chunk in chunks]
        self.num_bytes = sum(map(len, self.content))

    def chunks(self):
        yield from self.content


words = st.lists(
    st.lists(st.text("ab \n\u2003文", min_size=1, max_size=4), min_size=1, max_size=8), min_size=1, max_size=4
)


@given(words, st.integers(1, 9))
def test_words_are_counted_right_wherever_the_text_is_cut(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]], size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.parts, "PART_BYTES", size)
        text = Split(tuple(Written(chunks) for chunks in documents))
        parts = make_parts(tmp_path_factory.mktemp("parts"), text, ByteTokenizer())
    assert document_sizes(parts)[:, 2].tolist() == [len("".join(chunks).split()) for chunks in documents]


@pytest.mark.usefixtures("small_parts")
def test_what_is_finished_is_kept_and_the_rest_made(
    text: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_parts(tmp_path / "parts", text, ByteTokenizer())
    expected = [part.path.read_bytes() for part in first]
    first[1].path.unlink()
    first[2].path.with_suffix(".json").unlink()
    first[3].path.write_bytes(expected[3][:-1])
    first[4].path.write_bytes(b"x" + expected[4][1:])
    record = json.loads(first[5].path.with_suffix(".json").read_text())
    record[1][0][3] += 1  # a word more
    first[5].path.with_suffix(".json").write_text(json.dumps(record))
    first[6].path.with_suffix(".json").write_text("[" * 10)
    first[7].path.rename(first[8].path)  # right in itself, but of another place in the text
    first[7].path.with_suffix(".json").rename(first[8].path.with_suffix(".json"))
    made = []
    make = data.parts._make
    monkeypatch.setattr(data.parts, "_make", lambda *task: made.append(task[2]) or make(*task))
    again = make_parts(tmp_path / "parts", text, ByteTokenizer())
    assert made == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [part.path.read_bytes() for part in again] == expected
    assert [part.rows for part in again] == [part.rows for part in first]


@pytest.mark.usefixtures("small_parts")
def test_what_cannot_be_encoded_is_named_with_file_and_byte(text_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    texts = text_corpus(b"ab" * 100, b"a" * 70 + b"c" + b"b" * 50).split("all")
    with pytest.raises(ValueError, match=r"0001\.txt, byte 70: character 'c' is not in the training text"):
        make_parts(tmp_path / "parts", texts, CharacterTokenizer("ab"))


def test_progress_reaches_the_whole_text(text: Split, tmp_path: Path) -> None:
    told = []
    make_parts(tmp_path / "parts", text, ByteTokenizer(), watch=lambda done, total: told.append((done, total)))
    assert told[-1] == (text.num_bytes, text.num_bytes)


PREPARE = """
    import os, signal, sys, threading, time
    import data.parts
    from data.corpus import load_corpus
    from data.shards import prepare
    from data.tokenizer import CharacterTokenizer
    texts, cache, workers = sys.argv[1:]

    def watch(done, total):
        print(done, flush=True)
        if os.environ.get("HANG"):
            time.sleep(60)

    if __name__ == "__main__":
        tokenizer = CharacterTokenizer("".join(map(chr, range(300))))
        corpus = load_corpus("text", texts)
        print(prepare(corpus, "all", tokenizer, cache, workers=int(workers), watch=watch).fingerprint)
"""


def start(folder: Path, texts: Path, cache: Path, workers: int, hang: bool = False) -> subprocess.Popen:
    program = folder / "prepare.py"
    program.write_text(textwrap.dedent(PREPARE))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HANG": "1" if hang else ""}
    command = [sys.executable, str(program), str(texts), str(cache), str(workers)]
    return begin(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def large_text(tmp_path: Path) -> Path:
    """Of three parts, in documents that no part begins with."""
    line = "a line of words that make a text, é\n".encode()
    folder = tmp_path / "large"
    folder.mkdir()
    for index, size in enumerate((50_000, 250_000, 5_000, 250_000)):
        (folder / f"{index}.txt").write_bytes(line * size)
    return folder


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_with_processes_at_work_it_goes_on_to_the_same_dataset(large_text: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    killed = start(tmp_path, large_text, cache, 2, hang=True)
    assert killed.stdout.readline()  # a part is finished
    workers = children(killed.pid)
    killed.kill()
    killed.communicate()
    (parts,) = cache.glob("*.parts")
    assert list(parts.glob("part-*.json"))
    assert not [path for path in cache.iterdir() if path.is_dir() and "." not in path.name]
    wait_until(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))  # nobody is left behind
    inodes = {path.name: path.stat().st_ino for path in parts.glob("part-*.bin")}
    assert inodes
    out, error = start(tmp_path, large_text, cache, 0).communicate()
    whole, _ = start(tmp_path, large_text, tmp_path / "another", 2).communicate()
    assert out.split()[-1] == whole.split()[-1], error
    assert not parts.exists()
    dataset = prepare(
        load_corpus("text", str(large_text)), "all", CharacterTokenizer("".join(map(chr, range(300)))), cache
    )
    assert dataset.fingerprint == out.split()[-1]
    text = b"".join(path.read_bytes() for path in sorted(large_text.iterdir()))
    assert dataset.tokenizer.decode(dataset.tokens) == text
    assert dataset.document_words.tolist() == [9 * size for size in (50_000, 250_000, 5_000, 250_000)]
    assert np.array_equal(dataset.document_bytes, [path.stat().st_size for path in sorted(large_text.iterdir())])


def test_a_worker_that_is_killed_is_told_and_finished_parts_stay(
    text_corpus: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*arguments: object, parts: Path, **settings: object) -> None:
        parts.mkdir()
        raise BrokenProcessPool

    monkeypatch.setattr(data.shards, "write_dataset", break_down)
    with pytest.raises(ValueError, match=r"a process that tokenized was killed .* fewer workers"):
        prepare(text_corpus(b"text"), "all", ByteTokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.parts"))
