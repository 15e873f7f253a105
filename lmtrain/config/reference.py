"""The page docs/config.md, from the schema and the mixers. `python -m lmtrain.config.reference` prints it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from attention.mixer import MIXERS
from data.tasks import TASKS
from lmtrain.config.schema import SECTIONS
from lmtrain.config.values import hints_of, in_words, range_in_words

_HEAD = """\
# Configuration

<!-- Written by `python -m lmtrain.config.reference`; a test compares. Edit the schema, not this page. -->

A run is described by one YAML file; `key.sub=value` on the command line changes it. The last of two wins.

* The type of the setting decides how text is read: for text `010`, `on` and `1e3` are what they look like,
  `1e3` and `1_000` are whole numbers too (below 2^31), true and false are written so, `null` means none.
* A value may be a mapping: `model.mixers.near={kind: local, window: 64}` replaces that mixer,
  `optimizer={lr: 3e-4}` changes the settings it names.
* `${data.seq_len}` repeats another setting, `${oc.env:NAME}` reads a variable of the environment. The copy of
  the configuration in the run's folder keeps them as written, so that a secret is not stored.
* All mistakes are told at once, each with its line and what would be right; then nothing is started. A
  setting that would have no effect is a mistake too.
"""

_MIXERS_HEAD = """\
## Mixers

`model.mixers` gives names to mixers, `model.pattern` says which layer has which: its words are repeated over
the layers, and `a+b` puts two side by side. A mixer that the pattern does not name is left out.

```yaml
model:
  mixers:
    near: {kind: local, heads: 4, window: 256}
    far: {kind: dense, heads: 4}
  pattern: near near near far
```
"""


_TASKS_HEAD = """\
## Synthetic tasks

`data.corpus` names one, `data.task` has its settings; [recall.md](recall.md) says what they are.
"""


def reference() -> str:
    """The page, in Markdown: a table for each section, then one for each mixer and each synthetic task."""
    sections = [_chapter(f"## {name}", of, f"{name}.") for name, of in SECTIONS.items()]
    mixers = [_chapter(f"### {name}", MIXERS[name].Config, "", MIXERS[name]) for name in sorted(MIXERS)]
    tasks = [_chapter(f"### {name}", TASKS[name], "data.task.") for name in TASKS]
    return "\n".join([_HEAD, *sections, _MIXERS_HEAD, *mixers, _TASKS_HEAD, *tasks])


def _chapter(title: str, settings: Any, prefix: str, described: Any = None) -> str:
    summary = (inspect.getdoc(described or settings) or "").split("\n\n")[0].replace("\n", " ")
    rows = [_row(prefix, field, hints_of(settings)[field.name]) for field in dataclasses.fields(settings)]
    table = ["| key | value | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([title, "", summary, "", *table, ""])


def _row(prefix: str, field: dataclasses.Field[Any], hint: Any) -> str:
    value, null, _ = in_words(hint).partition(" or null")
    value = f"{value} {range_in_words(field)}".strip() + null
    meaning = field.metadata.get("meaning", "")
    return f"| `{prefix}{field.name}` | {value} | `{_as_yaml(field)}` | {meaning} |"


def _as_yaml(field: dataclasses.Field[Any]) -> str:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, tuple):
        return str(list(default))
    return str(default) if default != "" else '""'


if __name__ == "__main__":
    print(reference(), end="")
