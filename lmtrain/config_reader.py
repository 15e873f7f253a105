"""What was written, and where: YAML and `key=value` become one tree of text; `${...}` is filled in.

Nothing is converted here. YAML 1.1 would read `010` as 8, `12:30:00` as 45000 and `on` as true before the type of the
setting is known, so scalars stay text until `lmtrain.config_values` reads them by that type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmtrain.problems import COMMAND_LINE, Problem

MAX_DEPTH = 20
"""Deepest nesting that is read; the schema needs 4."""

INTERPOLATION = "${"


@dataclass
class Node:
    """A piece of the configuration: text, a list, a mapping or null (None), and where it was written."""

    value: str | list[Node] | dict[str, Node] | None
    where: str

    @property
    def text(self) -> str | None:
        """How a scalar was written; None for lists and mappings."""
        if self.value is None:
            return "null"
        return self.value if isinstance(self.value, str) else None


class _Composer(yaml.SafeLoader):
    """Plain YAML only: what could execute, recurse or repeat without end is refused, with its line."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refused("anchors and aliases are not read; repeat a value as ${section.key}", event)
        if event.tag is not None:
            raise _refused(f"tags are not read, remove {event.tag}", event)
        if self.depth >= MAX_DEPTH:
            raise _refused("nested too deeply", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _refused(message: str, event: yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=event.start_mark)


def read_yaml(text: str, file: str) -> tuple[Node, list[Problem]]:
    """The tree of one YAML document, and what is wrong with its form (twice the same key, syntax)."""
    problems: list[Problem] = []
    try:
        root = _Composer(text).get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = file if mark is None else f"{file}:{mark.line + 1}"
        return Node({}, file), [Problem(where, "YAML", _first_line(getattr(error, "problem", None) or error))]
    if root is None:
        return Node({}, file), []
    tree = _tree(root, lambda node: f"{file}:{node.start_mark.line + 1}", problems)
    if not isinstance(tree.value, dict):
        problems.append(Problem(tree.where, "YAML", "must be a mapping of sections (run: , data: , ...)"))
        tree = Node({}, file)
    return tree, problems


def read_flow(text: str) -> Node:
    """The tree of an override's value: `{kind: local, window: 64}`, `[0.9, 0.95]`. Raises ValueError."""
    problems: list[Problem] = []
    try:
        root = _Composer(text).get_single_node()
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {_first_line(getattr(error, 'problem', None) or error)}") from None
    tree = Node(None, COMMAND_LINE) if root is None else _tree(root, lambda _: COMMAND_LINE, problems)
    if problems:
        raise ValueError("; ".join(f"{p.key}: {p.message}" for p in problems))
    return tree


def _tree(node: yaml.Node, where: Callable[[yaml.Node], str], problems: list[Problem]) -> Node:
    if isinstance(node, yaml.ScalarNode):
        null = node.tag == "tag:yaml.org,2002:null"
        return Node(None if null else node.value, where(node))
    if isinstance(node, yaml.SequenceNode):
        return Node([_tree(item, where, problems) for item in node.value], where(node))
    entries: dict[str, Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            problems.append(Problem(where(key), "YAML", "a key must be a word"))
            continue
        if key.value in entries:
            problems.append(
                Problem(where(key), key.value, f"written twice, first at {entries[key.value].where}")
            )
            continue
        child = _tree(value, where, problems)
        entries[key.value] = Node(child.value, where(key))
    return Node(entries, where(node))


def override(
    tree: Node, text: str, is_group: Callable[[list[str]], bool], is_mapping: Callable[[list[str]], bool]
) -> None:
    """Write `key.sub=value` into the tree; the last of two wins. Raises ValueError if that cannot be.

    A mapping given to a group (a section, model.mixers) changes the keys it names; given to anything else (a mixer)
    it replaces what was there. Text for anything but a mapping is taken verbatim, `null` means None.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError("write key=value, for example train.steps=100")
    path = key.strip().split(".")
    node = Node(None if value == "null" else value, COMMAND_LINE)
    if is_mapping(path) and value.lstrip().startswith("{"):
        node = read_flow(value)
    _assign(tree, path, [], node, is_group)


def _assign(
    tree: Node, path: list[str], above: list[str], node: Node, is_group: Callable[[list[str]], bool]
) -> None:
    here = [*above, *path]
    if is_group(here) and isinstance(node.value, dict):
        for name, child in node.value.items():
            _assign(tree, [*path, name], above, child, is_group)
        return
    for name in path[:-1]:
        above = [*above, name]
        assert isinstance(tree.value, dict)
        tree = tree.value.setdefault(name, Node({}, node.where))
        if tree.value is None:
            tree.value = {}
        if not isinstance(tree.value, dict):
            raise ValueError(
                f"{'.'.join(above)} is {tree.text or 'a list'} ({tree.where}), which has nothing below it"
            )
    assert isinstance(tree.value, dict)
    tree.value[path[-1]] = node


def interpolate(tree: Node, defaults: dict[str, Any]) -> tuple[Node, dict[str, str], list[Problem]]:
    """The tree with every `${...}` filled in by OmegaConf, the texts that were filled in by key, and what failed.

    `${data.seq_len}` is the value written for that key, or else its default; `${oc.env:NAME}` a variable.
    """
    found = dict(_interpolations(tree, []))
    if not found:
        return tree, {}, []
    problems, values = [], {}
    for path, node in found.items():
        try:
            OmegaConf.create({"text": node.text})  # checks the grammar of this text alone
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(_failed(path, node, error))
    broken = {problem.key for problem in problems}
    container = OmegaConf.create(_overlay(defaults, _plain(tree, [], broken)))
    for path, node in found.items():
        if ".".join(path) in broken:
            continue
        try:
            values[path] = _resolved(container, path, node.where)
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(_failed(path, node, error))
    texts = {".".join(path): node.text or "" for path, node in found.items()}
    return _replaced(tree, (), values), texts, problems


def _interpolations(node: Node, path: list[str]) -> list[tuple[tuple[str, ...], Node]]:
    if isinstance(node.value, str) and INTERPOLATION in node.value:
        return [(tuple(path), node)]
    return [found for name, child in _children(node) for found in _interpolations(child, [*path, name])]


def _children(node: Node) -> list[tuple[str, Node]]:
    if isinstance(node.value, dict):
        return list(node.value.items())
    return [(str(i), item) for i, item in enumerate(node.value)] if isinstance(node.value, list) else []


def _plain(node: Node, path: list[str], without: set[str]) -> Any:
    if isinstance(node.value, dict):
        return {name: _plain(child, [*path, name], without) for name, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(item, [*path, str(i)], without) for i, item in enumerate(node.value)]
    return None if ".".join(path) in without else node.value


def _overlay(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: _overlay(below.get(name), value) for name, value in above.items()}


def _resolved(container: Any, path: tuple[str, ...], where: str) -> Node:
    value = container
    for name in path:
        value = value[int(name) if OmegaConf.is_list(value) else name]
    return _node_of(
        OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value, where
    )


def _node_of(value: Any, where: str) -> Node:
    if isinstance(value, dict):
        return Node({str(name): _node_of(item, where) for name, item in value.items()}, where)
    if isinstance(value, list):
        return Node([_node_of(item, where) for item in value], where)
    if value is None or value == "null":
        return Node(None, where)
    return Node(str(value).lower() if isinstance(value, bool) else str(value), where)


def _replaced(node: Node, path: tuple[str, ...], values: dict[tuple[str, ...], Node]) -> Node:
    if path in values:
        return values[path]
    if isinstance(node.value, dict):
        children = {name: _replaced(child, (*path, name), values) for name, child in node.value.items()}
        return Node(children, node.where)
    if isinstance(node.value, list):
        return Node(
            [_replaced(item, (*path, str(i)), values) for i, item in enumerate(node.value)], node.where
        )
    return node


def _failed(path: tuple[str, ...], node: Node, error: Exception) -> Problem:
    reason = "too deep" if isinstance(error, RecursionError) else _first_line(error)
    reason = reason.rpartition("while resolving interpolation: ")[2]
    return Problem(node.where, ".".join(path), f"cannot be filled in: {reason}", node.text)


def _first_line(error: object) -> str:
    return str(error).split("\n", 1)[0].strip()
