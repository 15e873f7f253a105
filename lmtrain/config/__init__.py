"""Configuration: a YAML file and `key=value` become a checked `Config`, or every problem is told at once.

    config = load("demo", ["train.steps=20", "model.mixers.near={kind: local, window: 64}"])

`config_schema` is the schema. `config_reader`, `config_values` and `config_sections` turn text into it,
`config_rules` holds what must be true between settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from attention.mixer import nearest
from data.tasks import TASKS
from lmtrain.config.problems import COMMAND_LINE, DEFAULT, ConfigError, Problem
from lmtrain.config.reader import Key, Node, interpolate, override, read_yaml
from lmtrain.config.rules import EFFECTS, broken_rules
from lmtrain.config.schema import (
    BYTE_VOCABULARY,
    SECTIONS,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from lmtrain.config.sections import Reading
from lmtrain.files import replace_bytes

__all__ = [
    "BYTE_VOCABULARY",
    "SHIPPED",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Problem",
    "RunConfig",
    "Source",
    "TrainConfig",
    "differences",
    "fingerprint",
    "load",
    "reload",
    "save",
    "shipped_configs",
    "to_dict",
]

Check = Callable[[Config], Iterable[Problem]]

# Beside this package, in a checkout and in an installed wheel alike. `importlib.resources.files("configs")`
# would first find a folder `configs` of the user's own, wherever Python was started.
SHIPPED = Path(__file__).resolve().parents[2] / "configs"


def load(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    *,
    checks: Iterable[Check] = (),
    ranks: int = 1,
) -> Config:
    """The configuration of a YAML file, or of a shipped one by name (`demo`, `enwik8/local`), with overrides.

    checks: further conditions, `Config -> problems`. They run together with all others, so that missing
    files, say, are told at once with misspelt keys. ranks: processes that share a batch.
    Raises ConfigError with every problem found.
    """
    return Source.of(path_or_name).load(overrides, checks=checks, ranks=ranks)


@dataclasses.dataclass(frozen=True)
class Source:
    """A configuration file that was read once, from which any number of configurations are made.

    run_dir: of those that name none. tree: what was written, problems: what is wrong with it whatever is overridden.
    """

    run_dir: str
    tree: Node
    problems: tuple[Problem, ...]

    @classmethod
    def of(cls, path_or_name: str | Path) -> Source:
        """A YAML file, or a shipped one by name. Raises ConfigError if it cannot be read."""
        path, name = _find(str(path_or_name))
        return cls(f"runs/{name}", *_read_file(path))

    def load(self, overrides: Sequence[str] = (), *, checks: Iterable[Check] = (), ranks: int = 1) -> Config:
        """See `load` of this module."""
        assert not isinstance(overrides, str), "a list of key=value"
        written, problems = _overridden(self.tree.copy(), overrides)
        return _load(written, [*self.problems, *problems], self.run_dir, checks, ranks)


def reload(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    checks: Iterable[Check] = (),
    ranks: int = 1,
) -> Config:
    """The configuration saved in a run's folder, wherever that folder is now. Raises ConfigError."""
    path = Path(run_dir) / "config.yaml"
    if not os.path.isfile(path):
        message = "not the folder of a run: it has no config.yaml"
        raise ConfigError([Problem(COMMAND_LINE, str(run_dir), message)])
    here = str(run_dir).replace("${", r"\${")
    source = Source(str(run_dir), *_read_file(path))
    return source.load([f"run.dir={here}", *overrides], checks=checks, ranks=ranks)


def save(config: Config, path: str | Path) -> None:
    """Write the configuration as YAML that `load` reads back to an equal one.

    Defaults are filled in, `${...}` stays as it was written, settings without effect are left out.
    """
    values = to_dict(config)
    for effect in EFFECTS:
        if not effect.has_effect(config):
            section, name = effect.key.split(".")
            del values[section][name]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    replace_bytes(Path(path), text.encode())


def to_dict(config: Config) -> dict[str, Any]:
    """Sections as plain dictionaries, for JSON and YAML; `${...}` stays as written: it may hide a secret."""
    values = _resolved(config)
    for key, (text, value) in config.interpolations.items():
        if _at(values, key) == value:
            above, _, last = key.rpartition(".")
            container: Any = _at(values, above) if above else values
            container[int(last) if isinstance(container, list) else last] = text
    return values


def differences(old: Config, new: Config, ignore: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each setting that differs, but for those at or below a key of `ignore`.

    A value that was written with `${...}` is given as it was written.
    """
    before, after = _flat(_resolved(old)), _flat(_resolved(new))
    shown_before, shown_after = before | _flat(to_dict(old)), after | _flat(to_dict(new))
    return [
        (key, shown_before.get(key), shown_after.get(key))
        for key in before | after
        if before.get(key) != after.get(key) and not _below(key, ignore)
    ]


def fingerprint(config: Config, ignore: Sequence[str] = ()) -> str:
    """sha256 of the settings as written, but for keys at or below those of `ignore`."""
    kept = {key: value for key, value in _flat(to_dict(config)).items() if not _below(key, ignore)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def shipped_configs() -> list[str]:
    """Names of the configurations that come with lmtrain; those in `sweeps` are of many runs."""
    names = [path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml")]
    return sorted(name for name in names if not name.startswith("sweeps/"))


def _find(path_or_name: str) -> tuple[Path, str]:
    """The file, and the name that its runs get by default. An existing file comes before a shipped name."""
    path, names = Path(path_or_name), shipped_configs()
    if not os.path.isfile(path):
        if path_or_name not in names:
            close = nearest(path_or_name.removeprefix("configs/").removesuffix(".yaml"), names)
            message = f"no such file, nor a shipped configuration{close} ({', '.join(names)})"
            raise ConfigError([Problem(COMMAND_LINE, path_or_name, message)])
        path = SHIPPED / f"{path_or_name}.yaml"
    if path.resolve().is_relative_to(SHIPPED):
        return path, path.resolve().relative_to(SHIPPED).with_suffix("").as_posix().replace("/", "-")
    return path, path.stem


def _load(written: Node, problems: list[Problem], run_dir: str, checks: Iterable[Check], ranks: int) -> Config:
    """Read all values, then let every rule and check speak that does not depend on a faulty one."""
    defaults = _resolved(Config())
    defaults["run"]["dir"] = run_dir
    tree, texts, not_filled = interpolate(written, defaults)
    reading = Reading(skip={problem.key for problem in not_filled})
    config = reading.config(tree)
    config.run.dir = config.run.dir or run_dir
    problems += not_filled + reading.problems

    faulty = {problem.key for problem in problems}
    problems += _placed(_without_effect(config, written), written, config, faulty)
    faulty = {problem.key for problem in problems}
    if config.data.corpus in TASKS:
        config.data.task = dataclasses.asdict(config.task)  # type: ignore[call-overload]
    if config.model.vocab_size is None:
        config.model.vocab_size = config.known_vocabulary
    problems += _placed(broken_rules(config, ranks, faulty), written, config, faulty)
    faulty = {problem.key for problem in problems}
    problems += _placed(_checked(checks, config, bool(problems)), written, config, faulty)
    if problems:
        raise ConfigError(problems)

    values = _resolved(config)
    config.interpolations = {key: (text, _at(values, key)) for key, text in texts.items()}
    return config


def _read_file(path: Path) -> tuple[Node, tuple[Problem, ...]]:
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(shown, "not readable", str(error))]) from None
    tree, problems = read_yaml(text, shown)
    return tree, tuple(problems)


def _overridden(tree: Node, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """The tree with the overrides written into it, and those that cannot be."""
    problems = []
    for each in overrides:
        try:
            override(tree, each, _is_group, _is_mapping)
        except ValueError as error:
            key, equals, value = each.partition("=")
            problems.append(Problem(COMMAND_LINE, key, str(error), value if equals else None))
    return tree, problems


def _is_group(key: Key) -> bool:
    return len(key) == 1 or key in (("model", "mixers"), ("data", "task"))


def _is_mapping(key: Key) -> bool:
    return _is_group(key) or key[:-1] == ("model", "mixers") or key in (("parallel", "deepspeed"), ("data", "mixture"))


def _without_effect(config: Config, written: Node) -> list[Problem]:
    """Settings that do nothing. One of the file, made idle by the command line, goes back to its default."""
    problems = []
    for effect in EFFECTS:
        where, _ = _origin(written, effect.key)
        if where == DEFAULT or effect.has_effect(config):
            continue
        overridden = _overridden_at(written, effect.key)
        if not overridden and _origin(written, effect.decider)[0] == COMMAND_LINE:
            section, name = effect.key.split(".")
            setattr(getattr(config, section), name, getattr(SECTIONS[section](), name))
        else:
            decision = f"{effect.decider} {_at(_resolved(config), effect.decider)}"
            message = f"has no effect with {decision}: {effect.reason}"
            problems += [Problem("", key, message) for key in overridden or [effect.key]]
    return problems


def _overridden_at(written: Node, key: str) -> list[str]:
    """The keys that the command line wrote, at or below one that is written."""
    node = written
    for name in key.split("."):
        assert isinstance(node.value, dict), key
        node = node.value[name]
    if node.where == COMMAND_LINE:
        return [key]
    below = node.value if isinstance(node.value, dict) else ()
    return [found for name in below for found in _overridden_at(written, f"{key}.{name}")]


def _checked(checks: Iterable[Check], config: Config, provisional: bool) -> Iterable[Problem]:
    """What the checks say. Defaults stand in for faulty settings, and then a check may stumble."""
    for check in checks:
        try:
            yield from check(config)
        except ConfigError as error:  # of another configuration that the check read
            yield from error.problems
        except Exception:
            if not provisional:
                raise


def _placed(problems: Iterable[Problem], written: Node, config: Config, faulty: set[str]) -> list[Problem]:
    """The problems with their place and text filled in, but for settings that are faulty anyway."""
    placed = []
    for problem in problems:
        if problem.key in faulty:
            continue
        if not problem.where:
            where, text = _origin(written, problem.key)
            if where == DEFAULT:
                value = _at(_resolved(config), problem.key)
                text = value if isinstance(value, str) else json.dumps(value)
            problem = dataclasses.replace(problem, where=where, value=text)
        placed.append(problem)
    return placed


def _origin(written: Node, key: str) -> tuple[str, str | None]:
    """Where a key was written, and how. What a mixer leaves at its default has the mixer's place."""
    node = written
    for depth, name in enumerate(key.split(".")):
        if not (isinstance(node.value, dict) and name in node.value):
            return (node.where, None) if depth > 2 else (DEFAULT, None)
        node = node.value[name]
    return node.where, node.text


def _resolved(config: Config) -> dict[str, Any]:
    return {name: _listed(dataclasses.asdict(getattr(config, name))) for name in SECTIONS}


def _listed(value: Any) -> Any:
    """Tuples as lists, as JSON and YAML know them."""
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _at(values: Any, key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    for part in key.split("."):
        if isinstance(values, list):
            values = values[int(part)]
        elif isinstance(values, dict) and part in values:
            values = values[part]
        else:
            return None
    return values


def _below(key: str, prefixes: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat
