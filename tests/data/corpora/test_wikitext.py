"""WikiText: articles are documents, each line has an <eos> that counts, and only official counts bear the name."""

import lzma
from pathlib import Path

import pytest

from data.corpora import wikitext
from data.corpus import load_corpus
from data.shards import prepare
from data.tokenizer import ByteTokenizer
from tests.data.corpora.contents import content, texts, words

FIRST = b" \n = First = \n \n Some text . \n \n = = Section = = \n \n More <unk> . \n \n"
SECOND = b" = Second ( film ) = \n \n Text = more = text \n = not a heading = \n"
OTHER = b" \n = Other = \n \n Words of another split . \n"


def write(folder: Path, **files: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_bytes(text)
    return str(folder)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official counts of a stand-in: words and lines by the obvious definition."""
    counts = {"validation": len(FIRST.split()) + FIRST.count(b"\n"), "test": len(OTHER.split()) + OTHER.count(b"\n")}
    monkeypatch.setattr(wikitext, "OFFICIAL", {"wikitext2": counts, "wikitext103": counts})


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["wikitext2", "wikitext103"])
def test_articles_are_documents(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "w", wiki_train_tokens=b" \n" + SECOND, wiki_valid_tokens=FIRST, wiki_test_tokens=OTHER)
    corpus = load_corpus(name, folder)
    assert corpus.name == name
    assert texts(corpus.split("train")) == {"Second ( film )": b" \n" + SECOND}
    assert texts(corpus.split("validation")) == {"First": FIRST}
    assert content(corpus.split("all")) == b" \n" + SECOND + FIRST + OTHER
    dataset = prepare(corpus, "validation", ByteTokenizer())
    assert dataset.words == words(corpus.split("validation")) == len(FIRST.split()) + 9


def test_text_is_cut_in_front_of_headings_only(tmp_path: Path) -> None:
    folder = write(tmp_path / "w", valid_txt=FIRST + SECOND)
    corpus = load_corpus("wikitext2", folder)
    assert texts(corpus.split("validation")) == {"First": FIRST, "Second ( film )": SECOND}


@pytest.mark.usefixtures("small")
def test_other_counts_are_a_subset(tmp_path: Path) -> None:
    corpus = load_corpus("wikitext2", write(tmp_path / "w", wiki_valid_tokens=FIRST + b" more \n"))
    assert corpus.name == "wikitext2-subset"
    official = len(FIRST.split()) + 9
    assert corpus.notes == (f"validation has {official + 2} words and lines, the official one {official}",)


@pytest.mark.usefixtures("small")
def test_a_missing_split_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2/valid.txt.xz").write_bytes(lzma.compress(FIRST))
    monkeypatch.setenv("LMTRAIN_DATA", str(tmp_path))
    corpus = load_corpus("wikitext2")
    assert corpus.name == "wikitext2"
    assert content(corpus.split("validation")) == FIRST
    with pytest.raises(
        ValueError, match=r"no split 'test'; it has .*wikitext-2 has no wiki\.test\.tokens or test\.txt"
    ):
        corpus.split("test")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path: no folder wikitext-103 in .*wiki\.train\.tokens"):
        load_corpus("wikitext103")
    with pytest.raises(ValueError, match=r"data\.path: no folder 'nowhere' in"):
        load_corpus("wikitext2", "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.path: .*empty holds none of wiki\.train\.tokens, train\.txt"):
        load_corpus("wikitext2", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"data\.path: .*valid\.txt holds no text"):
        load_corpus("wikitext2", write(tmp_path / "w", valid_txt=b""))
    folder = write(tmp_path / "both", wiki_train_tokens=FIRST + SECOND, wiki_valid_tokens=OTHER + b" \n" + SECOND)
    with pytest.raises(ValueError, match=r"Second \( film \) of the split validation is also training data"):
        load_corpus("wikitext2", folder)


def test_the_official_validation_split(shipped_data: Path) -> None:
    corpus = load_corpus("wikitext2", str(shipped_data / "wikitext-2"))
    validation = corpus.split("validation")
    assert (corpus.name, words(validation), len(validation.documents)) == ("wikitext2", 217_646, 60)
