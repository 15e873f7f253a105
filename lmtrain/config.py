"""Configuration: a YAML file and `key=value` overrides become a checked `Config`, or every problem is told at once.

    config = load("demo", ["train.steps=20", "model.mixers.near={kind: local, window: 64}"])

The schema is in `config_schema`, the reading of text in `config_reader` and `config_values`, rules between settings
in `config_rules`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import attention  # noqa: F401 - importing it registers the mixers
from attention.mixer import MIXERS, nearest
from lmtrain.config_reader import Node, interpolate, override, read_yaml
from lmtrain.config_rules import EFFECTS, MIXER_NAME, Effect, broken_rules
from lmtrain.config_schema import (
    BYTE_VOCABULARY,
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
from lmtrain.config_values import hints_of, range_problem, read_value
from lmtrain.problems import COMMAND_LINE, DEFAULT, ConfigError, Problem

__all__ = [
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
    "TrainConfig",
    "differences",
    "load",
    "reload",
    "save",
    "shipped_configs",
    "to_dict",
]

Check = Callable[[Config], Iterable[Problem]]

SHIPPED = Path(__file__).resolve().parent.parent / "configs"
"""Beside this package, in a checkout and in an installed wheel alike. Not `importlib.resources.files("configs")`: a
folder `configs` of the user's own, wherever Python was started, would come first."""

SECTIONS: dict[str, type[Any]] = {
    name: hint for name, hint in hints_of(Config).items() if dataclasses.is_dataclass(hint)
}


def load(
    path_or_name: str | Path, overrides: Sequence[str] = (), *, checks: Iterable[Check] = (), ranks: int = 1
) -> Config:
    """The configuration of a YAML file, or of a shipped one by name (`demo`, `enwik8/local`), with overrides.

    checks: further conditions, `Config -> problems`; they run together with all others, so that for example
    missing files are told at once with misspelt keys. ranks: processes that share a batch.
    Raises ConfigError with every problem found.
    """
    path, name = _find(path_or_name)
    tree, problems = _read_file(path, overrides)
    return _build(tree, problems, f"runs/{name}", checks, ranks)


def reload(
    run_dir: str | Path, overrides: Sequence[str] = (), *, checks: Iterable[Check] = (), ranks: int = 1
) -> Config:
    """The configuration saved in a run's folder, wherever that folder is now. Raises ConfigError."""
    path = Path(run_dir) / "config.yaml"
    if not os.path.isfile(path):
        raise ConfigError(
            [Problem(COMMAND_LINE, str(run_dir), "is not the folder of a run: it has no config.yaml")]
        )
    tree, problems = _read_file(path, overrides)
    if isinstance(tree.value, dict) and isinstance(
        run := tree.value.get("run", Node({}, str(path))).value, dict
    ):
        run["dir"] = Node(str(run_dir), COMMAND_LINE)
    return _build(tree, problems, str(run_dir), checks, ranks)


def save(config: Config, path: str | Path) -> None:
    """Write the configuration as YAML that `load` reads back to an equal one.

    Defaults are filled in, `${...}` stays as it was written, settings without effect are left out.
    """
    values = to_dict(config)
    for effect in EFFECTS:
        if not effect.has_effect(config):
            section, name = effect.key.split(".")
            del values[section][name]
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def to_dict(config: Config) -> dict[str, Any]:
    """Sections as plain dictionaries, for JSON and YAML. `${...}` stays as it was written: it may hide a secret."""
    values = _resolved_dict(config)
    for key, (text, value) in config.interpolations.items():
        *above, last = key.split(".")
        container: Any = values
        for part in above:
            container = container[int(part)] if isinstance(container, list) else container[part]
        index: Any = int(last) if isinstance(container, list) else last
        if container[index] == value:
            container[index] = text
    return values


def differences(old: Config, new: Config, ignore: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each setting that differs, but for keys at or below those of `ignore`."""
    before, after = _flat(_resolved_dict(old)), _flat(_resolved_dict(new))
    told_before, told_after = _flat(to_dict(old)), _flat(to_dict(new))
    return [
        (key, told_before.get(key, before.get(key)), told_after.get(key, after.get(key)))
        for key in before | after
        if before.get(key) != after.get(key)
        and not any(f"{key}.".startswith(f"{prefix}.") for prefix in ignore)
    ]


def shipped_configs() -> list[str]:
    """Names of the configurations that come with lmtrain."""
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml"))


def _find(path_or_name: str | Path) -> tuple[Path, str]:
    """The file, and the name that its runs get by default. An existing file comes before a shipped name."""
    path, text = Path(path_or_name), str(path_or_name)
    if not os.path.isfile(path):
        names = shipped_configs()
        if text not in names:
            message = f"no such file, nor a shipped configuration{nearest(text, names)} ({', '.join(names)})"
            raise ConfigError([Problem(COMMAND_LINE, text, message)])
        path = SHIPPED / f"{text}.yaml"
    if path.resolve().is_relative_to(SHIPPED):
        return path, path.resolve().relative_to(SHIPPED).with_suffix("").as_posix().replace("/", "-")
    return path, path.stem


def _read_file(path: Path, overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(shown, "file", f"cannot be read: {error}")]) from None
    tree, problems = read_yaml(text, shown)
    for each in overrides:
        try:
            override(tree, each, _is_group, _is_mapping)
        except ValueError as error:
            key, _, value = each.partition("=")
            problems.append(Problem(COMMAND_LINE, key, str(error), value or None))
    return tree, problems


def _is_group(path: list[str]) -> bool:
    return len(path) == 1 or path == ["model", "mixers"]


def _is_mapping(path: list[str]) -> bool:
    return _is_group(path) or path[:-1] == ["model", "mixers"]


def _build(tree: Node, problems: list[Problem], run_dir: str, checks: Iterable[Check], ranks: int) -> Config:
    """Read all values; then let every rule and check speak that does not depend on a faulty one."""
    written = tree
    tree, texts, failed = interpolate(tree, _resolved_dict(Config()))
    problems += failed
    config = _read_config(tree, problems, faulty={problem.key for problem in failed})
    config.run.dir = config.run.dir or run_dir
    faulty = {problem.key for problem in problems}
    problems += _without_effect(config, written, faulty)
    if config.model.vocab_size is None and config.data.tokenizer == "bytes":
        config.model.vocab_size = BYTE_VOCABULARY
    found = list(broken_rules(config, ranks, faulty))
    found += _checked(checks, config, provisional=bool(problems or found))
    problems += [_placed(problem, written, config) for problem in found if problem.key not in faulty]
    if problems:
        raise ConfigError(problems)
    values = _resolved_dict(config)
    config.interpolations = {key: (text, _at(values, key)) for key, text in texts.items()}
    return config


def _read_config(tree: Node, problems: list[Problem], faulty: set[str]) -> Config:
    """The configuration with the default in place of each faulty setting."""
    sections = {}
    assert isinstance(tree.value, dict)
    for name, node in tree.value.items():
        if name not in SECTIONS:
            problems.append(Problem(node.where, name, _unknown_section(name), node.text))
        elif isinstance(node.value, dict):
            sections[name] = SECTIONS[name](
                **_read_settings(node.value, SECTIONS[name], name, name, problems, faulty)
            )
        elif node.value is not None:
            problems.append(Problem(node.where, name, "must be a mapping of settings", node.text))
    return Config(**sections)


def _read_settings(
    nodes: dict[str, Node],
    settings: type[Any],
    path: str,
    owner: str,
    problems: list[Problem],
    faulty: set[str],
) -> dict[str, Any]:
    """The values of the settings that are right; what is wrong with the others goes to `problems`."""
    fields = {f.name: f for f in dataclasses.fields(settings)}
    values: dict[str, Any] = {}
    for name, node in nodes.items():
        key = f"{path}.{name}"
        if key in faulty:
            continue
        if name not in fields:
            problems.append(Problem(node.where, key, _unknown_setting(name, owner, list(fields)), node.text))
        elif key == "model.mixers":
            values[name] = _read_mixers(node, problems, faulty)
        else:
            try:
                value = read_value(node, hints_of(settings)[name])
            except ValueError as error:
                problems.append(Problem(node.where, key, str(error), node.text))
                continue
            if message := range_problem(fields[name], value):
                problems.append(Problem(node.where, key, message, node.text))
            else:
                values[name] = value
    return values


def _read_mixers(node: Node, problems: list[Problem], faulty: set[str]) -> dict[str, dict[str, Any]]:
    """name -> {kind, and all its settings}; a mixer of unknown kind is left out."""
    if not isinstance(node.value, dict):
        problems.append(
            Problem(node.where, "model.mixers", "must be a mapping, name: {kind: ...}", node.text)
        )
        return {}
    mixers = {}
    for name, mixer in node.value.items():
        key = f"model.mixers.{name}"
        if key in faulty:
            continue
        if not MIXER_NAME.fullmatch(name):
            problems.append(Problem(mixer.where, key, "a name is made of letters, digits, _ and -"))
        elif not isinstance(mixer.value, dict):
            problems.append(
                Problem(mixer.where, key, "must be a mapping, {kind: ..., and its settings}", mixer.text)
            )
        elif read := _read_mixer(mixer.value, key, mixer.where, problems, faulty):
            mixers[name] = read
    return mixers


def _read_mixer(
    nodes: dict[str, Node], key: str, where: str, problems: list[Problem], faulty: set[str]
) -> dict[str, Any] | None:
    kinds = sorted(MIXERS)
    kind = nodes.get("kind")
    if kind is None:
        problems.append(Problem(where, f"{key}.kind", f"missing ({', '.join(kinds)})"))
    elif not isinstance(kind.value, str):
        problems.append(Problem(kind.where, f"{key}.kind", f"must be one of {', '.join(kinds)}", kind.text))
    elif kind.value not in MIXERS:
        message = f"no such mixer{nearest(kind.value, kinds)} ({', '.join(kinds)})"
        problems.append(Problem(kind.where, f"{key}.kind", message, kind.value))
    else:
        settings = {name: node for name, node in nodes.items() if name != "kind"}
        config = MIXERS[kind.value].Config
        values = _read_settings(settings, config, key, kind.value, problems, faulty)
        return {"kind": kind.value} | dataclasses.asdict(config(**values))
    return None


def _unknown_section(name: str) -> str:
    return f"no such section{nearest(name, list(SECTIONS)) or _elsewhere(name)} ({', '.join(SECTIONS)})"


def _unknown_setting(name: str, owner: str, names: list[str]) -> str:
    return f"no such setting of {owner}{nearest(name, names) or _elsewhere(name)} ({', '.join(names)})"


def _elsewhere(name: str) -> str:
    """`; did you mean optimizer.lr?` for a setting written in the wrong place."""
    keys = [f"{s}.{f.name}" for s, section in SECTIONS.items() for f in dataclasses.fields(section)]
    same = [key for key in keys if key.endswith(f".{name}")]
    return f"; did you mean {' or '.join(same)}?" if same else nearest(name, keys)


def _without_effect(config: Config, written: Node, faulty: set[str]) -> list[Problem]:
    """Settings that do nothing. One in a file, made idle by the command line, goes back to its default instead."""
    problems = []
    for effect in EFFECTS:
        where, text = _origin(written, effect.key)
        if where == DEFAULT or effect.has_effect(config) or faulty.intersection((effect.key, effect.decider)):
            continue
        if where != COMMAND_LINE and _origin(written, effect.decider)[0] == COMMAND_LINE:
            _set_default(config, effect)
        else:
            decision = f"{effect.decider} {_at(_resolved_dict(config), effect.decider)}"
            problems.append(
                Problem(where, effect.key, f"has no effect with {decision}: {effect.reason}", text)
            )
    return problems


def _set_default(config: Config, effect: Effect) -> None:
    section, name = effect.key.split(".")
    setattr(getattr(config, section), name, getattr(SECTIONS[section](), name))


def _checked(checks: Iterable[Check], config: Config, provisional: bool) -> list[Problem]:
    """What the checks say. While settings are faulty, defaults stand in for them, and a check may stumble there."""
    found: list[Problem] = []
    for check in checks:
        try:
            found += check(config)
        except Exception:
            if not provisional:
                raise
    return found


def _placed(problem: Problem, written: Node, config: Config) -> Problem:
    """The problem with its place and its text, if it does not know them."""
    if problem.where:
        return problem
    where, text = _origin(written, problem.key)
    if where == DEFAULT:
        value = _at(_resolved_dict(config), problem.key)
        text = (
            None if isinstance(value, dict) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
        )
    return dataclasses.replace(problem, where=where, value=text)


def _origin(written: Node, key: str) -> tuple[str, str | None]:
    """Where a key was written, and how; for a setting of a mixer that was left to its default, the mixer's place."""
    node, parts = written, key.split(".")
    for depth, name in enumerate(parts):
        if not (isinstance(node.value, dict) and name in node.value):
            return (node.where, None) if depth > 2 else (DEFAULT, None)
        node = node.value[name]
    return node.where, node.text


def _resolved_dict(config: Config) -> dict[str, Any]:
    return {name: _listed(dataclasses.asdict(getattr(config, name))) for name in SECTIONS}


def _listed(value: Any) -> Any:
    """Tuples as lists, as JSON and YAML know them."""
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(values, list):
            values = values[int(part)]
        elif isinstance(values, dict) and part in values:
            values = values[part]
        else:
            return None
    return values


def _flat(values: Any, above: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {above: values}
    return {
        key: item
        for name, value in values.items()
        for key, item in _flat(value, f"{above}.{name}" if above else name).items()
    }
