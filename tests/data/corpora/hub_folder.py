"""A folder laid out like a dataset of the hub."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


def write_hub_folder(folder: Path, tables: dict[str, list[dict[str, Any]]], form: str) -> str:
    """Files of data in a `form` ("parquet", "jsonl"), and the README.md that says which split each of them is."""
    folder.mkdir()
    lines = [f"  - split: {split}\n    path: data/{split}.{form}" for split in tables]
    head = "\n".join(["---", "configs:", "- config_name: default", "  data_files:", *lines, "---", "# A dataset", ""])
    (folder / "README.md").write_text(head)
    (folder / "data").mkdir()
    for split, rows in tables.items():
        path = folder / f"data/{split}.{form}"
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)
