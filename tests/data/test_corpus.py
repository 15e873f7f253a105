"""A corpus is found by its name, and takes only the settings that it has a use for."""

import subprocess
import sys
from pathlib import Path

import pytest

import data.corpus
from data.corpora.contract import CorpusKind, Source
from data.corpus import CORPORA, Corpus, load_corpus
from data.document import Split


def test_an_unknown_corpus_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"data\.corpus: no corpus 'enwik9'; known: text, .*enwik8, .*iid"):
        load_corpus("enwik9")


def test_every_setting_of_a_corpus_is_a_field_of_its_source() -> None:
    for name, kind in CORPORA.items():
        assert set(kind.settings) <= set(vars(Source())), name


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.validation: has no effect on the corpus enwik8, but on text, "):
        load_corpus("enwik8", validation="0.2")
    with pytest.raises(ValueError, match=r"data\.path: has no effect on the corpus stdlib"):
        load_corpus("stdlib", "some/path")
    with pytest.raises(ValueError, match=r"data\.column: has no effect on the corpus text, but on jsonl, hub"):
        load_corpus("text", "some/path", column="body")


def test_a_new_corpus_is_a_function_and_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def own(source: Source) -> Corpus:
        seen.append(source)
        return Corpus("own", {"all": Split(())})

    monkeypatch.setitem(CORPORA, "own", CorpusKind(own, ("path", "column")))
    assert load_corpus("own", "here", column="body").name == "own"
    assert seen == [Source(path="here", column="body")]


def test_a_missing_split_is_refused_with_the_known_ones_and_the_reason() -> None:
    corpus = Corpus("one", {"all": Split(())}, absent={"test": "no file t.txt"})
    with pytest.raises(ValueError, match=r"corpus one has no split 'test'; it has all: no file t\.txt"):
        corpus.split("test")
    with pytest.raises(ValueError, match=r"corpus one has no split 'train'; it has all$"):
        corpus.split("train")
    with pytest.raises(ValueError, match="too short, nothing is left for the split 'all'"):
        corpus.split("all")


def test_corpora_need_no_heavy_import() -> None:
    program = (
        "import sys, data.corpus, data.shards\nsys.exit(bool({'torch', 'datasets', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(data.corpus.__file__).parents[1]).returncode == 0
