"""Rules that hold between settings. Each names the settings it reads; the first of them is to blame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from attention.divisors import nearest_divisors
from attention.mixer import MIXERS, nearest
from data.corpus import readers_of, reads
from data.mixture import MIXTURE
from data.order import read_ranges
from data.tasks import TASKS
from data.tokenizer import NAMES
from lmtrain.config.mixture import ingredients
from lmtrain.config.problems import Problem
from lmtrain.config.schema import Config
from lmtrain.deadline import seconds_of
from parallel.deepspeed_settings import deepspeed_settings


@dataclass(frozen=True)
class Rule:
    """keys: the settings it reads; check: (config, ranks) -> what is wrong, or None.

    ranks: those that read sequences of their own.
    """

    keys: tuple[str, ...]
    check: Callable[[Config, int], str | None]


@dataclass(frozen=True)
class Effect:
    """A setting that does nothing unless `decider` has a certain value."""

    key: str
    decider: str
    has_effect: Callable[[Config], bool]
    reason: str


def _read_by_the_corpus(setting: str) -> Callable[[Config], bool]:
    return lambda config: reads(config.data.corpus, setting)


EFFECTS = [
    Effect(
        "optimizer.decay",
        "optimizer.schedule",
        lambda c: c.optimizer.schedule == "wsd",
        "only the schedule wsd has a decay of its own length",
    ),
    Effect(
        "optimizer.final",
        "optimizer.schedule",
        lambda c: c.optimizer.schedule != "constant",
        "a constant schedule ends at the peak",
    ),
    *(
        Effect(f"data.{name}", "data.corpus", _read_by_the_corpus(name), f"it has one {readers_of(name)}")
        for name in ("path", "validation", "alphabet", "column", "subset", "split", "revision", "streaming")
    ),
    Effect("data.mixture", "data.corpus", lambda c: c.data.corpus == MIXTURE, "only a mixture has texts of its own"),
    Effect(
        "data.task",
        "data.corpus",
        lambda c: c.data.corpus in TASKS,
        f"only a synthetic task has such settings ({', '.join(TASKS)})",
    ),
    *(
        Effect(key, "data.corpus", lambda c: c.data.corpus not in TASKS, reason)
        for key, reason in {
            "data.tokenizer": "a synthetic task has tokens of its own",
            "data.documents": "each example of a synthetic task stands alone",
            "data.cache": "the examples of a synthetic task are made as they are read",
            "eval.context": "the examples of a synthetic task are scored whole",
            "eval.stride": "the examples of a synthetic task are scored whole",
        }.items()
    ),
    Effect(
        "data.vocab_size",
        "data.tokenizer",
        lambda c: c.data.tokenizer == "bpe",
        "only the tokenizer bpe is made of a size that can be chosen",
    ),
    *(
        Effect(key, "parallel.engine", lambda c: c.parallel.engine == "deepspeed", "only deepspeed knows it")
        for key in ("parallel.zero", "parallel.offload", "parallel.deepspeed")
    ),
]

RULES: list[Rule] = []
TASK_KEYS = ("data.corpus.", "data.task.", "data.seq_len.")


def rule(*keys: str) -> Callable[[Callable[[Config, int], str | None]], Callable[[Config, int], str | None]]:
    """Register a rule over `keys`."""

    def add(check: Callable[[Config, int], str | None]) -> Callable[[Config, int], str | None]:
        RULES.append(Rule(keys, check))
        return check

    return add


def broken_rules(config: Config, ranks: int, faulty: set[str]) -> Iterator[Problem]:
    """Every broken rule, but for those that read a setting already known to be wrong; ranks: processes that train."""
    readers = max(1, ranks // config.parallel.sequence) if "parallel.sequence" not in faulty else ranks
    for each in RULES:
        if not faulty.intersection(each.keys) and (message := each.check(config, readers)):
            yield Problem("", each.keys[0], message)
    if config.data.corpus in TASKS and not any(f"{key}.".startswith(TASK_KEYS) for key in faulty):
        for name, message in config.task.problems(config.data.seq_len):
            yield Problem("", f"data.task.{name}", message)
    if not faulty.intersection(("model", "model.pattern")):
        yield from _pattern_problems(config, faulty)


@rule("train.batch_tokens", "data.seq_len")
def _batch_of_whole_sequences(config: Config, ranks: int) -> str | None:
    tokens, unit = config.train.batch_tokens, config.data.seq_len * ranks
    if tokens % unit == 0:
        return None
    closest = max(1, (tokens + unit // 2) // unit) * unit
    return f"not a multiple of data.seq_len {config.data.seq_len} x ranks {ranks}; nearest: {closest}"


@rule("train.micro_batch", "train.batch_tokens", "data.seq_len")
def _whole_micro_batches(config: Config, ranks: int) -> str | None:
    sequences, rest = divmod(config.train.batch_tokens, config.data.seq_len * ranks)
    if config.train.micro_batch is None or rest or sequences % config.train.micro_batch == 0:
        return None
    near = ", ".join(map(str, nearest_divisors(sequences, config.train.micro_batch)))
    return (
        f"does not divide the {sequences} sequences of a step "
        f"(train.batch_tokens / data.seq_len / ranks {ranks}); nearest: {near}"
    )


@rule("eval.stride", "eval.context", "data.seq_len")
def _stride_within_context(config: Config, ranks: int) -> str | None:
    if config.eval_stride <= config.eval_context:
        return None
    return f"more than the context of {config.eval_context}: tokens between two windows would not be scored"


@rule("model.learned_positions", "data.seq_len", "eval.context")
def _positions_reach(config: Config, ranks: int) -> str | None:
    table = config.model.learned_positions
    if table is None:
        return None
    longer = [
        f"{key} {length}"
        for key, length in (("data.seq_len", config.data.seq_len), ("eval.context", config.eval.context))
        if length is not None and length > table
    ]
    return f"the position table is shorter than {' and '.join(longer)}" if longer else None


@rule("data.stream", "data.corpus", "model.learned_positions", "train.activation_checkpointing", "train.compile")
def _streams_go_on(config: Config, ranks: int) -> str | None:
    if not config.data.stream:
        return None
    if config.data.corpus in TASKS:
        return f"no example of {config.data.corpus} goes on from another: set it to false"
    if config.data.corpus == MIXTURE:
        return "the texts of a mixture do not go on from each other: set it to false"
    if config.model.learned_positions is not None:
        return "a stream runs out of the table of model.learned_positions; use rotary positions"
    if config.train.activation_checkpointing:
        return "carries states, which train.activation_checkpointing would read twice; use a smaller train.micro_batch"
    return "carries states, which train.compile does not know" if config.train.compile else None


@rule("parallel.sequence", "data.seq_len", "data.stream", "train.compile")
def _sequences_can_be_shared(config: Config, ranks: int) -> str | None:
    sequence = config.parallel.sequence
    if sequence == 1:
        return None
    if sequence > config.data.seq_len:
        return f"each rank needs a token at least of the {config.data.seq_len} of data.seq_len"
    if config.data.stream:
        return (
            "ranks that share sequences go on from each other, and data.stream from what was read before: set it to 1"
        )
    return (
        "train.compile does not know what ranks tell each other inside a layer: set it to 1"
        if config.train.compile
        else None
    )


@rule("model.vocab_size", "data.tokenizer", "data.corpus", "data.task")
def _vocabulary_is_held(config: Config, ranks: int) -> str | None:
    size, known = config.model.vocab_size, config.known_vocabulary
    if size is None or known is None or size >= known:
        return None
    whose = config.data.corpus if config.data.corpus in TASKS else "the tokenizer bytes"
    return f"less than the {known} tokens of {whose}"


@rule("data.skip", "data.stream")
def _skip_is_ranges(config: Config, ranks: int) -> str | None:
    if config.data.skip is not None and config.data.stream:
        return "the rows of data.stream read on, they leave nothing out: set it to null"
    try:
        read_ranges(config.data.skip)
    except ValueError as error:
        return str(error).removeprefix("data.skip: ")
    return None


@rule("train.max_time")
def _limit_is_a_time(config: Config, ranks: int) -> str | None:
    try:
        seconds_of(config.train.max_time or "1s")
    except ValueError as error:
        return str(error)
    return None


@rule("train.spikes", "parallel.engine", "data.stream")
def _spikes_can_be_met(config: Config, ranks: int) -> str | None:
    if config.train.spikes == "skip" and config.parallel.engine == "deepspeed":
        return "deepspeed skips only updates that are not finite; use log or rollback"
    if config.train.spikes == "rollback" and config.data.stream:
        return "the rows of data.stream read on, they leave nothing out behind a roll-back: use log or skip"
    return None


@rule("data.tokenizer")
def _tokenizer_is_known(config: Config, ranks: int) -> str | None:
    name = config.data.tokenizer
    if name in NAMES or "/" in name or name.endswith(".json"):
        return None
    return f"must be {', '.join(NAMES)} or the path of a tokenizer.json{nearest(name, list(NAMES))}"


@rule("optimizer.decay", "optimizer.warmup", "optimizer.schedule")
def _schedule_fits(config: Config, ranks: int) -> str | None:
    optimizer = config.optimizer
    if optimizer.schedule != "wsd" or optimizer.warmup + optimizer.decay <= 1:
        return None
    return f"together with optimizer.warmup {optimizer.warmup} more than all steps"


@rule("data.path", "data.corpus")
def _text_has_a_path(config: Config, ranks: int) -> str | None:
    needed = {"text": "the path of its files", "jsonl": "the path of its files", "hub": "the name of a dataset"}
    if config.data.path is not None or config.data.corpus not in needed:
        return None
    return f"the corpus {config.data.corpus} needs {needed[config.data.corpus]}"


@rule("data.mixture", "data.corpus")
def _mixture_is_told(config: Config, ranks: int) -> str | None:
    if config.data.corpus != MIXTURE:
        return None
    try:
        ingredients(config.data.mixture)
    except ValueError as error:
        return str(error)
    return None


@rule("data.validation")
def _validation_share(config: Config, ranks: int) -> str | None:
    try:
        share = float(config.data.validation)
    except ValueError:
        return None  # the path of a text, or the name of a split
    return None if 0 < share < 1 else "must be a share > 0 and < 1, or the path of a text"


@rule("parallel.engine", "train.dtype", "train.compile", "optimizer.kind")
def _deepspeed_can(config: Config, ranks: int) -> str | None:
    if config.parallel.engine != "deepspeed":
        return None
    found = {
        "train.dtype float16 (it has no loss scale here; use bfloat16 or float32)": config.train.dtype == "float16",
        "train.compile (its hooks on the layers break the graph)": config.train.compile,
        "optimizer.kind muon (it sees vectors cut from the matrices; use adamw)": config.optimizer.kind == "muon",
    }
    wrong = " or ".join(what for what, is_set in found.items() if is_set)
    return f"does not work with {wrong}; or use the engine torch" if wrong else None


@rule("parallel.deepspeed", "parallel.zero", "parallel.offload", "train.clip")
def _deepspeed_settings_add(config: Config, ranks: int) -> str | None:
    if config.parallel.engine != "deepspeed":
        return None
    try:
        deepspeed_settings(
            stage=config.parallel.zero,
            clip=config.train.clip,
            offload=config.parallel.offload,
            extra=config.parallel.deepspeed,
        )
    except ValueError as error:
        return str(error)
    return None


def _pattern_problems(config: Config, faulty: set[str]) -> Iterator[Problem]:
    """Of a pattern: malformed words, words without a definition; and settings of the mixers it uses."""
    defined = list(config.model.mixers)
    words = config.model.pattern.split()
    if not words:
        yield Problem("", "model.pattern", f"must name the mixer of each layer ({_listing(defined)})")
    for word in dict.fromkeys(words):
        names = word.split("+")
        if not all(names):
            yield Problem("", "model.pattern", f"{word} is malformed; side by side is a+b")
        elif len(set(names)) < len(names):
            yield Problem("", "model.pattern", f"{word} names a mixer twice; define it under two names")
    for name in dict.fromkeys(filter(None, (name for word in words for name in word.split("+")))):
        if _is_faulty(f"model.mixers.{name}", faulty):
            continue
        if name in config.model.mixers:
            yield from _mixer_problems(config, name) if "model.dim" not in faulty else ()
        else:
            message = f"{name} is not defined under model.mixers{nearest(name, defined)}"
            yield Problem("", "model.pattern", f"{message} ({_listing(defined)})")


def _is_faulty(key: str, faulty: set[str]) -> bool:
    """Whether the mixer at `key`, or all of model.mixers, is known to be wrong."""
    return any(fault == "model.mixers" or f"{fault}.".startswith(f"{key}.") for fault in faulty)


def _mixer_problems(config: Config, name: str) -> Iterator[Problem]:
    settings = dict(config.model.mixers[name])
    kind = MIXERS[settings.pop("kind")]
    chosen = kind.Config(**settings)
    found = chosen.problems(config.model.dim)
    for setting, message in found:
        yield Problem("", f"model.mixers.{name}.{setting}", message)
    if found or not (config.data.stream or config.data.documents == "reset" or config.parallel.sequence > 1):
        return
    with torch.device("meta"):
        mixer = kind.of(config.model.dim, chosen)
    if config.parallel.sequence > 1 and mixer.sequence_parallel is None:
        yield Problem("", "parallel.sequence", f"model.mixers.{name} cannot share a sequence among ranks: set it to 1")
    if mixer.causality == "strict":
        return
    where, instead = f"model.mixers.{name} sees all at once", "or a selection that is strict"
    if config.data.documents == "reset":
        message = f"reset cannot keep apart documents of which {where}; use concatenate, {instead}"
        yield Problem("", "data.documents", message)
    if config.data.stream:
        message = f"carries nothing from a segment of which {where} to the next; use false, {instead}"
        yield Problem("", "data.stream", message)


def _listing(defined: list[str]) -> str:
    return ", ".join(defined) or "none is defined"
