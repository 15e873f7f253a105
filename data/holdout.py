"""The part of a text that validates: its end, or a text of its own; never a byte that trains."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

from data.document import AnyDocument, Document, Split, character_start, whole_documents
from data.files import find_files, same_file_key

MANY_DOCUMENTS = 20  # from here on the cut falls on a document border


def hold_out(documents: Sequence[AnyDocument], validation: str) -> dict[str, Split]:
    """The splits `train`, `validation` and `all`; `validation` is a share of the bytes, or a path.

    A share s is held out at the end: of n bytes the first floor((1 - s) n) train, moved back to the start of
    a UTF-8 character. From `MANY_DOCUMENTS` documents on, the cut is the document border nearest to there, of
    two the earlier.
    """
    everything = Split(tuple(documents))
    share = _share(validation)
    if share is None:
        return {"train": everything, "validation": _other_text(validation, documents), "all": everything}
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


def _share(validation: str) -> Fraction | None:
    try:
        value = float(validation)
    except ValueError:
        return None
    if not 0 < value < 1:
        raise ValueError(f"data.validation: a share must lie between 0 and 1, not {validation}")
    return Fraction(validation)


def _other_text(path: str, training: Sequence[AnyDocument]) -> Split:
    held_out = whole_documents(find_files(path, "data.validation"))
    if not held_out:
        raise ValueError(f"data.validation: {path} holds no text")
    training_files = {same_file_key(document.path) for document in training if isinstance(document, Document)}
    for document in held_out:
        if same_file_key(document.path) in training_files:
            raise ValueError(f"data.validation: {document.path} is also training data")
    return Split(tuple(held_out))


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
