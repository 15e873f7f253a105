"""Fill the tables of the documents with the rows of benchmarks/results.

    python benchmarks/fill.py

A table stands between the lines `<!-- rows of benchmarks/results/NAME.json -->` and `<!-- end of rows -->`; the file
has its rows under `rows`, and those of another table under the word that stands in its lines instead.
tests/test_tables.py holds every page to what this would write.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from report import table

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- (\w+) of (benchmarks/results/[\w.-]+\.json) -->\n).*?(<!-- end of \2 -->)", re.S)


def pages() -> list[Path]:
    """README.md and docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: str) -> str:
    """The page with its marked tables as the results say them."""

    def rows(found: re.Match[str]) -> str:
        kept = json.loads((ROOT / found[3]).read_text())
        return f"{found[1]}{table(kept[found[2]])}\n{found[4]}"

    return MARKED.sub(rows, page)


def main() -> None:
    """Rewrite the pages whose tables differ."""
    for path in pages():
        page = path.read_text()
        if (new := filled(page)) != page:
            path.write_text(new)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
