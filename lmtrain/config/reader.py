"""What was written, and where: YAML and `key=value` become one tree of text; `${...}` is filled in.

Nothing is converted here. YAML 1.1 would read `010` as 8, `12:30:00` as 45000 and `on` as true before the
type of the setting is known, so scalars stay text until `lmtrain.config.values` reads them by that type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmtrain.config.problems import COMMAND_LINE, ConfigError, Problem

MAX_DEPTH = 20
"""Deepest nesting that is read; the schema needs 4."""

Key = tuple[str, ...]
"""A key in parts: ("train", "steps")."""


@dataclass
class Node:
    """A piece of the configuration: text, a list, a mapping or null (None), and where it was written.

    filled_from: the text with `${...}` that this piece was filled in from. Messages show that text, since the
    piece itself may be a secret.
    """

    value: str | list[Node] | dict[str, Node] | None
    where: str
    filled_from: str | None = None

    def copy(self) -> Node:
        """The same tree, to be changed without changing this one."""
        value = self.value
        if isinstance(value, dict):
            value = {name: child.copy() for name, child in value.items()}
        elif isinstance(value, list):
            value = [item.copy() for item in value]
        return Node(value, self.where, self.filled_from)

    @property
    def text(self) -> str | None:
        """How a scalar was written; None for lists and mappings."""
        if self.filled_from is not None:
            return self.filled_from
        return "null" if self.value is None else self.value if isinstance(self.value, str) else None


class _Composer(yaml.SafeLoader):
    """Plain YAML only: what could execute, recurse or repeat without end is refused, with its line."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refused("anchors and aliases are not read; write ${section.key} to repeat a value", event)
        if event.tag is not None:
            raise _refused(f"tags are not read; remove {event.tag}", event)
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
    """The tree of one YAML document, and what is wrong with its keys. ConfigError if there is no tree."""
    problems: list[Problem] = []
    try:
        root = _Composer(text).get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = file if mark is None else f"{file}:{mark.line + 1}"
        raise ConfigError([Problem(where, "not readable as YAML", _reason(error))]) from None
    if root is None:
        return Node({}, file), []
    tree = _tree(root, "", lambda node: f"{file}:{node.start_mark.line + 1}", problems)
    if not isinstance(tree.value, dict):
        raise ConfigError([Problem(tree.where, "not a configuration", "must be a mapping of sections")])
    return tree, problems


def read_flow(text: str) -> Node:
    """The tree of an override's value: `{kind: local, window: 64}`, `[0.9, 0.95]`. Raises ValueError."""
    problems: list[Problem] = []
    try:
        root = _Composer(text).get_single_node()
    except yaml.YAMLError as error:
        raise ValueError(f"not readable as YAML: {_reason(error)}") from None
    tree = Node(None, COMMAND_LINE) if root is None else _tree(root, "", lambda _: COMMAND_LINE, problems)
    if problems:
        raise ValueError("; ".join(problem.statement for problem in problems))
    return tree


def _tree(node: yaml.Node, key: str, where: Callable[[yaml.Node], str], problems: list[Problem]) -> Node:
    if isinstance(node, yaml.ScalarNode):
        null = node.tag == "tag:yaml.org,2002:null"
        block = node.style in ("|", ">")
        return Node(None if null else node.value.rstrip("\n") if block else node.value, where(node))
    if isinstance(node, yaml.SequenceNode):
        return Node([_tree(item, key, where, problems) for item in node.value], where(node))
    entries: dict[str, Node] = {}
    for name, value in node.value:
        child_key = ".".join(filter(None, (key, str(name.value))))
        if not isinstance(name, yaml.ScalarNode):
            problems.append(Problem(where(name), key or "the file", "has a key that is not a word"))
        elif name.value in entries:
            first = entries[name.value].where
            also = "" if first == where(name) else f", first at {first}"
            problems.append(Problem(where(name), child_key, f"written twice{also}"))
        else:
            entries[name.value] = Node(_tree(value, child_key, where, problems).value, where(name))
    return Node(entries, where(node))


def override(tree: Node, text: str, is_group: Callable[[Key], bool], is_mapping: Callable[[Key], bool]) -> None:
    """Write `key.sub=value` into the tree; the last of two wins. Raises ValueError if that cannot be.

    A mapping given to a group (a section, model.mixers) changes the keys it names; given to anything else (a
    mixer) it replaces what was there. Any other value is taken verbatim, but for `null`.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError("write key=value, for example train.steps=100")
    path = tuple(key.strip().split("."))
    node = Node(None if value == "null" else value, COMMAND_LINE)
    if is_mapping(path) and "${" not in value[:2]:
        node = read_flow(value)
        if not isinstance(node.value, dict):
            raise ValueError("must be a mapping, {name: value}")
    for each, child in _assignments(path, node, is_group):
        _assign(tree, each, child)


def _assignments(path: Key, node: Node, is_group: Callable[[Key], bool]) -> Iterator[tuple[Key, Node]]:
    """What an override writes: a group's mapping is taken apart."""
    if is_group(path) and isinstance(node.value, dict):
        for name, child in node.value.items():
            yield from _assignments((*path, name), child, is_group)
    else:
        yield path, node


def _assign(tree: Node, path: Key, node: Node) -> None:
    for depth, name in enumerate(path[:-1], start=1):
        assert isinstance(tree.value, dict)
        tree = tree.value.setdefault(name, Node({}, node.where))
        if tree.value is None:
            tree.value = {}
        if not isinstance(tree.value, dict):
            above = ".".join(path[:depth])
            raise ValueError(f"{above} is {tree.text or 'a list'} ({tree.where}) and has nothing below it")
    assert isinstance(tree.value, dict)
    tree.value[path[-1]] = node


def interpolate(tree: Node, defaults: dict[str, Any]) -> tuple[Node, dict[str, str], list[Problem]]:
    """The tree with every `${...}` filled in by OmegaConf, the texts of those by key, and what failed.

    `${data.seq_len}` is the value written for that key, or else its default; `${oc.env:NAME}` a variable.
    """
    written = dict(_with_interpolations(tree, ()))
    if not written:  # OmegaConf takes most of the time that reading takes
        return tree, {}, []
    problems: list[Problem] = []
    for path, node in written.items():
        try:
            OmegaConf.create({"text": node.value})  # one malformed text would spoil the container of all
        except (OmegaConfBaseException, RecursionError) as error:
            problems.append(_not_filled(path, node, error))
    malformed = {problem.key for problem in problems}
    container = OmegaConf.create(_overlaid(defaults, _plain(tree, (), malformed)))
    filled = {}
    for path, node in written.items():
        if ".".join(path) not in malformed:
            try:
                filled[path] = _node_of(_select(container, path), node.where, str(node.value))
            except (OmegaConfBaseException, RecursionError) as error:
                problems.append(_not_filled(path, node, error))
    texts = {".".join(path): str(node.value) for path, node in written.items()}
    return _with(tree, (), filled), texts, problems


def _with_interpolations(node: Node, path: Key) -> Iterator[tuple[Key, Node]]:
    if isinstance(node.value, str) and "${" in node.value:
        yield path, node
    elif isinstance(node.value, dict):
        for name, child in node.value.items():
            yield from _with_interpolations(child, (*path, name))
    elif isinstance(node.value, list):
        for i, item in enumerate(node.value):
            yield from _with_interpolations(item, (*path, str(i)))


def _plain(node: Node, path: Key, without: set[str]) -> Any:
    if isinstance(node.value, dict):
        return {name: _plain(child, (*path, name), without) for name, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(item, (*path, str(i)), without) for i, item in enumerate(node.value)]
    return None if ".".join(path) in without else node.value


def _overlaid(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: _overlaid(below.get(name), value) for name, value in above.items()}


def _select(container: Any, path: Key) -> Any:
    """The resolved value at a path, as plain Python."""
    for name in path:
        container = container[int(name) if OmegaConf.is_list(container) else name]
    return OmegaConf.to_container(container, resolve=True) if OmegaConf.is_config(container) else container


def _node_of(value: Any, where: str, filled_from: str) -> Node:
    if isinstance(value, dict):
        children = {str(name): _node_of(item, where, filled_from) for name, item in value.items()}
        return Node(children, where, filled_from)
    if isinstance(value, list):
        return Node([_node_of(item, where, filled_from) for item in value], where, filled_from)
    if value is None or value == "null":
        return Node(None, where, filled_from)
    return Node(str(value).lower() if isinstance(value, bool) else str(value), where, filled_from)


def _with(node: Node, path: Key, filled: dict[Key, Node]) -> Node:
    """The tree with the nodes at some paths replaced."""
    if path in filled:
        return filled[path]
    if isinstance(node.value, dict):
        children = {name: _with(child, (*path, name), filled) for name, child in node.value.items()}
        return Node(children, node.where)
    if isinstance(node.value, list):
        return Node([_with(item, (*path, str(i)), filled) for i, item in enumerate(node.value)], node.where)
    return node


def _not_filled(path: Key, node: Node, error: Exception) -> Problem:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split("\n", 1)[0]
    reason = reason.rpartition("while resolving interpolation: ")[2]
    return Problem(node.where, ".".join(path), f"cannot be filled in: {reason}", node.text)


def _reason(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).split("\n", 1)[0]
