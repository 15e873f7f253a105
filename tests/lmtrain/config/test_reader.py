"""Reading: interpolations, secrets, what YAML may not contain, overrides that cannot be."""

import json
from pathlib import Path

import pytest

from lmtrain.config import ConfigError, differences, load, save, to_dict

BASE = "model: {mixers: {a: {kind: dense}}, pattern: a}\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "written.yaml"
    path.write_text(text)
    return path


def test_interpolations(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "1e2")
    config = load(
        base,
        [
            "train.steps=${oc.env:STEPS}",
            "model.learned_positions=${data.seq_len}",  # the default of the other
            "eval.context=${model.learned_positions}",
            "run.dir=out/${data.seq_len}/${run.seed}",
            "data.cache=${run.dir}/cache",
            "train.micro_batch=${eval.stride}",  # null
            "model.tied=${log.tensorboard}",
            "optimizer.betas=[0.5, ${optimizer.decay}]",
            "log.every=${oc.env:NOT_SET,5}",
        ],
    )
    assert (config.train.steps, config.model.learned_positions, config.eval.context) == (100, 1024, 1024)
    assert config.data.cache == "out/1024/1337/cache"
    assert (config.train.micro_batch, config.model.tied, config.log.every) == (None, True, 5)
    assert config.optimizer.betas == (0.5, 0.2)


def test_interpolated_default_of_the_run_folder(base: Path) -> None:
    assert load(base, ["data.cache=${run.dir}/cache"]).data.cache == "runs/base/cache"


def test_interpolated_mixer(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model:\n  pattern: a b\n  mixers:\n    a: {kind: local, window: 16}\n    b: ${model.mixers.a}\n",
    )
    config = load(path)
    assert config.model.mixers["a"] == config.model.mixers["b"]
    save(config, tmp_path / "saved.yaml")
    assert "b: ${model.mixers.a}" in (tmp_path / "saved.yaml").read_text()
    assert load(tmp_path / "saved.yaml", ["model.mixers.a.window=32"]).model.mixers["b"]["window"] == 32
    with pytest.raises(ConfigError, match=r"model\.mixers\.b is \$\{model\.mixers\.a\} .*nothing below it"):
        load(path, ["model.mixers.b.window=3"])


@pytest.mark.parametrize(
    "text",
    [
        "${",
        "${}",
        "${nothing.here}",
        "${run.dir}",
        "${oc.env:NOT_SET}",
        "${magic:1}",
        "x${data.seq_len",
        "${a b}",
    ],
)
def test_interpolations_that_cannot_be(text: str, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"command line  run\.dir=.*cannot be filled in") as error:
        load(base, [f"run.dir={text}", "train.steps=0"])
    assert "train.steps=0: must be >= 1" in str(error.value)  # the others are checked as well
    assert "2 problems" in str(error.value)


def test_an_escaped_interpolation_is_text(base: Path, tmp_path: Path) -> None:
    config = load(base, [r"run.dir=out/\${x}"])
    assert config.run.dir == "out/${x}"
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config


def test_a_secret_is_not_written_and_not_shown(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    config = load(base, ["data.cache=${oc.env:TOKEN}/x", "data.path=${data.cache}", "data.corpus=text"])
    assert config.data.path == "s3cret/x"
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config
    shown = [(tmp_path / "saved.yaml").read_text(), json.dumps(to_dict(config))]
    shown.append(str(differences(config, load(base))))
    for key in ("train.steps", "train.dtype", "optimizer.betas", "train", "model.mixers.a.heads"):
        with pytest.raises(ConfigError) as error:
            load(base, [f"{key}=${{oc.env:TOKEN}}", "train.nothing=1"])
        shown.append(str(error.value))
    assert not any("s3cret" in text for text in shown)
    assert "${oc.env:TOKEN}" in shown[0]


def test_a_value_changed_after_loading_is_saved_as_it_is(base: Path, tmp_path: Path) -> None:
    config = load(base, ["model.learned_positions=${data.seq_len}"])
    config.model.learned_positions = 5000
    assert to_dict(config)["model"]["learned_positions"] == 5000


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", 3, r"train\.steps: written twice, first at .*:2"),
        ("train: {}\nmodel: {}\ntrain: {}\n", 3, r"train: written twice, first at .*:1"),
        ("run:\n  dir: !!python/object/apply:os.system [ls]\n", 2, "tags are not read"),
        ("run:\n  dir: !!python/name:os.system\n", 2, "tags are not read"),
        ("run:\n  seed: !!int '3'\n", 2, "tags are not read"),
        ("run: &x {seed: 3}\n", 1, "anchors and aliases"),
        ("run:\n  seed: *x\n", 2, "anchors and aliases"),
        ("run:\n\tseed: 3\n", 2, "cannot start any token"),
        ("run: {seed: 3\n", 2, "expected"),
        ("- run\n", 1, "must be a mapping of sections"),
        ("run\n", 1, "must be a mapping of sections"),
        ("run: {}\n---\nrun: {}\n", 2, "another document"),
        ("a: " + "[" * 1000 + "]" * 1000, 1, "nested too deeply"),
        ("? [a]\n: 1\n", 1, "not a word"),
        ("run:\n  <<: {seed: 3}\n", 2, r"run\.<<: no such setting"),
    ],
)
def test_forms_of_yaml_that_are_refused(text: str, line: int, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"written\.yaml:{line} .*{message}"):
        load(path)


@pytest.mark.fault(16)
def test_a_tag_executes_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    text = f"run:\n  dir: !!python/object/apply:os.mkdir [{victim}]\n"
    for attempt in (lambda: load(write(tmp_path, text)), lambda: load("demo", [f"run={text[5:]}"])):
        with pytest.raises(ConfigError):
            attempt()
    assert not victim.exists()


@pytest.mark.fault(15)
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"run: \x00", b"a: \x1b", "run: {seed: 3}".encode("utf-16")])
def test_files_that_are_no_text(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"binary\.yaml.*readable"):
        load(path)


def test_an_empty_file_and_empty_sections_are_defaults(tmp_path: Path) -> None:
    overrides = ["model.mixers.a={kind: dense}", "model.pattern=a"]
    expected = load(write(tmp_path, ""), overrides)
    assert load(write(tmp_path, "# nothing\nrun:\ntrain:\n"), overrides) == expected
    assert load(write(tmp_path, "\ufeffmodel:\n"), overrides) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write key=value"),
        ("=3", "write key=value"),
        ("train.steps.x=3", "must be a whole number, not a mapping"),
        ("model.pattern.x=3", r"model\.pattern is a .*nothing below it"),
        ("train=3", "must be a mapping"),
        ("train=null", "must be a mapping"),
        ("model.mixers=a", "must be a mapping"),
        ("model.mixers.a=dense", "must be a mapping"),
        ("model.mixers.a={kind: local", "not readable as YAML"),
        ("model.mixers.a={kind: local, kind: dense}", "kind: written twice"),
        ("model.mixers.a={kind: !!str local}", "tags are not read"),
        ("model.mixers.a b={kind: local}", "made of letters"),
        ("model..dim=3", "no such setting"),
        (".=3", "no such section"),
    ],
)
def test_overrides_that_cannot_be(override: str, message: str, base: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(base, [override])
    assert str(error.value).endswith("\n1 problem; nothing was started.")
