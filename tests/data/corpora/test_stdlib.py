"""The sources of Python are a text that does not depend on who built this Python."""

from pathlib import Path

import pytest

from data.corpus import load_corpus


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
