"""The cache: made once, complete or not at all, reused while it is right, made anew when it is damaged."""

import errno
import fcntl
import multiprocessing
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import data.shards
from data.corpus import Corpus, load_corpus
from data.dataset import FILES, META
from data.shards import default_cache, prepare
from data.tokenizer import ByteTokenizer, CharacterTokenizer

ROOT = Path(data.shards.__file__).parents[1]


def datasets(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def corpus(text_corpus: Callable[..., Corpus]) -> Corpus:
    return text_corpus(b"some text of two documents, " * 4, b"of which this is one. " * 4)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "a cache" / "with space"


def test_an_intact_dataset_is_reused(corpus: Corpus, cache: Path) -> None:
    first = prepare(corpus, "train", ByteTokenizer(), cache)
    (folder,) = datasets(cache)
    before = snapshot(folder)
    second = prepare(corpus, "train", ByteTokenizer(), cache)
    assert snapshot(folder) == before
    assert set(before) == {*FILES, META}
    assert second.fingerprint == first.fingerprint
    assert bytes(second.tokens) == b"".join(corpus.split("train").chunks())


def test_what_changes_the_tokens_makes_another_dataset(
    corpus: Corpus, text_corpus: Callable[..., Corpus], cache: Path
) -> None:
    prepare(corpus, "train", ByteTokenizer(), cache)
    prepare(corpus, "validation", ByteTokenizer(), cache)
    prepare(corpus, "all", ByteTokenizer(), cache)
    for size in (128, 129):
        prepare(corpus, "all", CharacterTokenizer("".join(map(chr, range(size)))), cache)
    prepare(
        load_corpus("text", str(corpus.split("all").documents[0].path.parent), "0.3"),
        "train",
        ByteTokenizer(),
        cache,
    )
    assert len(datasets(cache)) == 6
    changed = corpus.split("all").documents[0].path
    changed.write_bytes(changed.read_bytes().upper())  # the same size
    dataset = prepare(corpus, "all", ByteTokenizer(), cache)
    assert bytes(dataset.tokens[:9]) == b"SOME TEXT"


def test_the_fingerprint_does_not_depend_on_where_text_and_cache_are(
    corpus: Corpus, cache: Path, tmp_path: Path
) -> None:
    folder = corpus.split("all").documents[0].path.parent
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # new times
    copy = load_corpus("text", str(tmp_path / "copy"))
    one = prepare(corpus, "train", ByteTokenizer(), cache)
    other = prepare(copy, "train", ByteTokenizer(), tmp_path / "other cache")
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("name", [*FILES, META])
@pytest.mark.parametrize("damage", ["flipped", "missing", "short"])
def test_a_damaged_dataset_is_made_anew_with_a_warning(corpus: Corpus, cache: Path, name: str, damage: str) -> None:
    intact = prepare(corpus, "train", ByteTokenizer(), cache)
    (folder,) = datasets(cache)
    content = bytearray((folder / name).read_bytes())
    if damage == "flipped":
        content[-10] ^= 1
        (folder / name).write_bytes(content)
    elif damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[:-3])
    with pytest.warns(UserWarning, match=f"damaged cache, made anew: .*{name}"):
        again = prepare(corpus, "train", ByteTokenizer(), cache)
    assert again.fingerprint == intact.fingerprint
    assert datasets(cache) == [folder]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(corpus, "train", ByteTokenizer(), cache)


def test_a_failure_leaves_nothing_behind(corpus: Corpus, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"0000\.txt, byte 0: character 's' is not in the training text"):
        prepare(corpus, "all", CharacterTokenizer("abc"), cache)
    assert datasets(cache) == []


def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


KILLED = """
    import os, signal, sys
    import data.cache, data.dataset, data.parts, data.shards
    from data.corpus import load_corpus
    from data.tokenizer import ByteTokenizer
    texts, cache, moment = sys.argv[1:]
    def kill(*arguments, **settings):
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "at commit":
        data.cache._commit = kill
    elif moment == "before documents.npy":
        data.dataset.np.save = kill
    else:
        data.parts.WordCounter.add = kill
    data.shards.prepare(load_corpus("text", texts), "all", ByteTokenizer(), cache)
"""


@pytest.mark.parametrize("moment", ["in the shard", "before documents.npy", "at commit"])
def test_a_killed_process_leaves_no_dataset_and_its_rest_is_removed(corpus: Corpus, cache: Path, moment: str) -> None:
    texts = corpus.split("all").documents[0].path.parent
    assert run(KILLED, texts, cache, moment).returncode == -signal.SIGKILL
    assert all(".tmp-" in path.name or path.name.endswith(".parts") for path in datasets(cache))
    assert len(datasets(cache)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an unfinished dataset is no damaged one
        dataset = prepare(load_corpus("text", str(texts)), "all", ByteTokenizer(), cache)
    assert bytes(dataset.tokens) == b"".join(corpus.split("all").chunks())
    (folder,) = datasets(cache)
    assert ".tmp-" not in folder.name


def _prepare_in_process(texts: str, cache: Path, ready, results) -> None:
    ready.wait()
    dataset = prepare(load_corpus("text", texts), "all", ByteTokenizer(), cache)
    results.put((dataset.fingerprint, len(dataset.tokens)))


@pytest.mark.parametrize("locks_work", [True, False])
def test_processes_that_prepare_at_once_share_one_dataset(
    corpus: Corpus, cache: Path, locks_work: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks_work:

        def refuse(*arguments: object) -> None:
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(4), context.Queue()
    texts = str(corpus.split("all").documents[0].path.parent)
    arguments = (texts, cache, ready, results)
    processes = [context.Process(target=_prepare_in_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert len(set(found)) == 1
    assert found[0][1] == corpus.split("all").num_bytes
    assert len([path for path in datasets(cache) if ".tmp-" not in path.name]) == 1


def test_the_loser_of_a_race_uses_the_winners_dataset(
    corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset = data.shards.write_dataset
    inode = []

    def be_overtaken(temporary: Path, *arguments: object, **settings: object) -> None:
        write_dataset(temporary, *arguments, **settings)
        target = temporary.with_name(temporary.name.split(".tmp-")[0])
        write_dataset(target, *arguments, **settings)
        inode.append(target.stat().st_ino)

    monkeypatch.setattr(data.shards, "write_dataset", be_overtaken)
    prepare(corpus, "all", ByteTokenizer(), cache)
    (folder,) = datasets(cache)
    assert folder.stat().st_ino == inode[0]


def test_an_unwritable_cache_is_explained(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"data\.cache: cannot write up to 400 bytes into .*file/cache .*LMTRAIN_CACHE"
    ):
        prepare(corpus, "all", ByteTokenizer(), tmp_path / "file" / "cache")


FULL = """
    import resource, sys
    import data.document, data.parts
    from data.corpus import load_corpus
    from data.shards import prepare
    from data.tokenizer import ByteTokenizer
    texts, cache, part_bytes = sys.argv[1:]
    data.document.CHUNK = data.parts.PART_BYTES = int(part_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        prepare(load_corpus("text", texts), "all", ByteTokenizer(), cache)
    except ValueError as error:
        print(error)
"""


@pytest.mark.fault(12)
def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] in (resource.RLIM_INFINITY, -1)
    (tmp_path / "text.txt").write_bytes(b"x" * 5000)
    result = run(FULL, tmp_path / "text.txt", cache, 5000)
    assert "data.cache: cannot write up to 10,000 bytes into" in result.stdout, result.stderr
    assert "File too large" in result.stdout
    assert datasets(cache) == []


@pytest.mark.fault(12)
def test_what_was_finished_before_the_disk_was_full_is_kept(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"x" * 5000)
    result = run(FULL, tmp_path / "text.txt", cache, 400)  # the parts fit, all together do not
    (parts,) = datasets(cache)
    assert f"(the part that is finished waits in {parts})" in result.stdout, result.stderr
    assert len(list(parts.glob("part-*.json"))) > 4
    dataset = prepare(load_corpus("text", str(tmp_path / "text.txt")), "all", ByteTokenizer(), cache)
    assert bytes(dataset.tokens) == b"x" * 5000
    assert not parts.exists()


@pytest.mark.fault(13)
def test_a_read_only_cache_serves_what_is_in_it(corpus: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(corpus, "all", ByteTokenizer(), cache)

    def refuse(self: Path, *arguments: object, **settings: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert prepare(corpus, "all", ByteTokenizer(), cache).fingerprint == first.fingerprint
    with pytest.raises(ValueError, match=r"data\.cache: .*read-only file system"):
        prepare(corpus, "train", ByteTokenizer(), cache)


def test_a_text_that_vanishes_is_named_and_not_blamed_on_the_cache(corpus: Corpus, cache: Path) -> None:
    corpus.split("all").documents[1].path.unlink()
    with pytest.raises(ValueError, match=r"0001\.txt: cannot be read"):
        prepare(corpus, "all", ByteTokenizer(), cache)


@pytest.mark.fault(14)
def test_an_empty_split_is_refused(text_corpus: Callable[..., Corpus], cache: Path) -> None:
    with pytest.raises(ValueError, match="the text is too short"):
        prepare(text_corpus(b"x"), "train", ByteTokenizer(), cache)


def test_the_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Corpus) -> None:
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "mine"))
    prepare(corpus, "all", ByteTokenizer())
    assert len(datasets(tmp_path / "mine")) == 1
    monkeypatch.delenv("LMTRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/lmtrain"


def test_tiny_shakespeare_in_characters(shipped_data: Path, cache: Path) -> None:
    corpus = load_corpus("text", str(shipped_data / "tinyshakespeare/input.txt"))
    text = b"".join(corpus.split("all").chunks())
    tokenizer = CharacterTokenizer(text.decode())
    train, validation = (prepare(corpus, split, tokenizer, cache) for split in ("train", "validation"))
    assert (len(train.tokens), len(validation.tokens)) == (1_003_854, 111_540)
    assert tokenizer.decode(train.tokens) + tokenizer.decode(validation.tokens) == text
    assert train.words == len(text[:1_003_854].split())
