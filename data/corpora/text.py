"""Your own text: files, each of them a document."""

from data.corpora.contract import Corpus, Source
from data.document import whole_documents
from data.files import find_files
from data.holdout import hold_out, repeated


def text(source: Source) -> Corpus:
    """One file, a folder with all files below it, or a pattern such as `books/*.txt.xz`.

    Each file is one document, in order of path; empty files are left out. Bytes stay as they are, CRLF
    included.
    """
    if source.path is None:
        raise ValueError("data.path: the corpus `text` needs the path of a file or folder, or a pattern")
    files = find_files(source.path, "data.path")
    documents = whole_documents(files)
    if not documents:
        raise ValueError(f"data.path: {source.path} holds no text")
    splits = hold_out(documents, source.validation)
    empty = len(files) - len(documents)
    left_out = [f"{source.path}: {empty} of {len(files)} files are empty and were left out"] if empty else []
    return Corpus("text", splits, notes=(*left_out, *repeated(splits)))
