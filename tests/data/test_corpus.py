"""Each corpus bears the name that its numbers must bear, and has the official splits."""

import hashlib
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

import data.corpus
from data.corpus import load_corpus
from data.document import Split

HEAD = b"<mediawiki xmlns="


def content(split: Split) -> bytes:
    return b"".join(split.chunks())


def test_an_unknown_corpus_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"data\.corpus: no corpus 'enwik9'; known: text, enwik8, stdlib, iid"):
        load_corpus("enwik9")


def test_text_keeps_bytes_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\x00\xff")
    corpus = load_corpus("text", str(tmp_path / "a.txt"))
    assert corpus.name == "text"
    assert content(corpus.split("all")) == b"one\r\ntwo\x00\xff"


def test_a_missing_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"some text")
    with pytest.raises(ValueError, match="corpus text has no split 'test'; it has train, validation, all"):
        load_corpus("text", str(tmp_path / "a.txt")).split("test")


def test_text_too_short_to_split_can_still_be_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x")
    corpus = load_corpus("text", str(tmp_path / "a.txt"))
    assert content(corpus.split("all")) == b"x"
    with pytest.raises(ValueError, match="too short, nothing is left for the split 'train'"):
        corpus.split("train")


def test_text_needs_a_path_that_holds_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path"):
        load_corpus("text")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"data\.path: .*empty\.txt holds no text"):
        load_corpus("text", str(tmp_path / "empty.txt"))


@pytest.fixture
def small_enwik8(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A stand-in for the official file, of 2,000 bytes."""
    official = HEAD + bytes(i % 251 for i in range(2000 - len(HEAD)))
    monkeypatch.setattr(data.corpus, "ENWIK8_BYTES", len(official))
    monkeypatch.setattr(data.corpus, "ENWIK8_MD5", hashlib.md5(official).hexdigest())
    return official


@pytest.mark.parametrize("name", ["enwik8", "enwik8.xz"])
def test_enwik8_is_found_checked_and_split(small_enwik8: bytes, name: str) -> None:
    Path(name).write_bytes(lzma.compress(small_enwik8) if name.endswith("xz") else small_enwik8)
    corpus = load_corpus("enwik8")
    assert corpus.name == "enwik8"
    assert content(corpus.split("train")) == small_enwik8[:1800]
    assert content(corpus.split("validation")) == small_enwik8[1800:1900]
    assert content(corpus.split("test")) == small_enwik8[1900:]
    assert content(corpus.split("all")) == small_enwik8


def test_what_is_not_enwik8_is_not_called_so(small_enwik8: bytes) -> None:
    Path("enwik8").write_bytes(small_enwik8[:-1] + b"!")
    with pytest.raises(ValueError, match="enwik8: has the size of enwik8, but not its md5"):
        load_corpus("enwik8")
    Path("enwik8").write_bytes(small_enwik8 + b"!")
    with pytest.raises(ValueError, match="2,001 bytes are more than the 2,000 of enwik8"):
        load_corpus("enwik8")
    Path("enwik8").write_bytes(b"x" + small_enwik8[1:])
    with pytest.raises(ValueError, match="enwik8: not enwik8, which begins with <mediawiki"):
        load_corpus("enwik8")
    Path("enwik8").touch()


@pytest.mark.parametrize(
    ("size", "name"),
    [(1_499_999, "1m"), (1_500_001, "2m"), (3_954_400, "4m"), (99_999_999, "100m"), (250_000, "250k")],
)
def test_a_prefix_of_enwik8_is_called_a_prefix(
    size: int, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "prefix"
    with path.open("wb") as file:  # sparse: no 100 MB are written
        file.write(HEAD)
        file.truncate(size)
    corpus = load_corpus("enwik8", str(path))
    assert corpus.name == f"enwik8-prefix{name}"
    sizes = [corpus.split(split).num_bytes for split in ("train", "validation", "test")]
    assert sizes == [size * 9 // 10, size * 95 // 100 - size * 9 // 10, size - size * 95 // 100]


def test_a_missing_enwik8_is_explained(small_enwik8: bytes) -> None:
    with pytest.raises(ValueError, match=r"data\.corpus: no file enwik8 or .* in .*; get enwik8\.zip"):
        load_corpus("enwik8")
    Path("enwik8_part.xz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"set data\.path for enwik8_part\.xz"):
        load_corpus("enwik8")
    with pytest.raises(ValueError, match=r"data\.path: no file 'other' in"):
        load_corpus("enwik8", "other")


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.validation: enwik8 has official splits"):
        load_corpus("enwik8", validation="0.2")
    with pytest.raises(ValueError, match=r"data\.path: the corpus `stdlib` finds its files itself"):
        load_corpus("stdlib", "some/path")


def test_stdlib_is_text_of_this_python_alone() -> None:
    corpus = load_corpus("stdlib")
    assert corpus.name == "stdlib"
    assert corpus == load_corpus("stdlib")
    assert 4e6 < corpus.split("all").num_bytes < 20e6
    assert 0.05 < corpus.split("validation").num_bytes / corpus.split("all").num_bytes < 0.15
    parts = {name for document in corpus.split("all").documents for name in document.path.parts[-4:]}
    assert {"json", "argparse.py", "typing.py"} <= parts
    assert not {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "tkinter"} & parts


def test_stdlib_leaves_out_what_depends_on_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"module{i:02}.py" for i in range(30)]
    for name in [*names, "json/decoder.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass")
    for name in ("_sysconfigdata__linux_.py", "config-3.11-x86/python-config.py", "site-packages/numpy.py",
                 "unittest/test/testmock.py", "test/test_os.py", "sitecustomize.py", "data.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = load_corpus("stdlib").split("all").documents
    assert [d.path.relative_to(tmp_path).as_posix() for d in documents] == ["json/decoder.py", *names]


def test_a_python_without_sources_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(ValueError, match=r"has no library sources in .*python311\.zip; use the corpus `text`"):
        load_corpus("stdlib")


def test_corpora_need_no_heavy_import() -> None:
    program = (
        "import sys, data.corpus, data.shards\nsys.exit(bool({'torch', 'datasets', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(data.corpus.__file__).parents[1]).returncode == 0


def test_tiny_shakespeare_has_the_split_of_nanogpt(shipped_data: Path) -> None:
    corpus = load_corpus("text", str(shipped_data / "tinyshakespeare/input.txt"))
    assert corpus.split("train").num_bytes == 1_003_854
    assert corpus.split("validation").num_bytes == 111_540


def test_the_shipped_prefix_of_enwik8(shipped_data: Path) -> None:
    corpus = load_corpus("enwik8", str(shipped_data / "enwik8_prefix_3954400.xz"))
    assert corpus.name == "enwik8-prefix4m"
    assert corpus.split("train").num_bytes == 3_558_960
    assert corpus.split("validation").num_bytes == corpus.split("test").num_bytes == 197_720
    assert (
        hashlib.sha256(content(corpus.split("all"))).hexdigest()
        == "9010ba68c6c496bbd8d01a9a33acd22d468566936d430046d6d4a045352decb9"
    )
