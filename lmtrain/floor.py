"""The entropy floor: a model that predicts independent uniform letters better than by chance has seen the answers.

Of V letters each costs ln V nats, whatever came before it. So a small model is trained on fresh ones; if it goes below
the floor, on sequences that it never saw, then a later token reached an earlier output, by whatever path: through a
choice that has no gradient, a statistic, a buffer. Changed inputs (`lmtrain.audit`) show that an output depends on
later tokens; this trial shows what training makes of it. A loss above the floor proves less: that a leak was not found.

Shapes: N sequences, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.mixer import MIXERS, build
from lmtrain.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from lmtrain.hardware import pick_device
from lmtrain.model import DecoderLM
from lmtrain.schedule import learning_rate
from lmtrain.setup import build_engine, build_model
from lmtrain.table import table

VOCABULARY, LENGTH, BATCH, STEPS, DIM = 4, 32, 64, 1500, 48
"""Of the trial: letters, tokens and sequences of a step, steps, width. Short sequences, of which many can be read."""
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.0)
"""With it the published selections go below the floor within STEPS (docs/causality.md)."""

SEQUENCES, ALONE = 4096, 1024
"""Scored at the end, none was trained on; and those scored prefix by prefix too, which costs T / 2 times as much."""
EVALUATED_AT_ONCE = 512
ERRORS = 3
"""Standard errors below the floor that are no chance."""
ROUNDING = 1e-6

LENGTHS = ("window", "keep", "candidates", "block", "codes", "columns", "chunk", "span")
"""What mixers call a number of tokens, or of keys that stand for many: it is scaled where it would let every query meet
everything before it."""

Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Estimate:
    """A mean over sequences, in nats per token, and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, losses_NT: Tensor) -> Estimate:
        """Of losses [N, T]; sequences are independent, tokens of one are not."""
        means = losses_NT.mean(1)
        return cls(float(means.mean()), float(means.std() / len(means) ** 0.5))


@dataclass(frozen=True)
class FloorReport:
    """What a trial found. Losses are nats per token.

    one_pass: of all tokens, quarters: of each quarter of the sequences. prefix_wise: each token from a pass over its
    prefix alone, of the first ALONE sequences; None for a strict model, of which it is the same. changes: settings that
    were scaled to the trial.
    """

    causality: str
    model: str
    vocabulary: int
    length: int
    steps: int
    sequences: int
    one_pass: Estimate
    quarters: tuple[Estimate, ...]
    prefix_wise: Estimate | None
    changes: tuple[str, ...] = ()

    @property
    def floor(self) -> float:
        """ln V."""
        return math.log(self.vocabulary)

    @property
    def below(self) -> bool:
        """Whether the one-pass loss lies below the floor by more than chance."""
        return self.one_pass.mean < self.floor - ERRORS * self.one_pass.standard_error - ROUNDING

    @property
    def leaks(self) -> bool:
        """Whether a model that claims to be strict has seen the answers."""
        return self.causality == "strict" and self.below

    @property
    def verdict(self) -> str:
        """One line."""
        distance = self.one_pass.mean - self.floor
        numbers = f"{distance:+.5f} nats per token from ln {self.vocabulary}, standard error {self._error:.5f}"
        if self.leaks:
            return f"LEAK: below the floor: {numbers}"
        if self.causality == "strict":
            return f"strict: not below the floor: {numbers}"
        if self.below:
            return f"reads ahead, as configured: {numbers}; the later in the sequence, the more it may have read"
        return f"selects ahead, as configured, but has not learnt to read from it: {numbers}"

    @property
    def _error(self) -> float:
        return self.one_pass.standard_error

    def to_json(self) -> dict[str, Any]:
        """All numbers, for machines."""
        return {
            **asdict(self),
            "quarters": [asdict(quarter) for quarter in self.quarters],
            "changes": list(self.changes),
            "floor": self.floor,
            "below": self.below,
            "leaks": self.leaks,
            "verdict": self.verdict,
        }

    def format(self) -> str:
        """All numbers, for people."""
        size = self.length // 4
        named = {f"all {self.length} tokens": self.one_pass}
        named |= {f"  quarter {i + 1} ({size} tokens)": quarter for i, quarter in enumerate(self.quarters)}
        if self.prefix_wise is not None:
            named[f"prefix by prefix, {min(ALONE, self.sequences):,} sequences"] = self.prefix_wise
        rows = [
            [name, f"{e.mean:.5f}", f"{e.mean - self.floor:+.5f}", f"{e.standard_error:.5f}"]
            for name, e in named.items()
        ]
        head = ["entropy floor", "nats per token", f"minus ln {self.vocabulary}", "standard error"]
        what = (
            f"{self.model}, trained for {self.steps:,} steps on fresh sequences of {self.length} independent uniform "
            f"letters out of {self.vocabulary}; {self.sequences:,} other sequences scored."
        )
        changes = [f"scaled to the trial: {', '.join(self.changes)}"] if self.changes else []
        return "\n".join([table(head, rows), "", what, *changes, self.verdict])


def trial(
    config: Config,
    *,
    changes: tuple[str, ...] = (),
    sequences: int = SEQUENCES,
    watch: Watch = lambda what, done, total: None,
) -> FloorReport:
    """Train `config.model` on letters as `config` says (steps, batch, seq_len, optimizer, seed), then score it.

    Letters are drawn anew at every step, so data.* but seq_len does not matter. watch: told what is going on.
    """
    model = trained(config, watch)
    vocabulary, length = model.embedding.num_embeddings, config.data.seq_len
    tokens = letters(vocabulary, sequences, length, torch.Generator().manual_seed(_SCORED_SEED))
    tokens = tokens.to(model.head_weight.device)
    watch("scoring", 0, 1)
    one_pass = one_pass_losses(model, tokens)
    strict = model.causality == "strict"
    return FloorReport(
        causality=model.causality,
        model=f"{config.model.layers} layers of {config.model.pattern!r}, width {config.model.dim}",
        vocabulary=vocabulary,
        length=length,
        steps=config.train.steps,
        sequences=sequences,
        one_pass=Estimate.of(one_pass),
        quarters=tuple(Estimate.of(quarter) for quarter in one_pass.tensor_split(4, 1)),
        prefix_wise=None if strict else Estimate.of(prefix_wise_losses(model, tokens[:ALONE])),
        changes=changes,
    )


_SCORED_SEED = -1  # no run has it, so no step draws what is scored


def trained(config: Config, watch: Watch = lambda what, done, total: None) -> DecoderLM:
    """A model of `config`, trained on fresh letters."""
    device = pick_device()
    model = build_model(config, device)
    engine = build_engine(config, model, device)
    generator = torch.Generator().manual_seed(config.run.seed)
    steps, batch, length = config.train.steps, config.batch_sequences, config.data.seq_len
    for step in range(steps):
        watch("training", step, steps)
        tokens = letters(model.embedding.num_embeddings, batch, length, generator)
        engine.backward(engine.forward_loss(tokens[:, :-1], tokens[:, 1:], None, batch * length, seed=step))
        engine.step(learning_rate(step, steps, config.optimizer))
    return model.eval()


def letters(vocabulary: int, sequences: int, length: int, generator: torch.Generator) -> Tensor:
    """int64 [N, T + 1]: T inputs and, shifted by one, T targets."""
    return torch.randint(vocabulary, (sequences, length + 1), generator=generator)


@torch.no_grad()
def one_pass_losses(model: DecoderLM, tokens: Tensor) -> Tensor:
    """float64 [N, T]: nats of each target, from one pass over all inputs of a sequence [N, T + 1]."""
    parts = (
        F.cross_entropy(model(part[:, :-1]).double().transpose(1, 2), part[:, 1:], reduction="none")
        for part in tokens.split(EVALUATED_AT_ONCE)
    )
    return torch.cat(list(parts))


@torch.no_grad()
def prefix_wise_losses(model: DecoderLM, tokens: Tensor) -> Tensor:
    """float64 [N, T]: nats of each target, from a pass over what precedes it and nothing else."""
    losses = [one_pass_losses(model, tokens[:, : end + 1])[:, -1] for end in range(1, tokens.shape[1])]
    return torch.stack(losses, 1)


def trial_of(config: Config, steps: int = STEPS) -> tuple[Config, tuple[str, ...]]:
    """The trial of a configuration's mixers, and what had to be changed of their settings.

    Each word of the pattern is one layer (a single word two), as narrow as the mixers' settings allow from DIM on.
    Settings stay unless the trial would be void (see `scaled`). The rest of the model is the user's, but for the
    vocabulary, dropout and the length of a table of positions.
    """
    words = list(dict.fromkeys(config.model.pattern.split()))
    mixers, changes = {}, []
    for name in dict.fromkeys(name for word in words for name in word.split("+")):
        before = config.model.mixers[name]
        mixers[name] = after = scaled(before, config.model.dim)
        changes += [f"{name}.{key} {before[key]} -> {after[key]}" for key in after if after[key] != before[key]]
    model = replace(
        config.model,
        dim=_narrowest(mixers, config.model.dim),
        layers=max(2, len(words)),
        mixers=mixers,
        pattern=" ".join(words),
        ffn_dim=None,
        learned_positions=None if config.model.learned_positions is None else LENGTH,
        dropout=0.0,
        vocab_size=VOCABULARY,
    )
    return experiment(model, steps, seed=config.run.seed), tuple(changes)


def experiment(model: ModelConfig, steps: int = STEPS, seed: int = 1337) -> Config:
    """The trial's data and optimizer around a model of VOCABULARY tokens."""
    return Config(
        run=RunConfig(seed=seed),
        data=DataConfig(corpus="iid", alphabet=VOCABULARY, tokenizer="characters", seq_len=LENGTH),
        train=TrainConfig(steps=steps, batch_tokens=BATCH * LENGTH),
        optimizer=OPTIMIZER,
        model=model,
    )


def scaled(mixer: dict[str, Any], dim: int) -> dict[str, Any]:
    """Settings of a mixer of width `dim` that meets something else than everything in LENGTH tokens, if there are any.

    If every query would meet every token before it, the mixer's LENGTHS are halved, all together and none below 2,
    until at most half of the pairs are left.
    """
    if share_met(mixer, dim) < 1:
        return mixer
    while share_met(mixer, dim) > 0.5:
        shorter = {key: max(min(mixer[key], 2), mixer[key] // 2) for key in LENGTHS if isinstance(mixer.get(key), int)}
        if mixer | shorter == mixer:
            break
        mixer = mixer | shorter
    return mixer


def share_met(mixer: dict[str, Any], dim: int, length: int = LENGTH) -> float:
    """(query, key) pairs of a mixer, as a share of those in which every query meets every token up to itself."""
    settings = {key: value for key, value in mixer.items() if key != "kind"}
    with torch.device("meta"):
        built = build(mixer["kind"], dim, **settings)
    one = built.cost(1).pairs  # as many for each head that serves, and for each set of keys in it
    return built.cost(length).pairs / (one * length * (length + 1) / 2) if one else 0.0


def _narrowest(mixers: dict[str, dict[str, Any]], dim: int) -> int:
    """The least width from DIM on at which no mixer objects to its settings; at most `dim`, where none does."""
    for width in range(DIM, dim):
        if not any(_problems(mixer, width) for mixer in mixers.values()):
            return width
    return dim


def _problems(mixer: dict[str, Any], dim: int) -> list[tuple[str, str]]:
    settings = {key: value for key, value in mixer.items() if key != "kind"}
    return MIXERS[mixer["kind"]].Config(**settings).problems(dim)
