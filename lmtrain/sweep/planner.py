"""From what a sweep file says to the runs of its plan."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from lmtrain.config import Config, ConfigError, Problem, Source, fingerprint
from lmtrain.config.problems import COMMAND_LINE, DEFAULT
from lmtrain.config.rules import broken_rules
from lmtrain.setup import FREE_TO_CHANGE
from lmtrain.sweep.budgets import Stage, stages
from lmtrain.sweep.cost import ModelCost, model_cost
from lmtrain.sweep.grid import allowed, combinations, constraint_problems
from lmtrain.sweep.match import Solved, solve, with_value
from lmtrain.sweep.plan import Plan
from lmtrain.sweep.runs import Run
from lmtrain.sweep.spec import Label, Setting, Spec, read_spec

NOT_HASHED = tuple(key for key in FREE_TO_CHANGE if key not in ("data.path", "data.skip", "eval"))
"""What a result does not depend on: which data are read and the protocol of evaluation do matter."""

MOST_TOLD = 12
"""Problems; one mistake may spoil a thousand runs."""


def make_plan(path_or_name: str, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a sweep file. ConfigError with every problem found."""
    return plan_of(read_spec(path_or_name, overrides))


def plan_of(spec: Spec) -> Plan:
    """The runs of a sweep. ConfigError with every problem found: of the configurations, constraints and matching; no
    run at all, two that are one, more than the budgets allow."""
    planner = _Planner(spec, Source.of(spec.base))
    runs = planner.runs()
    problems = [*dict.fromkeys(planner.problems), *constraint_problems(spec, planner.configs)]
    problems = problems or [*_twins(runs), *_over_budget(spec, runs)]
    if problems:
        more = len(problems) - MOST_TOLD
        rest = [Problem(spec.name, "and so on", f"{more} more of them")] if more > 0 else []
        raise ConfigError([*problems[:MOST_TOLD], *rest])
    # Seed by seed: a sweep that is cut short has compared everything once.
    order = {seed: place for place, seed in enumerate(spec.seeds)}
    return Plan(spec, tuple(sorted(runs, key=lambda run: order.get(run.config.run.seed, 0))))


@dataclass(frozen=True)
class _Combination:
    """What the runs of one combination have in common."""

    labels: dict[str, Label]
    words: tuple[str, ...]
    cost: ModelCost
    solved: Solved | None


@dataclass
class _Planner:
    """Makes runs of combinations; what is wrong with one is noted, and the others go on."""

    spec: Spec
    source: Source
    problems: list[Problem] = field(default_factory=list)
    configs: list[Config] = field(default_factory=list)
    loaded: dict[tuple[str, ...], Config] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """All runs, parents first."""
        found: list[Run] = []
        own = [setting for setting in self.spec.settings if setting.where == COMMAND_LINE]
        common = [setting for setting in self.spec.settings if setting.where != COMMAND_LINE]
        for chosen in combinations(self.spec):
            of_axes = [setting for choice in chosen.values() for setting in choice.settings]
            settings = [*common, *of_axes, *own]
            config = self._load(settings)
            if config is None:
                continue
            self.configs.append(config)
            labels = {name: choice.label for name, choice in chosen.items()}
            if allowed(self.spec, labels, config):
                try:
                    found += self._of_combination(config, settings, labels)
                except ValueError as error:
                    called = ", ".join(f"{name} {label}" for name, label in labels.items()) or "the run"
                    self.problems.append(Problem(self.spec.name, called, str(error)))
        return found

    def _of_combination(self, config: Config, settings: list[Setting], labels: dict[str, Label]) -> list[Run]:
        """The runs of one combination: of all seeds and budgets. ValueError if its cost cannot be matched, or its
        budgets leave no room."""
        match, solved = self.spec.match, None
        words = [setting.word for setting in settings]
        if match is not None:
            reference = self._load([*settings, *self.spec.reference])
            if reference is None:
                return []
            solved = solve(match, config, reference)
            config = with_value(config, match.solve, solved.value)
            words.append(f"{match.solve}={solved.value}")
            for problem in broken_rules(config, 1, set()):
                raise ValueError(f"{match.solve} {solved.value}: {problem.statement}")
        combination = _Combination(labels, tuple(words), model_cost(config), solved)
        found = stages(config, self.spec.tokens, self.spec.cooldown)
        runs: list[Run] = []
        for seed in self.spec.seeds or (None,):
            of_seed: list[Run] = []
            for stage in found:
                parent = None if stage.parent is None else of_seed[stage.parent]
                of_seed.append(self._run(combination, stage, seed, parent))
            runs += of_seed
        return runs

    def _run(self, of: _Combination, stage: Stage, seed: int | None, parent: Run | None) -> Run:
        config, axes, words = stage.config, dict(of.labels), [*of.words, *stage.changes]
        if self.spec.tokens and stage.tokens is not None:
            axes["tokens"] = stage.tokens
        if seed is not None:
            axes["seed"] = seed
            config, words = replace(config, run=replace(config.run, seed=seed)), [*words, f"run.seed={seed}"]
        name = self._name(axes) + (f"-trunk{config.train.steps}" if stage.tokens is None else "")
        parts = [fingerprint(config, NOT_HASHED), "" if parent is None else parent.hash, self.spec.evaluate or ""]
        digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return Run(
            name=name,
            hash=digest[:12],
            axes=axes,
            config=config,
            words=tuple(words),
            cost=of.cost,
            solved=of.solved,
            parent=parent,
            is_trunk=stage.tokens is None,
        )

    def _name(self, axes: dict[str, Label]) -> str:
        """Labels joined by -, those that are plain values behind what they are values of."""
        keyed = {axis.name for axis in self.spec.axes if axis.key is not None} | {"seed", "tokens"}
        parts = [f"{name.split('.')[-1]}{label}" if name in keyed else str(label) for name, label in axes.items()]
        return re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join(parts)) or self.spec.name

    def _load(self, settings: Iterable[Setting]) -> Config | None:
        """The configuration with these settings; None if something is wrong with it."""
        settings = tuple(settings)
        words = tuple(setting.word for setting in settings)
        if words not in self.loaded:
            try:
                self.loaded[words] = self.source.load(words)
            except ConfigError as error:
                self.problems += [_placed(problem, settings) for problem in error.problems]
                return None
        return self.loaded[words]


def _placed(problem: Problem, settings: tuple[Setting, ...]) -> Problem:
    """A problem at the place of the last setting that it may come from."""
    if problem.where not in (COMMAND_LINE, DEFAULT):
        return problem
    for setting in reversed(settings):
        if f"{problem.key}.".startswith(f"{setting.key}.") or f"{setting.key}.".startswith(f"{problem.key}."):
            return replace(problem, where=setting.where)
    return problem


def _twins(runs: list[Run]) -> list[Problem]:
    """No run at all; runs of the same name, or of the same configuration under two names."""
    if not runs:
        return [Problem("axes", "an empty grid", "the constraints rule out every combination")]
    names = Counter(run.name for run in runs)
    found = [
        Problem("axes", name, f"duplicate name, of {count} runs; give the values of the axes other labels")
        for name, count in names.items()
        if count > 1
    ]
    by_hash: dict[str, list[str]] = {}
    for run in runs:
        by_hash.setdefault(run.hash, []).append(run.name)
    for first, *others in by_hash.values():
        if set(others) - {first}:
            shown = ", ".join(others[:2]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")
            message = f"is the same configuration as {shown}"
            reason = "what one axis sets, another one, match or the command line sets again"
            found.append(Problem("axes", first, f"{message}: {reason}"))
    return found


def _over_budget(spec: Spec, runs: list[Run]) -> list[Problem]:
    """More runs, or more work, than the sweep allows itself."""
    found = []
    if spec.max_runs is not None and len(runs) > spec.max_runs:
        found.append(Problem(spec.name, "max_runs", f"{len(runs)} runs are {len(runs) - spec.max_runs} too many"))
    flops = sum(run.own_flops for run in runs)
    if spec.max_flops is not None and flops > spec.max_flops:
        found.append(Problem(spec.name, "max_flops", f"{flops:.3g} FLOPs are {flops / spec.max_flops:.2f} times that"))
    return found
