"""From a configuration to the parts of a run: device, data, model, engine. And what can be known to fail before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.corpus import CORPORA, DEFAULT_VALIDATION, Corpus, load_corpus
from data.document import Split
from data.loader import Batches, Loader
from data.mixture import MIXTURE, Mixture, mix_datasets
from data.order import Ranges, StreamOrder, read_ranges
from data.shards import TokenDataset, prepare
from data.tasks import TASKS, TaskDataset, TaskLoader
from data.tokenizer import Tokenizer
from data.vocabulary import corpus_tokenizer
from lmtrain import checkpoint
from lmtrain.config import Config, OptimizerConfig, differences, reload
from lmtrain.config.mixture import ingredients
from lmtrain.config.problems import Problem
from lmtrain.model import DecoderLM
from lmtrain.optimizer import build_optimizer, torch_adamw
from parallel.deepspeed import DeepSpeedEngine
from parallel.engine import Engine, TorchEngine
from parallel.world import ALONE, World, launched

FREE_TO_CHANGE = (
    "run.dir", "data.path", "data.streaming", "data.cache", "data.skip", "train.threads", "train.micro_batch",
    "train.max_time", "train.max_skips", "train.max_rollbacks", "train.spikes", "train.spike_limit",
    "log", "eval", "checkpoint", "parallel",
)  # fmt: skip
"""Settings that a run may be resumed with at another value: what is learnt does not depend on them, but for rounding
(that the data are the same is checked by their fingerprint); and those that are there to be changed when a run is in
trouble: data.skip, and what is done about spikes."""


@dataclass(frozen=True)
class Data:
    """The tokens of a run, of texts or of a synthetic task, and the tokenizer that made them.

    validation: of each text that trains. notes: what one should know of the texts, a sentence each.
    """

    tokenizer: Tokenizer
    train: TokenDataset | TaskDataset
    validation: tuple[TokenDataset | TaskDataset, ...]
    notes: tuple[str, ...] = ()


def run_folder(config: Config) -> Path:
    """run.dir, which loading a configuration fills in."""
    assert config.run.dir is not None
    return Path(config.run.dir).expanduser()


def build_data(config: Config) -> Data:
    """Read and tokenize what the configuration names, or take it from the cache. ValueError if it cannot be."""
    if config.data.corpus in TASKS:
        train = TaskDataset(config.task, "train", config.data.seq_len, config.run.seed)
        return Data(train.tokenizer, train, (TaskDataset(config.task, "validation", config.data.seq_len),))
    if config.data.corpus == MIXTURE:
        return _build_mixture(config)
    (corpus,) = corpora = list(read_texts(config).values())
    tokenizer = make_tokenizer(config, corpora)
    text, held_out = (prepare(corpus, split, tokenizer, config.data.cache) for split in ("train", "validation"))
    return Data(tokenizer, text, (held_out,), corpus.notes)


def _build_mixture(config: Config) -> Data:
    """The texts of a mixture: one training text with the tokenizer of all, a validation text of each."""
    texts = ingredients(config.data.mixture)
    corpora = read_texts(config)
    tokenizer = make_tokenizer(config, list(corpora.values()))
    parts, held_out = (
        [prepare(corpus, split, tokenizer, config.data.cache) for corpus in corpora.values()]
        for split in ("train", "validation")
    )
    called = (name if corpus.name == name else f"{name} ({corpus.name})" for name, corpus in corpora.items())
    validation = tuple(replace(dataset, corpus=name) for name, dataset in zip(called, held_out, strict=True))
    notes = (f"{name}: {note}" for name, corpus in corpora.items() for note in corpus.notes)
    return Data(tokenizer, mix_datasets(parts, [text.weight for text in texts.values()]), validation, tuple(notes))


def read_texts(config: Config) -> dict[str, Corpus]:
    """The corpus of the configuration by its name; of a mixture all its texts by theirs. ValueError names the text."""
    if config.data.corpus != MIXTURE:
        return {config.data.corpus: read_corpus(config)}
    return {name: _read_text(config, name) for name in ingredients(config.data.mixture)}


def make_tokenizer(config: Config, corpora: Sequence[Corpus]) -> Tokenizer:
    """The tokenizer of data.tokenizer for what trains of these corpora together."""
    together = corpora[0]
    if len(corpora) > 1:
        documents = (document for corpus in corpora for document in corpus.split("train").documents)
        together = Corpus(MIXTURE, {"train": Split(tuple(documents))})
    return corpus_tokenizer(config.data.tokenizer, together, config.data.vocab_size, config.data.cache)


def _read_text(config: Config, name: str) -> Corpus:
    """A text of the mixture. ValueError names it."""
    try:
        return read_corpus(config, name)
    except ValueError as error:
        raise ValueError(f"data.mixture.{name}: {error}") from error


def read_split(config: Config, tokenizer: Tokenizer, on: str | None, path: str | None) -> TokenDataset:
    """The text to score: `corpus[:split]`, else the run's own validation split; tokenized as the run's text was.

    path: the file of that corpus, by default the run's own if the corpus is. ValueError if it cannot be read.
    """
    name, _, split = (on or config.data.corpus).partition(":")
    return prepare(read_corpus(config, name, path), split or "validation", tokenizer, config.data.cache)


def read_corpus(config: Config, name: str | None = None, path: str | None = None) -> Corpus:
    """The corpus of the configuration, a text of its mixture or another corpus, by name.

    path: other files of it, of which the default share validates. ValueError if it cannot be read.
    """
    name = name or config.data.corpus
    texts = ingredients(config.data.mixture) if config.data.corpus == MIXTURE else {}
    settings: dict[str, Any] = {}
    if name in texts:
        name, settings = texts[name].corpus, dict(texts[name].settings)
    elif name == MIXTURE:
        raise ValueError(f"data.corpus: a mixture is no text, name one of its own: {', '.join(texts) or 'it has none'}")
    elif name == config.data.corpus:
        settings = {setting: getattr(config.data, setting) for setting in CORPORA[name].settings}
    if path is not None:
        settings |= {"path": path, "validation": DEFAULT_VALIDATION}
    return load_corpus(name, **settings, cache=config.data.cache)


def read_task(config: Config, tokenizer: Tokenizer, on: str | None) -> TaskDataset | None:
    """The task to score, `task[:split]`, else the run's own validation split; None if that is a text.

    The run's own task has the run's settings, another one its defaults. ValueError for a split that tasks do not have,
    or if the model reads other tokens than those of the task.
    """
    name, _, split = (on or config.data.corpus).partition(":")
    if name not in TASKS:
        return None
    task = config.task if name == config.data.corpus else TASKS[name]()
    if task.tokenizer.name != tokenizer.name:
        raise ValueError(f"--on {name}: its tokens are {task.tokenizer.name}, those of this model {tokenizer.name}")
    if task.vocab_size > tokenizer.vocab_size:
        raise ValueError(f"--on {name}: has {task.vocab_size} tokens, the model knows {tokenizer.vocab_size}")
    return TaskDataset(task, split or "validation", config.data.seq_len)


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with model.vocab_size filled in from the tokenizer if it was left open."""
    if config.model.vocab_size is not None:
        return config
    return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))


def build_model(config: Config, device: torch.device) -> DecoderLM:
    """The model with fresh weights drawn from run.seed, in float32."""
    torch.manual_seed(config.run.seed)
    model = DecoderLM(config.model).to(device)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


def build_engine(config: Config, model: DecoderLM, device: torch.device, world: World = ALONE) -> Engine:
    """The engine that trains `model`, together with those of the other ranks."""
    how: dict[str, Any] = {"device": device, "dtype": config.train.dtype, "clip": config.train.clip, "world": world}
    if config.parallel.engine == "torch":
        return TorchEngine(model, build_optimizer(model, config.optimizer), compile=config.train.compile, **how)
    return DeepSpeedEngine(
        model,
        torch_adamw(model, config.optimizer),
        stage=config.parallel.zero,
        micro_batch=config.micro_batch(world.data_size),
        offload=config.parallel.offload,
        extra=config.parallel.deepspeed,
        **how,
    )


def make_loader(
    config: Config, dataset: TokenDataset | TaskDataset, world: World = ALONE, unread: Ranges = ()
) -> Batches:
    """This rank's batches of `dataset` in the order that run.seed gives them; unread: samples that are never read,
    beside those of data.skip."""
    share: dict[str, Any] = {
        "batch_sequences": config.batch_sequences,
        "micro_batch": config.micro_batch(world.data_size),
        "skip": tuple(sorted((*read_ranges(config.data.skip), *unread))),
        "rank": world.data_rank,
        "world": world.data_size,
    }
    if isinstance(dataset, TaskDataset):
        return TaskLoader(dataset, **share)
    return Loader(
        dataset,
        seq_len=config.data.seq_len,
        seed=config.run.seed,
        documents=config.data.documents,
        stream=config.data.stream,
        **share,
    )


def checkpoint_bytes(config: Config) -> int:
    """Size of one checkpoint; no weights are made."""
    with torch.device("meta"):
        model = DecoderLM(config.model)
        optimizer = build_optimizer(model, OptimizerConfig(kind=config.optimizer.kind))
    return checkpoint.bytes_needed({"model": model.state_dict(), "optimizer": optimizer.state()})


def check_data(config: Config) -> list[Problem]:
    """Whatever is wrong with the text: missing, empty, too short, of more symbols than the model has."""
    if config.data.corpus in TASKS:
        return []  # rules of the configuration know all about them
    try:
        data = build_data(config)
    except ValueError as error:
        return [_problem(error, "data.path")]
    assert isinstance(data.train, TokenDataset)
    parts = data.train.parts if isinstance(data.train, Mixture) else (data.train,)
    shortest = [("data.seq_len", part, config.data.seq_len + 1) for part in parts]
    shortest += [("data.validation", part, 2) for part in data.validation if isinstance(part, TokenDataset)]
    found = [
        Problem(
            "",
            key,
            f"the {part.split} split of {part.corpus} has {len(part.tokens)} tokens, at least {least} are needed; "
            "give more text or a shorter data.seq_len",
        )
        for key, part, least in shortest
        if len(part.tokens) < least
    ]
    if config.data.stream:
        try:
            StreamOrder(len(data.train.tokens), config.data.seq_len, config.batch_sequences)
        except ValueError as error:
            found.append(_problem(error, "data.stream"))
    vocabulary = config.model.vocab_size
    if vocabulary is not None and vocabulary < data.tokenizer.vocab_size:
        found.append(
            Problem(
                "",
                "model.vocab_size",
                f"{vocabulary} is less than the {data.tokenizer.vocab_size} tokens of the tokenizer; "
                "leave it out to take the tokenizer's",
            )
        )
    return found


def check_device(config: Config) -> list[Problem]:
    """Whether this machine trains in the precision that was asked for."""
    if config.train.dtype != "float16" or torch.cuda.is_available():
        return []
    message = "needs a CUDA device, and none is here: CPUs have no fast float16; use bfloat16 or float32"
    return [Problem("", "train.dtype", message)]


def check_disk(config: Config) -> list[Problem]:
    """Whether the checkpoints fit on the disk of run.dir."""
    if config.model.vocab_size is None:
        return []
    size = checkpoint_bytes(config)
    try:
        checkpoint.check_space(run_folder(config) / "checkpoints", size, config.checkpoint.keep)
    except ValueError as error:
        return [Problem("", "run.dir", str(error))]
    return []


def check_run_folder(config: Config) -> list[Problem]:
    """Whether run.dir holds a run of another configuration: each setting that differs."""
    folder = run_folder(config)
    if not (folder / "config.yaml").is_file():
        return []
    hint = f"{folder} holds a run of another config; choose another run.dir"
    return [
        Problem("", key, f"was {old!r} when this run began, now {new!r}; {hint}")
        for key, old, new in differences(reload(folder), config, FREE_TO_CHANGE)
        if key != "model.vocab_size" or new is not None
    ]


def check_ranks(config: Config) -> list[Problem]:
    """Whether the processes that a launcher started can share sequences as asked for."""
    started, sequence = launched(), config.parallel.sequence
    if started % sequence == 0:
        return []
    message = f"{sequence} ranks share a sequence, but {started} started: start a multiple of {sequence}"
    return [Problem("", "parallel.sequence", f"{message} (torchrun --nproc-per-node {sequence} -m lmtrain train ..)")]


CHECKS = (check_ranks, check_data, check_device, check_run_folder, check_disk)
"""All that is checked before training, beside the configuration itself."""


def _problem(error: ValueError, key: str) -> Problem:
    """A ValueError of the data as a problem; its text may begin with the key it blames."""
    blamed, _, message = str(error).partition(": ")
    if blamed.startswith("data."):
        return Problem("", blamed, message)
    return Problem("", key, str(error))
