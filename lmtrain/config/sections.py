"""The tree of text becomes sections and mixers; what does not fit the schema is noted, nothing raised."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import attention  # noqa: F401 - registers the mixers
from attention.mixer import MIXERS, nearest
from data.tasks import TASKS
from lmtrain.config.problems import Problem
from lmtrain.config.reader import Node
from lmtrain.config.schema import SECTIONS, Config
from lmtrain.config.values import hints_of, range_problem, read_value

MIXER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED = frozenset(dir(nn.ModuleDict())) | {"ffn"}
"""Names that the container of a layer's mixers has for itself, such as `type` and `values`; and that of the layer's
feed-forward part."""


@dataclass
class Reading:
    """Reads a tree. skip: keys already known to be wrong; problems: what else was found."""

    skip: set[str]
    problems: list[Problem] = field(default_factory=list)

    def config(self, tree: Node) -> Config:
        """The configuration, with the default in place of each faulty setting."""
        sections = {}
        assert isinstance(tree.value, dict)
        for name, node in tree.value.items():
            if name not in SECTIONS:
                self._unknown_section(name, node)
            elif isinstance(node.value, dict):
                sections[name] = SECTIONS[name](**self._settings(node.value, SECTIONS[name], name, name))
            elif node.value is not None:  # a section without a line is empty
                self._tell(node, name, "must be a mapping of settings")
        return Config(**sections)

    def _settings(self, nodes: dict[str, Node], settings: Any, path: str, owner: str) -> dict[str, Any]:
        """The values of those settings that are right."""
        fields = {f.name: f for f in dataclasses.fields(settings)}
        values: dict[str, Any] = {}
        for name, node in nodes.items():
            key = f"{path}.{name}"
            if key in self.skip:
                continue
            if name not in fields:
                message = f"no such setting of {owner}{_did_you_mean(name, list(fields))}"
                self.problems.append(Problem(node.where, key, message))
            elif key == "model.mixers":
                values[name] = self._mixers(node)
            elif key == "data.task":
                values[name] = self._task(node, nodes.get("corpus"))
            else:
                self._setting(node, key, fields[name], hints_of(settings)[name], values)
        return values

    def _setting(self, node: Node, key: str, of: Any, hint: Any, values: dict[str, Any]) -> None:
        try:
            value = read_value(node, hint)
        except ValueError as error:
            self._tell(node, key, str(error))
            return
        if message := range_problem(of, value):
            self._tell(node, key, message)
        else:
            values[of.name] = value

    def _mixers(self, node: Node) -> dict[str, dict[str, Any]]:
        """name -> {kind, and all its settings}, of the mixers whose kind is known."""
        mixers = {}
        if not isinstance(node.value, dict):
            self._tell(node, "model.mixers", "must be a mapping, name: {kind: ..., and its settings}")
            return {}
        for name, mixer in node.value.items():
            key = f"model.mixers.{name}"
            if key in self.skip or f"{key}.kind" in self.skip:
                continue
            if not MIXER_NAME.fullmatch(name):
                message = "the name of a mixer is made of letters, digits and _, and begins with no digit"
                self.problems.append(Problem(mixer.where, key, message))
            elif name in RESERVED:
                self.problems.append(Problem(mixer.where, key, f"{name} is taken; call the mixer otherwise"))
            elif not isinstance(mixer.value, dict):
                self._tell(mixer, key, "must be a mapping, {kind: ..., and its settings}")
            elif (kind := self._kind(mixer, key)) is not None:
                settings = {n: node for n, node in mixer.value.items() if n != "kind"}
                values = self._settings(settings, MIXERS[kind].Config, key, kind)
                mixers[name] = {"kind": kind} | dataclasses.asdict(MIXERS[kind].Config(**values))
        return mixers

    def _task(self, node: Node, corpus: Node | None) -> dict[str, Any]:
        """The settings of the task that is the corpus; of any other corpus `EFFECTS` complain."""
        name = None if corpus is None else corpus.value
        if not isinstance(node.value, dict):
            self._tell(node, "data.task", "must be a mapping of settings")
        elif isinstance(name, str) and name in TASKS:
            return self._settings(node.value, TASKS[name], "data.task", name)
        return {}

    def _kind(self, mixer: Node, key: str) -> str | None:
        kinds = sorted(MIXERS)
        assert isinstance(mixer.value, dict)
        kind = mixer.value.get("kind")
        if kind is None:
            self.problems.append(Problem(mixer.where, f"{key}.kind", f"missing ({', '.join(kinds)})"))
        elif not isinstance(kind.value, str) or kind.value not in MIXERS:
            self._tell(kind, f"{key}.kind", f"no such mixer{_did_you_mean(str(kind.value), kinds)}")
        else:
            return kind.value
        return None

    def _unknown_section(self, name: str, node: Node) -> None:
        key = name
        while isinstance(node.value, dict) and len(node.value) == 1:
            (below, node), *_ = node.value.items()
            key = f"{key}.{below}"
        self.problems.append(Problem(node.where, key, f"no such section: {name}{_did_you_mean(name, list(SECTIONS))}"))

    def _tell(self, node: Node, key: str, message: str) -> None:
        self.problems.append(Problem(node.where, key, message, node.text))


def _did_you_mean(name: str, names: list[str]) -> str:
    """`; did you mean keep? (heads, keep)`; a setting written in the wrong section is found in its own."""
    keys = [f"{section}.{f.name}" for section, of in SECTIONS.items() for f in dataclasses.fields(of)]
    elsewhere = [key for key in keys if key.endswith(f".{name}")]
    if elsewhere and name not in names:
        hint = f"; did you mean {' or '.join(elsewhere)}?"
    else:
        hint = nearest(name, names)
    return f"{hint} ({', '.join(names)})"
