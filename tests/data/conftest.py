"""Small corpora and datasets for the tests of this folder."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from data.corpus import Corpus, load_corpus
from data.shards import TokenDataset, prepare
from data.tokenizer import ByteTokenizer

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caches or the data of whoever runs it."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LMTRAIN_CACHE", str(folder / "cache"))
    monkeypatch.delenv("LMTRAIN_DATA", raising=False)


@pytest.fixture(scope="session")
def shipped_data() -> Path:
    """The folder of real corpora, if this machine has one."""
    folder = os.environ.get("LMTRAIN_DATA")
    if not folder:
        pytest.skip(
            "set LMTRAIN_DATA to the folder with tinyshakespeare/, enwik8*, pg19_* and wikitext-2/ to run this test"
        )
    return Path(folder)


@pytest.fixture
def text_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """Writes each text into a file of its own and loads them as one corpus."""

    def build(*texts: bytes, validation: str = "0.1") -> Corpus:
        folder = tmp_path / "texts"
        folder.mkdir(exist_ok=True)
        for index, content in enumerate(texts):
            (folder / f"{index:04}.txt").write_bytes(content)
        return load_corpus("text", str(folder), validation)

    return build


@pytest.fixture
def byte_dataset(text_corpus: Callable[..., Corpus], tmp_path: Path) -> Callable[..., TokenDataset]:
    """The bytes of the given texts, one document each."""

    def build(*texts: bytes) -> TokenDataset:
        return prepare(text_corpus(*texts), "all", ByteTokenizer(), tmp_path / "cache")

    return build
