"""Your own text: files, each of them a document."""

from data.corpora.contract import Corpus, Source
from data.document import Document, whole_documents
from data.files import find_files
from data.holdout import hold_out, repeated


def text(source: Source) -> Corpus:
    """One file, a folder with all files below it, or a pattern such as `books/*.txt.xz`.

    Each file is one document, in order of path; empty files are left out. Bytes stay as they are, CRLF
    included.
    """
    if source.path is None:
        raise ValueError("data.path: the corpus `text` needs the path of a file or folder, or a pattern")
    documents, notes = _read(source.path, "data.path")
    splits = hold_out(documents, source.validation, lambda path: _read(path, "data.validation")[0])
    return Corpus("text", splits, notes=(*notes, *repeated(splits)))


def _read(path: str, key: str) -> tuple[list[Document], list[str]]:
    """The documents that a path means, and a note if empty files were left out."""
    files = find_files(path, key)
    documents = whole_documents(files)
    if not documents:
        raise ValueError(f"{key}: {path} holds no text")
    empty = len(files) - len(documents)
    return documents, [f"{path}: {empty} of {len(files)} files are empty and were left out"] if empty else []
