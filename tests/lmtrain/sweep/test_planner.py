"""Plans: which runs a sweep file makes, what they cost, and every mistake in it."""

import itertools
from pathlib import Path

import pytest
import yaml

from attention.mixer import MIXERS
from lmtrain.config import ConfigError, fingerprint, load
from lmtrain.schedule import learning_rate
from lmtrain.sweep.planner import NOT_HASHED, make_plan
from lmtrain.sweep.spec import shipped_sweeps
from tests.lmtrain import tiny

SWEEP = {
    "base": "tiny.yaml",
    "axes": {
        "mixer": {
            "dense": {"model.mixers.far": {"kind": "dense", "heads": 2}, "model.pattern": "far"},
            "local": {"model.mixers.far": {"kind": "local", "heads": 2, "window": 4}, "model.pattern": "far"},
        },
        "width": {"model.dim": [16, 32]},
        "optimizer.lr": ["1e-3", "2e-3"],
    },
}
MATCH = {
    "equal": "flops",
    "solve": "model.ffn_dim",
    "reference": {"model.mixers.far": {"kind": "dense", "heads": 2}, "model.ffn_dim": None},
}


def written(folder: Path, **changes) -> str:
    """SWEEP with changes (None: without that part) in a file."""
    tiny.write(folder)
    content = {name: part for name, part in (SWEEP | changes).items() if part is not None}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def plan(folder: Path, *overrides: str, **changes):
    return make_plan(written(folder, **changes), [f"data.path={folder}/text.txt", *overrides])


def told(folder: Path, *overrides: str, **changes) -> str:
    with pytest.raises(ConfigError) as error:
        plan(folder, *overrides, **changes)
    return str(error.value)


def test_every_combination_is_a_run(tmp_path: Path) -> None:
    runs = plan(tmp_path, seeds=[3, 4]).runs
    expected = itertools.product([3, 4], ["dense", "local"], [16, 32], [1e-3, 2e-3])
    found = [(run.axes["seed"], run.axes["mixer"], run.axes["width"], run.axes["optimizer.lr"]) for run in runs]
    assert found == list(expected)  # the first seed first
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        kind = run.config.model.mixers["far"]["kind"]
        found = (run.config.run.seed, kind, run.config.model.dim, run.config.optimizer.lr)
        assert found == tuple(run.axes[name] for name in ("seed", "mixer", "width", "optimizer.lr"))


def test_what_is_planned_is_what_the_words_say(tmp_path: Path) -> None:
    """The configuration of a plan was changed by hand; the words are what `lmtrain train` gets."""
    whole = plan(tmp_path, match=MATCH, seeds=[1, 2], tokens=[2560, 5120], cooldown=0.2)
    for run in whole.runs:
        words = load(tmp_path / "tiny.yaml", run.words)
        assert fingerprint(words, NOT_HASHED) == fingerprint(run.config, NOT_HASHED)


def test_the_hash_is_of_what_a_result_depends_on(tmp_path: Path) -> None:
    def hashes(*overrides: str) -> list[str]:
        return [run.hash for run in plan(tmp_path, *overrides).runs]

    first = hashes()
    for same in ("train.threads=3", "train.micro_batch=1", "log.every=3", "checkpoint.every=5", "data.cache=/x"):
        assert hashes(same) == first
    for other in ("train.steps=13", "data.path=elsewhere", "eval.context=16", "model.dropout=0"):
        assert not set(hashes(other)) & set(first)


def test_constraints_rule_out_what_they_compare(tmp_path: Path) -> None:
    def kept(*constraints: str) -> set[tuple]:
        return {(r.axes["mixer"], r.axes["width"]) for r in plan(tmp_path, constraints=list(constraints)).runs}

    assert kept() == {("dense", 16), ("dense", 32), ("local", 16), ("local", 32)}
    assert kept("width < 32") == kept("model.dim <= 16") == {("dense", 16), ("local", 16)}
    assert kept("mixer != dense") == {("local", 16), ("local", 32)}
    assert kept("model.mixers.far.window < 4") == {("dense", 16), ("dense", 32)}  # dense has no window
    assert kept("width > model.mixers.far.heads", "width == 32", "mixer == dense") == {("dense", 32)}


def test_forks_share_a_trunk_whose_rate_is_theirs(tmp_path: Path) -> None:
    settings = {"optimizer.warmup": 0.1}
    whole = plan(
        tmp_path, tokens=[2560, 5120, 12800], cooldown=0.25, axes={"mixer": SWEEP["axes"]["mixer"]}, settings=settings
    )
    for mixer in ("dense", "local"):
        runs = [run for run in whole.runs if run.axes["mixer"] == mixer]
        forks = [run for run in runs if not run.is_trunk]
        assert [run.axes["tokens"] for run in forks] == [run.tokens for run in forks] == [2560, 5120, 12800]
        assert {run.group for run in runs} == {runs[0].name}
        longest = forks[-1].config
        for fork in forks:
            steps = fork.config.train.steps
            assert fork.begins == fork.parent.config.train.steps == steps - round(0.25 * steps)
            alone = [learning_rate(step, steps, fork.config.optimizer) for step in range(steps)]
            line = []  # as it is trained: by the parts of the trunk, then by the fork
            for part in lineage(fork):
                end = part.config.train.steps
                line += [learning_rate(step, end, part.config.optimizer) for step in range(part.begins, end)]
            assert line == pytest.approx(alone)
            assert alone[: fork.begins] == pytest.approx(
                [learning_rate(step, longest.train.steps, longest.optimizer) for step in range(fork.begins)]
            )
            assert alone[-1] < alone[fork.begins - 1]
        assert sum(run.own_flops for run in runs) < sum(run.flops for run in forks)


def lineage(run) -> list:
    """The run and its ancestors, the oldest first."""
    return [*(lineage(run.parent) if run.parent is not None else []), run]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "nothing.yaml"}, "nothing.yaml: no such file"),
        ({"base": None}, "base: missing"),
        ({"sedes": [1]}, "did you mean seeds?"),
        ({"axes": {"width": {"model.dimm": [16]}}}, "model.dimm: no such setting of model; did you mean dim?"),
        ({"axes": {"width": [16, 32]}}, "values of which setting? width: {section.key: [..]}"),
        ({"axes": {"width": {"model.dim": []}}}, "an empty grid"),
        ({"axes": {"mixer": {}}}, "an empty grid"),
        ({"axes": {"width": {"model.dim": [16, 16]}}}, "16 stands there twice"),
        ({"axes": {"mixer": {"a b": {"train.steps": 3}, "a_b": {"train.steps": 4}}}}, "a_b: duplicate name, of 2 runs"),
        ({"axes": {"mixer": {"a": {"train.steps": 3}, "b": {"train.steps": 3}}}}, "a: is the same configuration as b"),
        ({"axes": {"seed": {"run.seed": [1]}}}, "write seeds: [..] beside axes"),
        ({"axes": {"x": {"run.dir": ["a"]}}}, "each run has a folder in that of the sweep"),
        ({"constraints": ["width > 64"]}, "an empty grid: the constraints rule out every combination"),
        ({"constraints": ["size > 64"]}, "size is no axis (mixer, width, optimizer.lr), nor a setting of any run"),
        ({"constraints": ["width"]}, "width is no comparison"),
        ({"constraints": ["__import__('os') == 1"]}, "is no comparison"),
        ({"constraints": ["model.ffn_dim < 9"], "match": MATCH}, "bound it by match.least and match.most"),
        ({"match": MATCH | {"most": 3}}, "at match.most 3 flops are"),
        ({"match": MATCH | {"equal": "heads"}}, "match.equal: must be flops or parameters or state"),
        ({"match": {"equal": "flops"}}, "match.solve: missing"),
        ({"match": MATCH | {"solve": "model.widthh"}}, "match.solve model.widthh: no such setting"),
        ({"match": MATCH | {"solve": "model.dim"}, "constraints": ["mixer == local"]}, "set head_dim"),
        ({"seeds": [1, 1]}, "seeds: 1 stands there twice"),
        ({"seeds": []}, "must be a list of whole numbers, not empty"),
        ({"tokens": [100.5]}, "must be whole numbers >= 1"),
        ({"tokens": [128, 130]}, "two of them are 1 steps"),
        ({"tokens": [128, 2560], "cooldown": 0.2}, "leave no room"),
        ({"cooldown": 0.2}, "give tokens"),
        ({"max_runs": 3}, "8 runs are 5 too many"),
        ({"max_flops": 1e3}, "times that"),
    ],
)
def test_each_mistake_in_words(tmp_path: Path, changes: dict, words: str) -> None:
    assert words in told(tmp_path, **changes)


def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path) -> None:
    axes = {"width": {"model.dimm": [16]}, "rate": {"optimizer.lr": [-1]}}
    message = told(tmp_path, axes=axes, settings={"train.stepz": 3})
    for words in (
        "model.dimm: no",
        "optimizer.lr=-1: must be > 0",
        "train.stepz: no",
        "3 problems; nothing was started.",
    ):
        assert words in message
    assert message.count("sweep.yaml:") == 3
    message = told(tmp_path, seeds=["x"], cooldown=3, axes={"width": 3}, constraints="width")
    for words in (
        "seeds=x: must be a number",
        "cooldown: must be a share",
        "axes.width=3",
        "constraints: must be a list",
    ):
        assert words in message


def test_one_mistake_in_a_thousand_runs_is_told_once(tmp_path: Path) -> None:
    axes = {"width": {"model.dim": list(range(16, 160, 4))}, "rate": {"optimizer.lr": [1e-3, 2e-3]}}
    message = told(tmp_path, axes=axes, settings={"model.mixers.far.windows": 3})
    assert message.count("far.windows") == 1
    assert "1 problem" in message


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    runs = plan(tmp_path, "train.steps=7", settings={"train.steps": 5}, axes={"mixer": SWEEP["axes"]["mixer"]}).runs
    assert {run.config.train.steps for run in runs} == {7}
    assert "write seeds" in told(tmp_path, "run.seed=3")


def test_a_match_in_large_steps_is_not_called_equal(tmp_path: Path) -> None:
    """A layer of width costs a few percent here, one of 16 columns much more."""
    whole = plan(tmp_path, match=MATCH | {"multiple": 16})
    far = [run for run in whole.runs if run.solved.residual < -0.01]
    text = whole.format(1e10, "assumed")
    assert 0 < len(far) < len(whole.runs)
    assert f"not equal: {len(far)} runs" in text
    assert sum(line.rstrip().endswith("!") for line in text.splitlines()) == len(far)


@pytest.mark.parametrize("name", shipped_sweeps())
def test_shipped_sweeps_cost_the_same_for_all(name: str) -> None:
    whole = make_plan(name, ["data.path=x"])
    text = whole.format(1e10, "assumed")
    assert all(run.name in text and run.hash in text for run in whole.runs)
    assert not whole.far_off
    assert "not equal" not in text
    for run in whole.runs:
        assert -0.01 < run.solved.residual <= 0
    if name == "enwik8-mixers":
        assert len(whole.runs) == 12 * 3
        kinds = {s["kind"] for run in whole.runs for n, s in run.config.model.mixers.items() if n == "far"}
        assert kinds == set(MIXERS)
        assert len({(run.config.data.seq_len, run.tokens) for run in whole.runs}) == 1
    if name == "sparsity":
        assert {run.sparsity for run in whole.runs} == {2, 8, 32, 64}
        assert len({run.tokens for run in whole.runs if not run.is_trunk}) >= 4  # or there is no law
