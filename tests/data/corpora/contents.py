"""What tests of corpora ask of a split."""

from data.document import Split, WordCounter


def content(split: Split) -> bytes:
    """All of its text."""
    return b"".join(split.chunks())


def texts(split: Split) -> dict[str, bytes]:
    """Title -> text of its documents, in order."""
    return {document.title: b"".join(document.chunks()) for document in split.documents}


def words(split: Split) -> int:
    """As prepared datasets count them, document by document."""
    total = 0
    for document in split.documents:
        counter = WordCounter(split.lines_are_words)
        for chunk in document.chunks():
            counter.add(chunk)
        total += counter.words
    return total
