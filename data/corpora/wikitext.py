"""WikiText-2 and WikiText-103: articles of Wikipedia as words between spaces, with <unk> for the rare ones.

Published word perplexities count one <eos> for each line: their denominator is words + lines.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data.compressed import reading
from data.corpora.contract import Corpus, Source
from data.document import Split, file_identity
from data.files import find_folder, search_folders, searched
from data.holdout import refuse_overlap
from data.kept import KeptPart, Texts, keep

FILES = {
    "train": ("wiki.train.tokens", "train.txt"),
    "validation": ("wiki.valid.tokens", "valid.txt"),
    "test": ("wiki.test.tokens", "test.txt"),
}
SUFFIXES = ("", ".xz", ".gz", ".zst")
HEADING = re.compile(rb" = ([^=].*[^=]|[^= ]) = \n?")
OFFICIAL = {  # words + lines, of the splits whose number is known for certain
    "wikitext2": {"validation": 217_646, "test": 245_569},
    "wikitext103": {"train": 103_227_021, "validation": 217_646, "test": 245_569},
}


def wikitext2(source: Source) -> Corpus:
    """WikiText-2: a vocabulary of 33,278 words."""
    return _wikitext("wikitext2", "wikitext-2", source)


def wikitext103(source: Source) -> Corpus:
    """WikiText-103: a vocabulary of 267,735 words, the articles that validate and test as in WikiText-2."""
    return _wikitext("wikitext103", "wikitext-103", source)


def _wikitext(name: str, folder_name: str, source: Source) -> Corpus:
    """The splits whose files are there, each article a document; `-subset` if one has not its official number."""
    folder = _folder(folder_name, source.path)
    files = {split: file for split in FILES if (file := _file(folder, split))}
    if not files:
        raise ValueError(f"data.path: {folder} holds none of {', '.join(f for names in FILES.values() for f in names)}")
    identity = [[split, *file_identity(file)] for split, file in files.items()]
    parts = keep(name, identity, lambda: _read(files), source.cache)
    for split, file in files.items():
        if split not in parts or not parts[split].documents:
            raise ValueError(f"data.path: {file} holds no text")
    splits = {split: Split(part.documents, lines_are_words=True) for split, part in parts.items()}
    if "train" in splits:
        refuse_overlap(splits, "data.path: ")
    splits["all"] = Split(tuple(d for part in parts.values() for d in part.documents), lines_are_words=True)
    absent = {split: f"{folder} has no {' or '.join(FILES[split])}" for split in FILES if split not in files}
    notes = _unofficial(parts, OFFICIAL[name])
    return Corpus(f"{name}-subset" if notes else name, splits, absent, notes)


def _folder(name: str, path: str | None) -> Path:
    folder = find_folder(path or name)
    if folder is None and path:
        raise ValueError(f"data.path: no folder {path!r}{searched(path)}")
    if folder is None:
        where = " or ".join(map(str, search_folders()))
        raise ValueError(f"data.path: no folder {name} in {where}; set it to the folder of wiki.train.tokens")
    return folder


def _file(folder: Path, split: str) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for name in FILES[split] for suffix in SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def _unofficial(parts: dict[str, KeptPart], official: dict[str, int]) -> tuple[str, ...]:
    counts = {split: part.words + part.lines for split, part in parts.items()}
    return tuple(
        f"{split} has {counts[split]:,} words and lines, the official one {number:,}"
        for split, number in official.items()
        if split in counts and counts[split] != number
    )


def _read(files: dict[str, Path]) -> Texts:
    for split, file in files.items():
        for title, text in _articles(file):
            yield split, title, text


def _articles(path: Path) -> Iterator[tuple[str, bytes]]:
    """(title, text) of each article: from its heading, or the start of the file, to the next heading."""
    title, lines = "", list[bytes]()
    with reading(path) as file:
        for line in file:
            if (heading := HEADING.fullmatch(line)) and (not lines or not lines[-1].strip()):
                if title:
                    yield title, b"".join(lines)
                    lines = []
                title = heading[1].decode("utf-8", "replace").strip()
            lines.append(line)
    yield title or path.name, b"".join(lines)
