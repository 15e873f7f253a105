"""What `load` gives: names, files, defaults, overrides, derived values; saving and reading back."""

import dataclasses
from pathlib import Path

import pytest

from attention.divisors import divisors, largest_divisor, nearest_divisors
from attention.mixer import MIXERS
from lmtrain.config import (
    SECTIONS,
    SHIPPED,
    Config,
    ConfigError,
    ModelConfig,
    differences,
    load,
    reload,
    save,
    shipped_configs,
    to_dict,
)
from tests.documents import loadable_configs

SMALL = """\
data: {corpus: stdlib, seq_len: 64}
train: {batch_tokens: 256}
model:
  dim: 32
  mixers:
    near: {kind: local, heads: 2, window: 8}
    far: {kind: dense, heads: 2}
  pattern: near far
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("name", loadable_configs())
def test_every_shipped_config_loads_and_survives_saving(name: str, tmp_path: Path) -> None:
    config = load(name)
    assert config.run.dir == f"runs/{name.replace('/', '-')}"
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_the_promised_configs_are_shipped() -> None:
    assert {"demo", "shakespeare", "enwik8/dense", "enwik8/local"} <= set(shipped_configs())


@pytest.mark.parametrize("name", ["demo", "shakespeare"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=20", "data.seq_len=256", "train.batch_tokens=1024"],
        ["data.seq_len=4096", "train.batch_tokens=8192"],
        ["data.seq_len=256", "train.batch_tokens=1024", "eval.context=128", "eval.stride=32"],
        ["data.corpus=stdlib", "data.tokenizer=bytes"],
        ["data.corpus=enwik8", "data.path=enwik8", "data.tokenizer=bytes"],
        ["data.corpus=text", "data.path=book.txt", "data.validation=other.txt"],
        ["train.dtype=bfloat16", "train.micro_batch=1", "train.clip=0", "train.threads=1"],
        ["eval.every=0", "checkpoint.every=5", "checkpoint.keep=1"],
    ],
)
def test_the_two_promised_configs_bear_overrides(name: str, overrides: list[str]) -> None:
    config = load(name, overrides)
    assert config.batch_sequences % config.micro_batch() == 0


def test_the_leak_experiments_differ_in_their_mixer_only() -> None:
    names = [name for name in shipped_configs() if name.startswith("leak/")]
    assert len(names) == 7
    loaded = {name: load(name) for name in loadable_configs("leak/")}
    assert {"leak/dense", "leak/mosa", "leak/mosa-paper", "leak/routing", "leak/routing-paper"} <= set(loaded)
    for name, config in loaded.items():
        changed = {key.rsplit(".", 1)[0] for key, _, _ in differences(loaded["leak/dense"], config)}
        assert changed <= {"run", "model.mixers.it"}, name
        selection = config.model.mixers["it"].get("selection", "strict")
        assert selection == ("paper" if name.endswith("-paper") else "strict"), name


def test_shakespeare_is_the_setting_of_nanogpt() -> None:
    config = load("shakespeare")
    assert (config.batch_sequences, config.data.seq_len, config.train.steps) == (12, 64, 2000)
    assert config.optimizer.warmup * config.train.steps == 100
    assert config.model.learned_positions == 64
    assert config.model.mixers["all"]["rotary"] == 0
    assert config.model.vocab_size is None  # the characters of a text that has not been read


def test_a_path_or_a_name(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("demo").data.seq_len == 2048
    assert load(small).run.dir == "runs/small"
    (tmp_path / "demo").write_text(SMALL)
    assert load("demo").data.seq_len == 64  # a file of that name comes first


def test_names_of_shipped_files_given_by_path() -> None:
    assert load(SHIPPED / "enwik8" / "local.yaml").run.dir == "runs/enwik8-local"


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"demos.*did you mean demo\?.*enwik8/local"):
        load("demos")
    with pytest.raises(ConfigError, match=r"did you mean demo\?"):
        load("configs/demo.yml")
    for hopeless in ("", "\0", "a" * 5000, "/", "configs"):
        with pytest.raises(ConfigError):
            load(hopeless)


def test_settings_are_filled_in(small: Path) -> None:
    config = load(small)
    assert config.model.mixers == {
        "near": {"kind": "local", **dataclasses.asdict(MIXERS["local"].Config(heads=2, window=8))},
        "far": {"kind": "dense", **dataclasses.asdict(MIXERS["dense"].Config(heads=2))},
    }
    assert config.model.vocab_size == 256
    assert config.optimizer.betas == (0.9, 0.95)


def test_overrides_and_the_last_of_two(small: Path) -> None:
    config = load(small, ["train.steps=5", "model.dim=64", "train.steps=7", "optimizer={lr: 0.5, eps: 1e-6}"])
    assert (config.train.steps, config.model.dim) == (7, 64)
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (0.5, 1e-6, 0.1)


def test_overrides_of_mixers(small: Path) -> None:
    def near(*overrides: str) -> dict:
        return load(small, overrides).model.mixers["near"]

    assert near("model.mixers.near.window=64")["window"] == 64
    assert near("model.mixers.near={kind: dense}")["kind"] == "dense"
    assert near("model.mixers.near={kind: dense}", "model.mixers.near={kind: local, window: 3}")["window"] == 3
    assert near("model.mixers.near={kind: local}", "model.mixers.near.window=4")["window"] == 4
    assert near("model.mixers.near={kind: local}")["heads"] == 8  # replaced: back to the default
    config = load(small, ["model.mixers={new: {kind: dense, heads: 4}}", "model.pattern=new+near far"])
    assert list(config.model.mixers) == ["near", "far", "new"]


def test_a_new_kind_does_not_silently_drop_settings(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"small.yaml:6  model.mixers.near.window: no such setting of dense"):
        load(small, ["model.mixers.near.kind=dense"])


def test_derived_values(small: Path) -> None:
    config = load(small)
    assert (config.eval_context, config.eval_stride) == (64, 64)
    config = load(small, ["eval.context=32"])
    assert (config.eval_context, config.eval_stride) == (32, 32)
    assert load(small, ["eval.context=32", "eval.stride=4"]).eval_stride == 4


@pytest.mark.parametrize(
    ("batch", "seq_len", "ranks", "expected"),
    [
        (768, 64, 1, 12),  # all of it fits in 16,384 tokens
        (65536, 1024, 1, 16),
        (24 * 1024, 1024, 1, 12),  # 24 sequences, at most 16
        (7 * 8192, 8192, 1, 1),  # at most 2, which does not divide 7
        (2 * 65536, 65536, 1, 1),  # one sequence is more than 16,384 tokens
        (65536, 1024, 8, 8),
    ],
)
def test_derived_micro_batch(batch: int, seq_len: int, ranks: int, expected: int, small: Path) -> None:
    config = load(small, [f"train.batch_tokens={batch}", f"data.seq_len={seq_len}"], ranks=ranks)
    assert config.micro_batch(ranks) == expected
    assert load(small, ["train.micro_batch=2"]).micro_batch() == 2


def test_derived_width_of_the_feed_forward_layer() -> None:
    assert ModelConfig(dim=256).hidden == 704  # 8/3 * 256 = 682.7
    assert ModelConfig(dim=24).hidden == 64
    assert ModelConfig(dim=128, ffn="gelu").hidden == 512
    assert ModelConfig(dim=128, ffn_dim=100).hidden == 100


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 1024])
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert largest_divisor(number, number) == number


def test_nearest_divisors() -> None:
    assert nearest_divisors(12, 5) == [4, 6]
    assert nearest_divisors(12, 20) == [12]


def test_a_setting_of_the_file_made_idle_by_an_override_goes_back_to_its_default(tmp_path: Path) -> None:
    path = tmp_path / "wsd.yaml"
    path.write_text(SMALL + "optimizer: {schedule: wsd, decay: 0.5}\n")
    assert load(path).optimizer.decay == 0.5
    assert load(path, ["optimizer.schedule=cosine"]).optimizer.decay == 0.2


def test_saved_settings_read_back_equal(small: Path, tmp_path: Path) -> None:
    overrides = ["run.dir=010", "optimizer.schedule=constant", "model.init_std=2e-2", "data.cache=on"]
    config = load(small, overrides)
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config
    assert load(tmp_path / "config.yaml", ["optimizer.schedule=wsd"]).optimizer.decay == 0.2


def test_settings_of_deepspeed_are_read_as_json_would(small: Path, tmp_path: Path) -> None:
    overrides = [
        "parallel.engine=deepspeed",
        "parallel.deepspeed={a: true, b: 1e9, c: 0.5, d: auto, e: null, f: [1, x], g: {h: false}}",
        "parallel.deepspeed.g.i={j: 2}",
    ]
    config = load(small, overrides)
    expected = {
        "a": True,
        "b": 10**9,
        "c": 0.5,
        "d": "auto",
        "e": None,
        "f": [1, "x"],
        "g": {"h": False, "i": {"j": 2}},
    }
    assert config.parallel.deepspeed == expected
    assert type(config.parallel.deepspeed["b"]) is int
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_reload_follows_a_run_that_moved(small: Path, tmp_path: Path) -> None:
    for name in ("old", "new ${place}"):
        folder = tmp_path / name
        folder.mkdir()
        save(load(small), folder / "config.yaml")
        config = reload(folder, ["train.steps=3"])
        assert config.run.dir == str(folder)
        assert config.train.steps == 3
        assert differences(load(small), config, ["run.dir"]) == [("train.steps", 1000, 3)]
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        reload(tmp_path)


def test_differences(small: Path) -> None:
    old = load(small)
    new = load(small, ["model.mixers.near={kind: dense, heads: 2}", "train.steps=3", "log.every=3"])
    assert differences(old, old) == []
    assert differences(old, new, ["log", "run"]) == [
        ("train.steps", 1000, 3),
        ("model.mixers.near.kind", "local", "dense"),
        ("model.mixers.near.window", 8, None),
    ]
    assert differences(old, new, ["log", "model.mix", "model.mixers"]) == [("train.steps", 1000, 3)]


def test_to_dict_is_plain_and_complete(small: Path) -> None:
    values = to_dict(load(small))
    assert list(values) == list(SECTIONS) == [f.name for f in dataclasses.fields(Config)][:-1]
    assert values["optimizer"]["betas"] == [0.9, 0.95]
