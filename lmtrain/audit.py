"""Does a model see the future? Answered by changing its inputs, on the very weights it has.

Gradients cannot answer: through a discrete choice (top-k over the sequence) they are exactly zero while the
choice itself depends on later tokens. So later tokens are replaced and earlier outputs compared, in float64:

* per layer, with the layer's own input fixed before the cut, so that a leak is charged to where it is;
* for the whole model, in its hidden state behind the last norm (the head behind it mixes no positions);
* prefixes: the last output of a prefix must be that of the whole pass;
* rows of a batch, and packed documents, must not see each other.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attention.mixer import Causality, Context, Mixer
from lmtrain.floor import FloorReport
from lmtrain.model import DecoderLM
from lmtrain.table import table

FLOAT64_PARAMETERS = 2**29
"""Larger models are audited in their own precision: the float64 copy would take more than 4 GiB."""

STRICT = "strict: no later token changes an earlier output"


@dataclass(frozen=True)
class Finding:
    """How far outputs changed that must not.

    worst: largest change, as a share of the largest output; where: what was changed then. changed, compared:
    positions, of all comparisons. rounding: a change up to this share may come from the order of sums.
    """

    worst: float = 0.0
    where: str = ""
    changed: int = 0
    compared: int = 0
    rounding: float = 0.0

    def also(self, got: Tensor, expected: Tensor, where: str) -> Finding:
        """With one more comparison of outputs [B, n, D]."""
        change = (got - expected).abs().nan_to_num(torch.inf).amax(-1) / expected.abs().max().clamp(min=1e-30)
        worst = float(change.max())
        rounding = torch.finfo(expected.dtype).eps ** (2 / 3)
        return Finding(
            worst=max(worst, self.worst),
            where=where if worst > self.worst else self.where,
            changed=self.changed + int((change > rounding).sum()),
            compared=self.compared + change.numel(),
            rounding=rounding,
        )

    @property
    def leaks(self) -> bool:
        """Whether anything changed by more than rounding."""
        return self.worst > self.rounding

    def in_words(self) -> str:
        """What was found, without a judgement."""
        if self.worst == 0:
            return "nothing changes"
        if not self.leaks:
            return f"changes of at most {self.worst:.0e}, which is rounding"
        return f"{self.changed} of {self.compared} positions change, by up to {self.worst:.2g} ({self.where})"

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "leaks": self.leaks,
            "worst_change": self.worst,
            "worst_at": self.where,
            "positions_changed": self.changed,
            "positions_compared": self.compared,
        }


@dataclass(frozen=True)
class LayerAudit:
    """One mixer of one layer: what it claims, and what later tokens did to its earlier outputs."""

    layer: int
    name: str
    kind: str
    causality: Causality
    future: Finding

    @property
    def leaks(self) -> bool:
        """Whether it sees ahead although it claims not to."""
        return self.causality == "strict" and self.future.leaks

    @property
    def verdict(self) -> str:
        """One line."""
        if self.leaks:
            return f"LEAK: {self.future.in_words()}"
        if self.causality == "strict":
            return STRICT if self.future.worst == 0 else f"strict: {self.future.in_words()}"
        return f"selects ahead, as configured: {self.future.in_words()}"


@dataclass(frozen=True)
class AuditReport:
    """Findings of `audit`. documents: None where the model refuses packed documents. floor: if a trial was made."""

    length: int
    precision: str
    causality: str
    layers: list[LayerAudit]
    future: Finding
    prefixes: Finding
    rows: Finding
    documents: Finding | None
    floor: FloorReport | None = None

    @property
    def leaks(self) -> bool:
        """Whether anything that claims to be strict is not; rows or documents may meet in no model."""
        return bool(self._leaking())

    def _leaking(self) -> list[str]:
        where = [f"layer {a.layer} {a.name}" for a in self.layers if a.leaks]
        if self.causality == "strict":
            where += ["the model's future"] if self.future.leaks else []
            where += ["prefixes"] if self.prefixes.leaks else []
        where += ["rows of a batch"] if self.rows.leaks else []
        where += ["packed documents"] if self.documents is not None and self.documents.leaks else []
        where += ["entropy floor"] if self.floor is not None and self.floor.leaks else []
        return where

    @property
    def verdict(self) -> str:
        """One line."""
        if self.leaks:
            return f"LEAK: {', '.join(self._leaking())}"
        if self.causality == "strict":
            return STRICT
        return "selects ahead, as configured: its one-pass loss is no perplexity, score it prefix by prefix"

    def to_json(self) -> dict[str, Any]:
        """All findings, for machines."""
        layers = [
            {
                "layer": a.layer,
                "name": a.name,
                "kind": a.kind,
                "causality": a.causality,
                "verdict": a.verdict,
                **a.future.to_json(),
                "leaks": a.leaks,
            }
            for a in self.layers
        ]
        return {
            "leaks": self.leaks,
            "verdict": self.verdict,
            "causality": self.causality,
            "length": self.length,
            "precision": self.precision,
            "layers": layers,
            "future": self.future.to_json(),
            "prefixes": self.prefixes.to_json(),
            "rows": self.rows.to_json(),
            "documents": None if self.documents is None else self.documents.to_json(),
            "floor": None if self.floor is None else self.floor.to_json(),
        }

    def format(self) -> str:
        """All findings, for people."""
        rows = [[f"layer {a.layer} {a.name}", a.kind, *_columns(a.future), a.verdict] for a in self.layers]
        whole = {
            "whole model: later tokens": self.future,
            "whole model: prefixes": self.prefixes,
            "whole model: other rows": self.rows,
            "whole model: packed documents": self.documents,
        }
        for name, finding in whole.items():
            if finding is None:
                rows.append([name, "", "", "", "", "refused: its choice would see other documents"])
            else:
                rows.append([name, "", *_columns(finding), finding.in_words()])
        head = ["", "kind", "worst change", "at", "positions changed", "verdict"]
        found = f"{table(head, rows)}\n\n{self.length} tokens, {self.precision}. {self.verdict}"
        return found if self.floor is None else f"{found}\n\n{self.floor.format()}"


def _columns(finding: Finding) -> list[str]:
    worst = f"{finding.worst:.1e}" if finding.worst else "0"
    return [worst, finding.where, f"{finding.changed}/{finding.compared}"]


@torch.no_grad()
def audit(
    model: DecoderLM,
    *,
    length: int,
    vocab: int | None = None,
    tokens: Tensor | None = None,
    cuts: int = 8,
    seed: int = 0,
) -> AuditReport:
    """Audit a copy of `model` on sequences of `length` tokens, in training and in evaluation mode.

    Sequences are random tokens below `vocab` (by default all the model has) and, if given, the first rows of
    `tokens` [2 or more, T >= length]. Half of the `cuts` are drawn, the others stand one behind each of them:
    a leak between neighbours shows at every second cut only. ValueError for fewer than 2 tokens.
    """
    if length < 2:
        raise ValueError(f"an audit needs at least 2 tokens, got length {length}")
    copied = _copy(model)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.embedding.num_embeddings if vocab is None else vocab
    device = model.embedding.weight.device
    drawn, future = torch.randint(vocabulary, (2, 2, length), generator=generator).to(device)
    sources = {"random tokens": drawn}
    if tokens is not None:
        if tokens.shape[0] < 2 or tokens.shape[1] < length:
            raise ValueError(f"an audit needs 2 rows of at least {length} tokens, got {list(tokens.shape)}")
        sources["real tokens"] = tokens[:2, :length].to(drawn)
    places = (1 + torch.randperm(length - 1, generator=generator)[: max(1, cuts // 2)]).tolist()
    places = sorted({place for p in places for place in (p, p + 1) if place < length})

    probe = _Probe(copied, places)
    for source, given in sources.items():
        for training in (False, True):
            copied.train(training)
            probe.run(given, future, f"{source}, {'training' if training else 'evaluating'}")
    return AuditReport(
        length=length,
        precision=str(next(copied.parameters()).dtype).removeprefix("torch."),
        causality=model.causality,
        layers=probe.layers,
        future=probe.future,
        prefixes=probe.prefixes,
        rows=probe.rows,
        documents=probe.documents,
    )


def _copy(model: DecoderLM) -> DecoderLM:
    """A copy without dropout, in float64 if there is room for it; tags of parameters are kept."""
    copied = copy.deepcopy(model)
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        ours.__dict__.update(theirs.__dict__)
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parameters = sum(p.numel() for p in model.parameters())
    device = model.embedding.weight.device.type
    return copied.double() if parameters <= FLOAT64_PARAMETERS and device != "mps" else copied


def _mixers(model: DecoderLM) -> list[tuple[int, str, Mixer]]:
    """(layer, name in the pattern, mixer) of every mixer."""
    return [(layer, name, mixer) for layer, block in enumerate(model.layers) for name, mixer in block.items()]


class _Probe:
    """Runs the tests and keeps what they found."""

    def __init__(self, model: DecoderLM, cuts: list[int]) -> None:
        self.model = model
        self.cuts = cuts
        self.future = Finding()
        self.prefixes = Finding()
        self.rows = Finding()
        self.documents: Finding | None = Finding()
        self.layers = [
            LayerAudit(layer, name, model.config.mixers[name]["kind"], mixer.causality, Finding())
            for layer, name, mixer in _mixers(model)
        ]

    def run(self, tokens: Tensor, other: Tensor, what: str) -> None:
        """All tests on tokens [2, T], with other [2, T] as another future."""
        self._layers(tokens, other, what)
        hidden = self._hidden(tokens)
        for cut in self.cuts:
            changed = self._hidden(torch.cat([tokens[:, :cut], other[:, cut:]], 1))
            self.future = self.future.also(changed[:, :cut], hidden[:, :cut], f"cut {cut}, {what}")
            last = self._hidden(tokens[:, :cut])[:, -1:]
            self.prefixes = self.prefixes.also(last, hidden[:, cut - 1 : cut], f"prefix {cut}, {what}")
        changed = self._hidden(torch.stack([tokens[0], other[1]]))
        self.rows = self.rows.also(changed[:1], hidden[:1], f"row 1, {what}")
        self._documents(tokens, what)

    def _hidden(self, tokens: Tensor, ctx: Context | None = None) -> Tensor:
        with _same_randomness(tokens.device):
            return self.model.hidden(tokens, ctx).y

    def _layers(self, tokens: Tensor, other: Tensor, what: str) -> None:
        """Each mixer on its own input, whose later vectors are those of the other sequences."""

        def probe(index: int) -> Callable[..., None]:
            def hook(mixer: Mixer, inputs: tuple[Tensor, Context, Any], output: object) -> None:
                found = self.layers[index]
                future = _future_of(mixer, inputs[0], inputs[1], self.cuts, found.future, what)
                self.layers[index] = replace(found, future=future)

            return hook

        mixers = _mixers(self.model)
        hooks = [mixer.register_forward_hook(probe(index)) for index, (_, _, mixer) in enumerate(mixers)]
        try:
            self._hidden(torch.cat([tokens, other]))
        finally:
            for hook in hooks:
                hook.remove()

    def _documents(self, tokens: Tensor, what: str) -> None:
        """A document packed between others equals the document alone."""
        if self.documents is None:
            return
        length = tokens.shape[1]
        borders = [0, *self.cuts[:: max(1, len(self.cuts) // 3)], length]
        spans = list(itertools.pairwise(borders))
        positions = torch.cat([torch.arange(stop - start) for start, stop in spans]).to(tokens)
        try:
            packed = self._hidden(tokens, Context(positions=positions.expand_as(tokens)))
        except ValueError:
            if self.model.causality == "strict":
                raise
            self.documents = None
            return
        for start, stop in spans:
            alone = self._hidden(tokens[:, start:stop])
            where = f"tokens {start} to {stop}, {what}"
            self.documents = self.documents.also(packed[:, start:stop], alone, where)


def _future_of(mixer: Mixer, x: Tensor, ctx: Context, cuts: list[int], found: Finding, what: str) -> Finding:
    """x [2B, T, D]: in its first half the later vectors are replaced by those of the second."""

    def mix(cut: int) -> Tensor:
        def spliced(vectors: Tensor) -> Tensor:
            ours, theirs = vectors.chunk(2)
            return torch.cat([ours[:, :cut], theirs[:, cut:]], 1)

        assert ctx.initial is not None
        assert ctx.residual is not None
        context = Context(initial=spliced(ctx.initial), residual=spliced(ctx.residual))
        with _same_randomness(x.device):
            return mixer.forward(spliced(x), context).y

    expected = mix(x.shape[1])
    for cut in cuts:
        found = found.also(mix(cut)[:, :cut], expected[:, :cut], f"cut {cut}, {what}")
    return found


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """Whoever draws random numbers draws the same ones every time."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
