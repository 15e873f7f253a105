"""The text in a row of a table."""

from collections.abc import Mapping
from typing import Any


def text_of(row: Mapping[str, Any], column: str, where: str) -> bytes:
    """The text in that column as UTF-8. ValueError, beginning with `where`, if it has none."""
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}; it has {', '.join(row) or 'none'}: set data.column")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{where}: the column {column!r} holds no text but {type(text).__name__}; set data.column")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} of {column!r} is half of a surrogate pair") from None
