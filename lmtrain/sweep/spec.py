"""The YAML of a sweep becomes a `Spec`, or every mistake is told at once, with its line.

base: enwik8/dense                            # a YAML file, or a shipped configuration
settings: {data.seq_len: 1024}                # of every run
axes:
  mixer:                                      # labels, and what each one sets
    dense: {model.mixers.far: {kind: dense, heads: 4}}
    mosa: {model.mixers.far: {kind: mosa, heads: 8}}
  keep: {model.mixers.far.keep: [32, 64]}     # a name, and the values of one setting
  optimizer.lr: [1e-3, 2e-3]                  # the same, called after the setting
constraints: [keep < data.seq_len]
match: {equal: flops, solve: model.ffn_dim, reference: {model.mixers.far: {kind: dense, heads: 4}}}
seeds: [1, 2, 3]
tokens: [1e6, 2e6]                            # of training
cooldown: 0.2                                 # the runs of different tokens share one trunk
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attention.mixer import nearest
from lmtrain.config import SHIPPED, ConfigError, Problem
from lmtrain.config.problems import COMMAND_LINE
from lmtrain.config.reader import Node, read_yaml
from lmtrain.config.values import read_value
from lmtrain.sweep.match import ACCOUNTINGS, QUANTITIES, Match

SHIPPED_SWEEPS = SHIPPED / "sweeps"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
COMPARISON = re.compile(r"\s*(?P<left>[\w.+-]+)\s*(?P<sign>==|!=|<=|>=|<|>)\s*(?P<right>[\w.+-]+)\s*")
BARE = re.compile(r"[A-Za-z0-9_./+-]([A-Za-z0-9_./+ -]*[A-Za-z0-9_./+-])?")
Label = int | float | str


@dataclass(frozen=True)
class Setting:
    """One override of the base configuration, and where it was written."""

    key: str
    text: str
    where: str

    @property
    def word(self) -> str:
        """As `lmtrain train` takes it."""
        return f"{self.key}={self.text}"


@dataclass(frozen=True)
class Choice:
    """A value of an axis: what it is called, and what it sets."""

    label: Label
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Axis:
    """What varies. key: the one setting whose values its choices are; None: each sets what it wants."""

    name: str
    choices: tuple[Choice, ...]
    key: str | None = None

    @property
    def chooses_mixer(self) -> bool:
        """Whether its labels stand for mixers, or patterns of them."""
        keys = [setting.key for choice in self.choices for setting in choice.settings]
        return self.key is None and any(re.fullmatch(r"model\.(pattern|mixers(\.\w+)?)", key) for key in keys)


@dataclass(frozen=True)
class Constraint:
    """`left sign right`: names of axes, keys of the configuration, numbers or words."""

    left: str
    sign: str
    right: str
    where: str

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"


@dataclass(frozen=True)
class Spec:
    """A sweep as it was written. match: with the settings that make a run its own reference; seeds, tokens: empty if
    runs have those of the base; cooldown: share of a run, at its end, in which the rate falls; max_runs, max_flops:
    what all runs together may be; evaluate: what is scored, if not the run's own validation split."""

    name: str
    base: str
    settings: tuple[Setting, ...]
    axes: tuple[Axis, ...]
    constraints: tuple[Constraint, ...] = ()
    match: Match | None = None
    reference: tuple[Setting, ...] = ()
    seeds: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    cooldown: float | None = None
    max_runs: int | None = None
    max_flops: float | None = None
    evaluate: str | None = None

    @property
    def mixer_axis(self) -> str | None:
        """The name of the axis that chooses the mixer."""
        named = [axis.name for axis in self.axes if axis.name == "mixer"]
        return next(iter(named + [axis.name for axis in self.axes if axis.chooses_mixer]), None)


def read_spec(path_or_name: str, overrides: Sequence[str] = ()) -> Spec:
    """The sweep of a YAML file, or of a shipped one by name; overrides: `key=value` settings of every run, which go
    before all that the file says. Raises ConfigError with every problem found."""
    path = _find(path_or_name)
    try:
        tree, problems = read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(path), "not readable", str(error))]) from None
    reading = _Reading(path, problems)
    spec = reading.spec(tree, overrides)
    if reading.problems:
        raise ConfigError(reading.problems)
    return spec


def shipped_sweeps() -> list[str]:
    """Names of the sweeps that come with lmtrain."""
    return sorted(path.stem for path in SHIPPED_SWEEPS.glob("*.yaml"))


def _find(path_or_name: str) -> Path:
    path, names = Path(path_or_name), shipped_sweeps()
    if path.is_file():
        return path
    name = path_or_name.removeprefix("sweeps/")
    if name not in names:
        message = f"no such file, nor a shipped sweep{nearest(name, names)} ({', '.join(names)})"
        raise ConfigError([Problem(COMMAND_LINE, path_or_name, message)])
    return SHIPPED_SWEEPS / f"{name}.yaml"


@dataclass
class _Reading:
    """Reads the tree of a sweep; what is wrong with it is noted, nothing raised."""

    path: Path
    problems: list[Problem] = field(default_factory=list)

    def spec(self, tree: Node, overrides: Sequence[str]) -> Spec:
        """The sweep, with a default in place of what is wrong."""
        assert isinstance(tree.value, dict)
        parts = dict(tree.value)
        self._refuse_unknown(parts, [field.name for field in dataclasses.fields(Spec) if field.name != "reference"], "")
        base = self._take(parts, "base", str)
        if base is None and "base" not in parts:
            self._tell(tree.where, "base", "missing: the configuration that the runs have in common")
        name = self._take(parts, "name", str) or self.path.stem
        if not NAME.fullmatch(name):
            self._tell(tree.where, "name", f"{name!r} is made of other than letters, digits, _, . and -")
        beside = self.path.parent / (base or "")
        axes = self._axes(parts.get("axes"))
        cooldown = self._take(parts, "cooldown", float)
        if cooldown is not None and not 0 < cooldown < 1:
            self._tell(parts["cooldown"].where, "cooldown", "must be a share > 0 and < 1")
        if cooldown is not None and "tokens" not in parts:
            self._tell(
                parts["cooldown"].where, "cooldown", "shares a trunk among runs of different tokens: give tokens"
            )
        match, reference = self._match(parts.get("match"))
        return Spec(
            name=name,
            base=str(beside) if base and beside.is_file() else base or "",
            settings=(*self._settings(parts.get("settings"), "settings"), *self._own(overrides)),
            axes=axes,
            constraints=self._constraints(parts.get("constraints")),
            match=match,
            reference=reference,
            seeds=tuple(int(seed) for seed in self._numbers(parts, "seeds", at_least=0)),
            tokens=tuple(sorted(int(tokens) for tokens in self._numbers(parts, "tokens", at_least=1))),
            cooldown=cooldown,
            max_runs=self._take(parts, "max_runs", int),
            max_flops=self._take(parts, "max_flops", float),
            evaluate=self._take(parts, "evaluate", str),
        )

    def _own(self, overrides: Sequence[str]) -> list[Setting]:
        """Those of the command line; where a run lies is the sweep's affair."""
        found = []
        for each in overrides:
            key, _, text = each.partition("=")
            self._refuse_reserved(key, COMMAND_LINE)
            found.append(Setting(key.strip(), text, COMMAND_LINE))
        return found

    def _axes(self, node: Node | None) -> tuple[Axis, ...]:
        entries = self._mapping(node, "axes")
        found = [self._axis(name, child) for name, child in entries.items()]
        return tuple(axis for axis in found if axis is not None)

    def _axis(self, name: str, node: Node) -> Axis | None:
        where = f"axes.{name}"
        if name in ("seed", "tokens"):
            return self._tell(node.where, where, f"is an axis of its own: write {name.rstrip('s')}s: [..] beside axes")
        if isinstance(node.value, list):
            if "." not in name:
                return self._tell(node.where, where, f"values of which setting? {name}: {{section.key: [..]}}")
            return self._values(name, name, node)
        entries = self._mapping(node, where)
        listed = [key for key, child in entries.items() if isinstance(child.value, list)]
        if listed and len(entries) == 1:
            return self._values(name, listed[0], entries[listed[0]])
        if listed:
            return self._tell(node.where, where, "either one setting with its values, or labels with what they set")
        if not entries:
            return self._tell(node.where, where, "an empty grid: the axis has no values") if node.value == {} else None
        choices = [Choice(_label(text), self._settings(child, f"{where}.{text}")) for text, child in entries.items()]
        return Axis(name, tuple(choices))

    def _values(self, name: str, key: str, node: Node) -> Axis | None:
        assert isinstance(node.value, list)
        if not node.value:
            return self._tell(node.where, f"axes.{name}", "an empty grid: the axis has no values")
        self._refuse_reserved(key, node.where)
        texts = [flow(item) for item in node.value]
        for text in sorted({text for text in texts if texts.count(text) > 1}):
            self._tell(node.where, f"axes.{name}", f"{text} stands there twice")
        choices = [Choice(_label(text), (Setting(key, text, item.where),)) for text, item in zip(texts, node.value)]
        return Axis(name, tuple(choices), key)

    def _settings(self, node: Node | None, key: str) -> tuple[Setting, ...]:
        entries = self._mapping(node, key)
        for name, child in entries.items():
            self._refuse_reserved(name, child.where)
        return tuple(Setting(name, flow(child), child.where) for name, child in entries.items())

    def _constraints(self, node: Node | None) -> tuple[Constraint, ...]:
        if node is None:
            return ()
        if not isinstance(node.value, list):
            self._tell(node.where, "constraints", "must be a list of comparisons, [keep < data.seq_len]")
            return ()
        found = []
        for item in node.value:
            parts = COMPARISON.fullmatch(item.value) if isinstance(item.value, str) else None
            if parts is None:
                self._tell(
                    item.where, "constraints", f"{item.text or 'this'} is no comparison like keep < data.seq_len"
                )
            else:
                found.append(Constraint(**parts.groupdict(), where=item.where))
        return tuple(found)

    def _match(self, node: Node | None) -> tuple[Match | None, tuple[Setting, ...]]:
        if node is None:
            return None, ()
        parts = self._mapping(node, "match")
        names = [field.name for field in dataclasses.fields(Match)]
        self._refuse_unknown(parts, [*names, "reference"], "match.")
        for name in ("equal", "solve", "reference"):
            if name not in parts:
                self._tell(node.where, f"match.{name}", "missing")
        for name, allowed in (("equal", QUANTITIES), ("accounting", ACCOUNTINGS)):
            if name in parts and parts[name].value not in allowed:
                self._tell(parts[name].where, f"match.{name}", f"must be {' or '.join(allowed)}")
        kinds = {"equal": str, "solve": str, "accounting": str}
        given = {name: self._take(parts, name, kinds.get(name, int), "match.") for name in names if name in parts}
        for name in ("least", "most", "multiple"):
            if isinstance(given.get(name), int) and given[name] < 1:
                self._tell(parts[name].where, f"match.{name}", "must be >= 1")
        reference = self._settings(parts.get("reference"), "match.reference")
        return Match(**({"equal": "flops", "solve": ""} | given)), reference

    def _numbers(self, parts: dict[str, Node], name: str, at_least: int) -> list[float]:
        """A list of whole numbers, which may be written as 1e6."""
        node = parts.get(name)
        if node is None:
            return []
        if not isinstance(node.value, list) or not node.value:
            self._tell(node.where, name, "must be a list of whole numbers, not empty")
            return []
        found = [number for item in node.value if (number := self._read(item, name, float)) is not None]
        wrong = [number for number in found if number < at_least or number != int(number)]
        if wrong:
            self._tell(node.where, name, f"must be whole numbers >= {at_least}, got {wrong[0]:g}")
        for number in sorted({number for number in found if found.count(number) > 1}):
            self._tell(node.where, name, f"{number:g} stands there twice")
        return [number for number in found if number not in wrong]

    def _take(self, parts: dict[str, Node], name: str, kind: Any, above: str = "") -> Any:
        return self._read(parts[name], f"{above}{name}", kind) if name in parts else None

    def _read(self, node: Node, key: str, kind: Any) -> Any:
        try:
            return read_value(node, kind)
        except ValueError as error:
            return self._tell(node.where, key, str(error), node.text)

    def _mapping(self, node: Node | None, key: str) -> dict[str, Node]:
        if node is None or node.value is None:
            return {}
        if isinstance(node.value, dict):
            return node.value
        self._tell(node.where, key, "must be a mapping", node.text)
        return {}

    def _refuse_unknown(self, parts: dict[str, Node], names: list[str], above: str) -> None:
        for name, node in parts.items():
            if name not in names:
                message = f"no such part of a sweep{nearest(name, names)} ({', '.join(names)})"
                self._tell(node.where, f"{above}{name}", message)

    def _refuse_reserved(self, key: str, where: str) -> None:
        reasons = {"run.dir": "each run has a folder in that of the sweep (--out)", "run.seed": "write seeds: [1, 2]"}
        if key.strip() in reasons:
            self._tell(where, key, reasons[key.strip()])

    def _tell(self, where: str, key: str, message: str, text: str | None = None) -> Any:
        """Note a problem; None, with which a reader may end."""
        self.problems.append(Problem(where, key, message, text))


def flow(node: Node) -> str:
    """The node on one line, as the command line takes it."""
    return node.value if isinstance(node.value, str) else _flow(node)


def _flow(node: Node) -> str:
    if node.value is None:
        return "null"
    if isinstance(node.value, dict):
        return "{" + ", ".join(f"{name}: {_flow(child)}" for name, child in node.value.items()) + "}"
    if isinstance(node.value, list):
        return "[" + ", ".join(map(_flow, node.value)) + "]"
    bare = BARE.fullmatch(node.value) and node.value.lower() not in ("null", "none", "~")
    return node.value if bare else json.dumps(node.value, ensure_ascii=False)


def _label(text: str) -> Label:
    """A label as a number if it is one."""
    kinds: tuple[Callable[[str], Label], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            pass
    return text
