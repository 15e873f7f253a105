"""Requests of an evaluation harness, answered with a trained model: log-likelihoods of texts, and continuations.

There is no start token. Where nothing precedes what is to be scored, a newline stands in front of it, as it does for an
empty prompt of `lmtrain generate`; so the first token of a text is scored here, unlike in `lmtrain eval`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lmtrain.generate import START, Sampling
from lmtrain.harness.together import Prompt, write_alone, write_together
from lmtrain.loss import default_chunk, token_losses
from lmtrain.restore import Restored

MOST_NEW = 256
"""Tokens of a continuation, unless the request says how many."""
OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


class Row(NamedTuple):
    """Token ids [n], of which the last `targets` are to be scored, each from all before it."""

    ids: np.ndarray
    targets: int


class Answer(NamedTuple):
    """ln p of the targets of a row; greedy: whether each was the likeliest token."""

    log_likelihood: float
    greedy: bool


class Requests:
    """A strict model that answers.

    max_length: most tokens that a prediction may see, by default the run's evaluation context. batch_tokens: of one
    forward pass, padding included; it changes no number but for rounding.
    """

    def __init__(self, restored: Restored, max_length: int | None = None, batch_tokens: int = 16384) -> None:
        if restored.model.causality != "strict":
            raise ValueError(
                f"{restored.run} selects ahead: reading an answer changes what the model made of its question, so one "
                "pass over both gives no likelihood; lmtrain eval scores such a model prefix by prefix"
            )
        self.model = restored.model
        self.tokenizer = restored.tokenizer
        self.autocast = restored.autocast
        self.max_length = restored.config.eval_context if max_length is None else max_length
        self.batch_tokens = batch_tokens
        if self.max_length < 1 or batch_tokens < 1:
            raise ValueError(f"max_length and batch_tokens: at least 1, not {self.max_length}, {batch_tokens}")

    def log_likelihoods(self, pairs: Iterable[tuple[str, str]]) -> list[Answer]:
        """ln p(continuation | context) of each pair (context, continuation)."""
        return self._answers([self._pair(*pair) for pair in pairs])

    def rolling(self, texts: Iterable[str]) -> list[float]:
        """ln p of each text, in disjoint windows of `max_length`; the last one sees as much as there is room for."""
        rows_of = [list(rolling_rows(self._start(), self._encode(text), self.max_length)) for text in texts]
        answers = iter(self._answers([row for rows in rows_of for row in rows]))
        return [sum(next(answers).log_likelihood for _ in rows) for rows in rows_of]

    def continuations(self, prompts: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What the model writes behind each prompt, without the first of the words in `until` and what follows it.

        With the prompt come options: until, max_gen_toks; do_sample, temperature, top_k, top_p, without which it is the
        likeliest token each time. ValueError names another one.
        """
        asked = [self._prompt(prompt, options, seed) for seed, (prompt, options) in enumerate(prompts)]
        texts = [""] * len(asked)
        self.model.eval()
        with self.autocast():
            for batch in self._prompt_batches([prompt for prompt, _ in asked]):
                written = self._write([asked[index][0] for index in batch])
                for index, ids in zip(batch, written, strict=True):
                    texts[index] = self._until(ids, asked[index][1])
        return texts

    def _pair(self, context: str, continuation: str) -> Row:
        """Spaces at the end of the context belong to the continuation, as tokens begin with them."""
        bare = context.rstrip()
        ids = self._encode(context + continuation)
        targets = len(ids) - len(self._encode(bare))
        if targets > self.max_length:
            raise ValueError(f"a continuation of {targets} tokens is longer than max_length {self.max_length}")
        ids = ids if bare else np.concatenate([self._start(), ids])
        return Row(ids[-self.max_length - 1 :], targets)

    def _answers(self, rows: list[Row]) -> list[Answer]:
        """In the order of the rows; those of about equal length make a batch."""
        order = sorted((i for i, row in enumerate(rows) if row.targets), key=lambda i: len(rows[i].ids))
        answers = [Answer(0.0, True)] * len(rows)
        self.model.eval()
        with torch.no_grad(), self.autocast():
            for batch in self._batches(order, rows):
                for index, answer in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                    answers[index] = answer
        return answers

    def _batches(self, order: Sequence[int], rows: list[Row]) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in order:
            if batch and (len(batch) + 1) * (len(rows[index].ids) - 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _score(self, rows: list[Row]) -> Iterator[Answer]:
        """One forward pass, shorter rows padded behind their ends: a strict model does not look there."""
        device, weight = self.model.head_weight.device, self.model.head_weight
        tokens = torch.zeros(len(rows), max(len(row.ids) for row in rows) - 1, dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row.ids) - 1] = torch.from_numpy(row.ids[:-1].astype(np.int64))
        hidden_BTD = self.model.hidden(tokens.to(device)).y
        for hidden_TD, row in zip(hidden_BTD, rows, strict=True):
            hidden = hidden_TD[len(row.ids) - 1 - row.targets : len(row.ids) - 1]
            targets = torch.from_numpy(row.ids[-row.targets :].astype(np.int64)).to(device)
            likeliest = [F.linear(part, weight).argmax(-1) for part in hidden.split(default_chunk(len(weight)))]
            losses = token_losses(hidden, weight, targets)
            yield Answer(-float(losses.double().sum()), bool((torch.cat(likeliest) == targets).all()))

    def _prompt(self, prompt: str, options: Mapping[str, Any], seed: int) -> tuple[Prompt, list[bytes]]:
        """A prompt, and the words before which its continuation ends."""
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise ValueError(f"{', '.join(unknown)}: no such option of a request; known: {', '.join(OPTIONS)}")
        length = options.get("max_gen_toks", MOST_NEW)
        if length < 1:
            raise ValueError(f"max_gen_toks: at least 1 token, not {length}")
        until = options.get("until") or []
        stops = [word.encode() for word in ([until] if isinstance(until, str) else until)]
        sampling = Sampling(0.0)
        if options.get("do_sample", options.get("temperature", 0.0) > 0):
            sampling = Sampling(options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"))
        ids = self._encode(prompt) if prompt else self._start()

        def ends(written: Sequence[int]) -> bool:
            return any(stop in self.tokenizer.decode(np.array(written)) for stop in stops)

        return Prompt(ids[-self.max_length :], length, ends, sampling, seed), stops

    def _prompt_batches(self, prompts: list[Prompt]) -> Iterator[list[int]]:
        """Indices of prompts of about equal length; one at a time for a model that reads all anew for each token."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        size = 1 if self.model.positions is not None else max(1, self.batch_tokens // (self.max_length + MOST_NEW))
        return (order[first : first + size] for first in range(0, len(order), size))

    def _write(self, prompts: list[Prompt]) -> list[list[int]]:
        vocabulary = self.tokenizer.vocab_size
        if self.model.positions is None:
            return write_together(self.model, vocabulary, prompts)
        return [write_alone(self.model, vocabulary, prompt) for prompt in prompts]

    def _until(self, ids: list[int], stops: list[bytes]) -> str:
        """The text before the first of the words."""
        text = self.tokenizer.decode(np.array(ids))
        ends = [text.index(stop) for stop in stops if stop in text]
        return text[: min(ends, default=len(text))].decode(errors="replace")

    def _encode(self, text: str) -> np.ndarray:
        return self.tokenizer.encode(text.encode())

    def _start(self) -> np.ndarray:
        """The token that stands in front of a text: the newline."""
        return self.tokenizer.encode(START)[-1:]


def rolling_rows(start: np.ndarray, ids: np.ndarray, context: int) -> Iterator[Row]:
    """Windows that score each of `ids` [N] once: `context` of them at a time, from as many tokens before the last one.

    The harness calls these disjoint: only the last window reads again what another has read, to see no less.
    """
    text = np.concatenate([start, ids])
    for first in range(1, len(text), context):
        last = min(first + context - 1, len(text) - 1)
        yield Row(text[max(0, last - context) : last + 1], last - first + 1)
