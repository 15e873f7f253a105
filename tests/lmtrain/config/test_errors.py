"""What a user is told: the form of the block, every rule, and everything at once."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmtrain.config import Config, ConfigError, Problem, load
from lmtrain.setup import check_device

BASE = """\
data:
  corpus: stdlib
  seq_len: 512
train:
  batch_tokens: 2048
model:
  dim: 64
  mixers:
    near: {kind: local, heads: 4, window: 32}
    far:
      kind: dense
      heads: 4
  pattern: near far
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def problems(path: Path, *overrides: str, **more: object) -> list[str]:
    """The lines that a user sees, without the folder of `base.yaml` and without alignment."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides, **more)
    *lines, last = str(error.value).replace(f"{path.parent}/", "").split("\n")
    plural = "problem" if len(lines) == 1 else "problems"
    assert last == f"{len(lines)} {plural}; nothing was started."
    assert len(error.value.problems) == len(lines)
    return [re.sub("  +", "  ", line) for line in lines]


def test_the_block_of_two_problems(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base.write_text(BASE.replace("window", "windoww"))
    with pytest.raises(ConfigError) as error:
        load("base.yaml", ["train.batch_tokens=1000"])
    assert str(error.value) == (
        "base.yaml:9   model.mixers.near.windoww: no such setting of local; did you mean window? "
        "(heads, kv_heads, head_dim, rotary, window)\n"
        "command line  train.batch_tokens=1000: not a multiple of data.seq_len 512 x ranks 1; nearest: 1024\n"
        "2 problems; nothing was started."
    )


@pytest.mark.fault(15)
def test_everything_at_once_in_the_order_of_the_file(base: Path) -> None:
    base.write_text(BASE.replace("corpus: stdlib", "corpus: stdlb").replace("heads: 4\n", "heads: 3\n") + "eval: 3\n")
    lines = problems(base, "train.steps=0", "model.pattern=near far fra")
    assert [line.split()[0] for line in lines[:3]] == ["base.yaml:2", "base.yaml:12", "base.yaml:14"]
    assert all(line.startswith("command line  ") for line in lines[3:])
    assert len(lines) == 5


DEEPSPEED = ["parallel.engine=deepspeed"]
RULES = [
    (["trian.steps=3"], "trian.steps: no such section: trian; did you mean train?"),
    (["train.step=3"], "train.step: no such setting of train; did you mean steps?"),
    (["train.lr=3"], "train.lr: no such setting of train; did you mean optimizer.lr?"),
    (["run.seed=-1"], "run.seed=-1: must be >= 0"),
    (["data.seq_len=0"], "data.seq_len=0: must be >= 1"),
    (["train.steps=0"], "train.steps=0: must be >= 1"),
    (["train.clip=-1"], "train.clip=-1: must be >= 0"),
    (["train.threads=0"], "train.threads=0: must be >= 1"),
    (["train.max_skips=0"], "train.max_skips=0: must be >= 1"),
    (["optimizer.lr=0"], "optimizer.lr=0: must be > 0"),
    (["optimizer.betas=[0.9, 1]"], "optimizer.betas=[0.9, 1]: each must be >= 0 and < 1"),
    (["optimizer.eps=0"], "optimizer.eps=0: must be > 0"),
    (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay=-0.1: must be >= 0"),
    (["optimizer.warmup=1.1"], "optimizer.warmup=1.1: must be >= 0 and <= 1"),
    (["optimizer.final=2"], "optimizer.final=2: must be >= 0 and <= 1"),
    (["log.every=0"], "log.every=0: must be >= 1"),
    (["eval.every=-1"], "eval.every=-1: must be >= 0"),
    (["eval.tokens=0"], "eval.tokens=0: must be >= 1"),
    (["checkpoint.every=0"], "checkpoint.every=0: must be >= 1"),
    (["checkpoint.keep=0"], "checkpoint.keep=0: must be >= 1"),
    (["model.dim=0"], "model.dim=0: must be >= 1"),
    (["model.layers=0"], "model.layers=0: must be >= 1"),
    (["model.dropout=1"], "model.dropout=1: must be >= 0 and < 1"),
    (["model.init_std=0"], "model.init_std=0: must be > 0"),
    (["model.mixers.near.window=0"], "model.mixers.near.window=0: must be >= 1"),
    (["parallel.engine=deepsped"], "parallel.engine=deepsped: must be"),
    (["parallel.zero=3"], "parallel.zero=3: has no effect with parallel.engine torch: only deepspeed knows it"),
    (["parallel.offload=true"], "parallel.offload=true: has no effect with parallel.engine torch"),
    (["parallel.deepspeed={a: 1}"], "parallel.deepspeed: has no effect with parallel.engine torch"),
    ([*DEEPSPEED, "parallel.zero=0"], "parallel.zero=0: must be >= 1 and <= 3"),
    ([*DEEPSPEED, "parallel.zero=4"], "parallel.zero=4: must be >= 1 and <= 3"),
    ([*DEEPSPEED, "train.dtype=float16"], "parallel.engine=deepspeed: does not work with train.dtype float16"),
    ([*DEEPSPEED, "train.compile=true"], "parallel.engine=deepspeed: does not work with train.compile"),
    ([*DEEPSPEED, "optimizer.kind=muon"], "parallel.engine=deepspeed: does not work with optimizer.kind muon"),
    ([*DEEPSPEED, "train.compile=true", "optimizer.kind=muon"], "does not work with train.compile (its hooks"),
    ([*DEEPSPEED, "train.compile=true", "optimizer.kind=muon"], "or optimizer.kind muon (it sees"),
    ([*DEEPSPEED, "parallel.deepspeed=3"], "parallel.deepspeed=3: must be a mapping, {name: value}"),
    (
        [*DEEPSPEED, "parallel.deepspeed={bf16: {enabled: true}, gradient_clipping: 1}"],
        "parallel.deepspeed: bf16.enabled is decided by train.dtype; gradient_clipping is decided by train.clip",
    ),
    (["train.batch_tokens=1000"], "not a multiple of data.seq_len 512 x ranks 1; nearest: 1024"),
    (["train.batch_tokens=100"], "nearest: 512"),
    (["train.batch_tokens=1279"], "nearest: 1024"),
    (["train.micro_batch=3"], "train.micro_batch=3: does not divide the 4 sequences of a step"),
    (["train.micro_batch=3"], "nearest: 2, 4"),
    (["train.micro_batch=8"], "nearest: 4"),
    (["eval.stride=513"], "eval.stride=513: more than the context of 512"),
    (["eval.context=64", "eval.stride=65"], "eval.stride=65: more than the context of 64"),
    (["model.learned_positions=500"], "the position table is shorter than data.seq_len 512"),
    (["model.learned_positions=512", "eval.context=513"], "shorter than eval.context 513"),
    (["data.skip=5:3"], "data.skip=5:3: '5:3' must be two samples first:last, first < last"),
    (["data.skip=0:5", "data.stream=true"], "data.skip=0:5: the rows of data.stream read on"),
    (
        ["data.tokenizer=byte"],
        "data.tokenizer=byte: must be bytes, characters, bpe or the path of a tokenizer.json; did",
    ),
    (["data.vocab_size=300"], "only the tokenizer bpe is made of a size that can be chosen"),
    (["model.vocab_size=255"], "model.vocab_size=255: less than the 256 tokens of the tokenizer bytes"),
    (["optimizer.schedule=wsd", "optimizer.decay=0.7", "optimizer.warmup=0.5"], "more than all steps"),
    (["optimizer.decay=0.2"], "optimizer.decay=0.2: has no effect with optimizer.schedule cosine"),
    (["optimizer.schedule=constant", "optimizer.final=0.1"], "optimizer.final=0.1: has no effect"),
    (["data.path=x"], "data.path=x: has no effect with data.corpus stdlib: it has one on text, jsonl, hub, "),
    (["data.column=body"], "data.column=body: has no effect with data.corpus stdlib: it has one on jsonl, hub"),
    (
        ["data.task.pairs=3"],
        "data.task: has no effect with data.corpus stdlib: only a synthetic task has such settings",
    ),
    (["data.streaming=true"], "data.streaming=true: has no effect with data.corpus stdlib"),
    (["data.corpus=jsonl"], "default  data.path=null: the corpus jsonl needs the path of its files"),
    (["data.corpus=hub"], "default  data.path=null: the corpus hub needs the name of a dataset"),
    (
        ["data.corpus=enwik8", "data.validation=0.2"],
        "data.validation=0.2: has no effect with data.corpus enwik8",
    ),
    (["data.corpus=text"], "default  data.path=null: the corpus text needs the path of its files"),
    (["data.validation=1.5"], "data.validation=1.5: must be a share > 0 and < 1, or the path of a text"),
    (["data.validation=nan"], "data.validation=nan: must be a share"),
    (["model.pattern= "], "model.pattern= : must name the mixer of each layer (near, far)"),
    (["model.pattern=near++far"], "near++far is malformed"),
    (["model.pattern=near+"], "near+ is malformed"),
    (["model.pattern=far near+near"], "near+near names a mixer twice"),
    (["model.pattern=near faar"], "faar is not defined under model.mixers; did you mean far? (near, far)"),
    (["model.mixers.near.kind=lokal"], "no such mixer; did you mean local? ("),
    (["model.mixers.new={heads: 4}"], "model.mixers.new.kind: missing ("),
    (["model.mixers.values={kind: dense}"], "model.mixers.values: values is taken"),
    (["model.mixers.a-b={kind: dense}"], "model.mixers.a-b: the name of a mixer is made of letters, digits"),
    (["model.mixers.near.heads=3"], "heads 3 does not divide dim 64"),
    (["model.mixers.far.kv_heads=3"], "model.mixers.far.kv_heads=3: kv_heads 3 does not divide heads 4"),
]


@pytest.mark.fault(15)
@pytest.mark.parametrize(("overrides", "expected"), RULES, ids=[f"{o[-1]}" for o, _ in RULES])
def test_every_rule(overrides: list[str], expected: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (line,) = problems(base, *overrides)
    assert expected in line


def test_float16_trains_on_a_gpu_only_but_is_read_anywhere(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert load(base, ["train.dtype=float16"]).train.dtype == "float16"
    with pytest.raises(ConfigError, match=r"train\.dtype=float16: needs a CUDA device"):
        load(base, ["train.dtype=float16"], checks=[check_device])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    load(base, ["train.dtype=float16"], checks=[check_device])


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.pattern=near"],  # a mixer that is left out is no mistake,
        ["model.pattern=near", "model.mixers.far.heads=7"],  # nor does it have to fit the width
        ["model.layers=1"],  # the pattern is longer
        ["model.mixers.near.window=100000"],  # a window is longer than the sequence
        ["optimizer.warmup=0"],
        ["optimizer.warmup=1"],
        ["train.clip=0"],
        [*DEEPSPEED, "parallel.zero=3", "train.dtype=bfloat16", "train.activation_checkpointing=true"],
        [*DEEPSPEED, "parallel.offload=true", "train.clip=0"],
    ],
)
def test_what_is_no_mistake(overrides: list[str], base: Path) -> None:
    load(base, overrides)


def test_ranks_share_the_batch(base: Path) -> None:
    load(base, ranks=4)
    (line,) = problems(base, ranks=3)
    assert line == ("base.yaml:5  train.batch_tokens=2048: not a multiple of data.seq_len 512 x ranks 3; nearest: 1536")
    (line,) = problems(base, "train.micro_batch=4", ranks=2)
    assert "does not divide the 2 sequences of a step" in line


def test_a_faulty_setting_does_not_raise_others(base: Path) -> None:
    (line,) = problems(base, "data.seq_len=51x2", "train.micro_batch=3")
    assert "data.seq_len=51x2" in line
    (line,) = problems(base, "model.mixers.near.kind=x")
    assert "model.mixers.near.kind" in line
    (line,) = problems(base, "model.dim=x", "model.mixers.near.heads=3")
    assert "model.dim" in line
    base.write_text("model: 3\n")
    assert problems(base) == ["base.yaml:1  model=3: must be a mapping of settings"]


def test_a_mixer_default_has_the_place_of_its_mixer(base: Path) -> None:
    base.write_text(BASE.replace("      heads: 4\n", ""))
    (line,) = problems(base, "model.dim=60", "model.mixers.near.heads=6")
    assert line.startswith("base.yaml:10  model.mixers.far.heads: heads 8 does not divide dim 60")


MIXERS_THAT_CHOOSE = """\
    few: {kind: mosa, keep: 0}
    first: {kind: mosa, keep: 1}
    ring:
      kind: routing
      clusters: 0
      window: -1
      decay: 1.5
      commitment: -0.1
    heads: {kind: moh, heads: 4, shared_heads: 1, active_heads: 4, balance: -1}
    more: {kind: moh, heads: 4, shared_heads: 1, active_heads: 4}
"""


def test_mixers_that_choose_are_checked_all_at_once(base: Path) -> None:
    """Numbers out of range first, each in its line; what does not fit together in mixers without such."""
    text = BASE.replace("  pattern: near far\n", MIXERS_THAT_CHOOSE + "  pattern: near few+first ring heads more\n")
    base.write_text(text)
    assert problems(base) == [
        "base.yaml:13  model.mixers.few.keep=0: must be >= 1",
        "base.yaml:14  model.mixers.first.keep=1: keep 1 must be >= 2 while include_first is true; or set it to false",
        "base.yaml:17  model.mixers.ring.clusters=0: must be >= 1",
        "base.yaml:18  model.mixers.ring.window=-1: must be >= 1",
        "base.yaml:19  model.mixers.ring.decay=1.5: must be >= 0 and < 1",
        "base.yaml:20  model.mixers.ring.commitment=-0.1: must be >= 0",
        "base.yaml:21  model.mixers.heads.balance=-1: must be >= 0",
        "base.yaml:22  model.mixers.more.active_heads=4: active_heads 4 exceeds heads - shared_heads = 3; nearest: 3",
    ]


@pytest.mark.parametrize("kind", ["mosa", "routing"])
def test_what_sees_a_whole_row_takes_no_packed_documents(kind: str, base: Path) -> None:
    mixer = f"model.mixers.far={{kind: {kind}, heads: 4, selection: paper}}"
    assert problems(base, mixer, "data.documents=reset") == [
        "command line  data.documents=reset: reset cannot keep apart documents of which model.mixers.far sees all at "
        "once; use concatenate, or a selection that is strict"
    ]
    load(base, [mixer])
    load(base, [mixer, "data.documents=reset", "model.pattern=near"])
    load(base, [mixer.replace("paper", "strict"), "data.documents=reset"])


def test_checks_speak_together_with_the_rest(base: Path) -> None:
    def missing(config: Config) -> Iterator[Problem]:
        yield Problem("", "data.corpus", f"nothing called {config.data.corpus} is here")
        yield Problem("", "train.steps", "said by the check")

    lines = problems(base, "model.layer=3", "train.steps=x", checks=[missing])
    assert lines[0] == "base.yaml:2  data.corpus=stdlib: nothing called stdlib is here"
    assert len(lines) == 3  # what a check says of a faulty setting comes of its default: left out
    lines = problems(base, checks=[missing])
    assert lines[1] == "default  train.steps=1000: said by the check"


def test_a_check_may_stumble_only_over_a_faulty_configuration(base: Path) -> None:
    def stumbling(config: Config) -> list[Problem]:
        raise RuntimeError("a defect of ours")

    assert len(problems(base, "train.steps=x", checks=[stumbling])) == 1
    with pytest.raises(RuntimeError, match="a defect of ours"):
        load(base, checks=[stumbling])


def test_a_check_may_read_another_configuration(base: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("train: {steps: x}\n")
    lines = problems(base, "train.clip=x", checks=[lambda _: load(tmp_path / "other.yaml") and []])
    assert lines[0] == "other.yaml:1  train.steps=x: must be a whole number"
    assert len(lines) == 3


def test_long_and_odd_values_stay_on_their_line(base: Path) -> None:
    (line,) = problems(base, f"train.steps={'9' * 5000}")
    assert len(line) < 200
    (line,) = problems(base, "train.steps=a\nb\x1b")
    assert r"a\nb\x1b" in line
    base.write_text(BASE + '"tr\\nain": 3\n')
    (line,) = problems(base)
    assert r"tr\nain: no such section" in line


def test_the_error_can_cross_processes(base: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(base, ["train.steps=x"])
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.fault(15)
def test_nothing_is_created(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problems(base, "train.steps=x", "run.dir=here")
    load(base, ["run.dir=here"])
    assert [path.name for path in tmp_path.iterdir()] == ["base.yaml"]
