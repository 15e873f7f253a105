"""Any dataset of the hub, or a folder laid out like one, through the package `datasets`."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from data.corpora.contract import Corpus, Source
from data.corpora.table import text_of
from data.document import Split, file_identity
from data.files import find_files, find_folder
from data.holdout import hold_out, is_share, refuse_overlap, repeated
from data.kept import KeptPart, Texts, keep

VALIDATION = "validation"


def hub(source: Source) -> Corpus:
    """The rows of a column, each a document, of all splits that the dataset has.

    The split `source.split` trains. What validates is the split that data.validation names, else the one called
    validation, else a share of the first. A title is the split and the number of the row. Downloaded and read once:
    from then on the text is what the cache keeps, until another revision is asked for.
    """
    path = source.path
    if path is None:
        raise ValueError("data.path: the corpus `hub` needs the name of a dataset, owner/name, or a folder laid out so")
    identity = [*dataset_identity(source, path), source.column]
    parts = keep("hub", identity, lambda: _texts(source, path), source.cache)
    if source.split not in parts:
        raise ValueError(f"data.split: {path} has no text in a split {source.split!r}, but in {_listed(parts)}")
    splits, notes = _splits(parts, source)
    empty = sum(part.empty for part in parts.values())
    notes += [f"{empty} rows without text were left out"] if empty else []
    folder = find_folder(path)
    name = "-".join(filter(None, ("hub", folder.resolve().name if folder else path, source.subset)))
    return Corpus(re.sub(r"[^\w.-]+", "-", name), splits, notes=tuple(notes))


def dataset_identity(source: Source, path: str) -> list[Any]:
    """What changes when the dataset is another: of a folder its files, of the hub name and revision."""
    folder = find_folder(path)
    files = [file_identity(file) for file in find_files(str(folder), "data.path")] if folder else [path]
    return [source.subset, source.revision, *files]


def dataset_rows(source: Source, path: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(split, number, row) of the dataset. Only here something may be downloaded."""
    from datasets import load_dataset

    folder = find_folder(path)
    with _explained(path):
        tables = load_dataset(str(folder or path), source.subset, revision=source.revision, streaming=source.streaming)
    for split, table in tables.items():
        rows, number = iter(table), 0
        while True:
            with _explained(path):
                row = next(rows, None)
            if row is None:
                break
            yield split, number, row
            number += 1


def _texts(source: Source, path: str) -> Texts:
    for split, number, row in dataset_rows(source, path):
        yield split, f"{split}:{number}", text_of(row, source.column, f"{path}, row {number} of {split}")


def _splits(parts: Mapping[str, KeptPart], source: Source) -> tuple[dict[str, Split], list[str]]:
    """The splits by the names they have here, and a note if text of one's own repeats itself."""
    training = parts[source.split].documents
    others = {name: Split(part.documents) for name, part in parts.items() if name != source.split}
    validates = VALIDATION if is_share(source.validation) else source.validation
    if validates in others:
        everything = Split(tuple(document for part in parts.values() for document in part.documents))
        validation = others.pop(validates)
        splits = others | {"train": Split(training), VALIDATION: validation, "all": everything}
        refuse_overlap(splits, "data.path: ")
        return splits, []
    if not is_share(source.validation):
        raise ValueError(
            f"data.validation: {source.path} has no split {validates!r} to validate; it has {_listed(others)}, "
            f"or give the share of {source.split} that validates"
        )
    splits = others | hold_out(training, source.validation)
    refuse_overlap({name: split for name, split in splits.items() if name != VALIDATION}, "data.path: ")
    return splits, repeated(splits)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What the package says becomes a ValueError that says what to do."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        if "scripts are no longer supported" in reason:
            reason += (
                "; no code of a dataset is run here: try data.revision=refs/convert/parquet, which the hub makes of "
                "most, or a copy of it as parquet, or download its files and use the corpora text or jsonl"
            )
        elif isinstance(error, OSError) and find_folder(path) is None:
            reason += "; or set data.path to a folder with its files"
        raise ValueError(f"data.path: the dataset {path} cannot be read: {reason}") from error


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"
