"""The part of a text that validates: its end, or a text of its own; never a byte that trains."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from data.document import AnyDocument, Document, Split, character_start, whole_documents
from data.files import find_files, same_file_key
from data.kept import KeptDocument, content_digest

MANY_DOCUMENTS = 20  # from here on the cut falls on a document border


def text_files(path: str) -> list[Document]:
    """The files that data.validation means, each a document."""
    documents = whole_documents(find_files(path, "data.validation"))
    if not documents:
        raise ValueError(f"data.validation: {path} holds no text")
    return documents


def hold_out(
    documents: Sequence[AnyDocument],
    validation: str,
    read: Callable[[str], Sequence[AnyDocument]] = text_files,
) -> dict[str, Split]:
    """The splits `train`, `validation` and `all`; `validation` is a share of the bytes, or a path for `read`.

    A share s is held out at the end: of n bytes the first floor((1 - s) n) train, moved back to the start of
    a UTF-8 character. From `MANY_DOCUMENTS` documents on, the cut is the document border nearest to there, of
    two the earlier. ValueError if a document of a text of its own trains too.
    """
    everything = Split(tuple(documents))
    share = _share(validation)
    if share is None:
        splits = {"train": everything, "validation": Split(tuple(read(validation))), "all": everything}
        refuse_overlap(splits, "data.validation: ")
        return splits
    size = everything.num_bytes
    cut = _cut(documents, math.floor((1 - share) * size))
    held_out = part(documents, cut, size)
    return {"train": part(documents, 0, cut), "validation": held_out, "all": everything}


def part(documents: Sequence[AnyDocument], start: int, stop: int) -> Split:
    """Bytes [start, stop) of the documents laid end to end."""
    pieces = []
    for document in documents:
        first, last = max(start, 0), min(stop, document.num_bytes)
        if first < last:
            pieces.append(document.part(first, last))
        start, stop = start - document.num_bytes, stop - document.num_bytes
    return Split(tuple(pieces))


def is_share(validation: str) -> bool:
    """Whether data.validation is a share, or else names something. ValueError for a share outside of 0 and 1."""
    return _share(validation) is not None


def refuse_overlap(splits: Mapping[str, Split], blamed: str = "") -> None:
    """ValueError, naming both, if a document of `train` is in another split too: the same file, or the same text."""
    training = splits["train"].documents
    for name in splits:
        held_out = splits[name].documents if name not in ("train", "all") else ()
        for document, twin in _same_files(training, held_out) or twins(training, held_out):
            raise ValueError(f"{blamed}{_called(document)} of the split {name} is also training data: {_called(twin)}")


def repeated(splits: Mapping[str, Split]) -> list[str]:
    """A note if documents of `validation` are, word for word, in `train` too: what is one's own may repeat itself."""
    number = len(twins(splits["train"].documents, splits["validation"].documents))
    of = len(splits["validation"].documents)
    return [f"{number} of {of} documents that validate are, word for word, training data too"] if number else []


Pair = tuple[AnyDocument, AnyDocument]


def twins(training: Sequence[AnyDocument], held_out: Sequence[AnyDocument]) -> list[Pair]:
    """Each held-out document whose text trains too, and the one it equals. Only texts of equal length are read."""
    sizes = {document.num_bytes for document in held_out}
    known = {_digest(document): document for document in training if document.num_bytes in sizes}
    sizes = {document.num_bytes for document in known.values()}
    digests = [(document, _digest(document)) for document in held_out if document.num_bytes in sizes]
    return [(document, known[digest]) for document, digest in digests if digest in known]


def _same_files(training: Sequence[AnyDocument], held_out: Sequence[AnyDocument]) -> list[Pair]:
    files = {same_file_key(document.path): document for document in training if type(document) is Document}
    keys = [(document, same_file_key(document.path)) for document in held_out if type(document) is Document]
    return [(document, files[key]) for document, key in keys if key in files]


def _called(document: AnyDocument) -> str:
    """The file, or within a kept text the title."""
    return str(document.path) if type(document) is Document else document.title


def _digest(document: AnyDocument) -> bytes:
    known = document.digest if isinstance(document, KeptDocument) else b""
    return known or content_digest(document.chunks())


def _share(validation: str) -> Fraction | None:
    try:
        value = float(validation)
    except ValueError:
        return None
    if not 0 < value < 1:
        raise ValueError(f"data.validation: a share must lie between 0 and 1, not {validation}")
    return Fraction(validation)


def _cut(documents: Sequence[AnyDocument], position: int) -> int:
    borders = [0]
    for document in documents:
        borders.append(borders[-1] + document.num_bytes)
    if len(documents) >= MANY_DOCUMENTS:
        return min(borders[1:-1], key=lambda border: abs(border - position))
    document_start = borders[bisect_right(borders, position) - 1]
    first = max(document_start, position - 3)  # a UTF-8 character has up to 4 bytes
    around = b"".join(part(documents, first, position + 1).chunks())
    return first + character_start(around, position - first)
