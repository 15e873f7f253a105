"""Text from a model: the prompt is read, then token after token is drawn and read back.

What the model remembers in between is its decode state: the keys still alive, and nothing else. Two kinds of
model read everything anew for each token instead: one with a table of positions, which reads the last tokens
that the table has room for; and one that selects ahead, for which a new token changes how those before it
are read.
"""

import codecs
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.tokenizer import Tokenizer
from lmtrain.model import DecoderLM

START = b"\n"
PREFILL_TOKENS = 16384  # of the prompt in one forward pass


def generate(
    model: DecoderLM,
    tokenizer: Tokenizer,
    prompt: bytes,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> "Generation":
    """Goes on from `prompt` for `length` tokens; the bytes of each come as soon as it is drawn.

    An empty prompt stands for a newline. See `Sampling` for temperature, top_k and top_p. seed: the same one
    draws the same tokens; None draws others each time. The model is put into evaluation mode. ValueError
    names the option that is out of range, or the character that the tokenizer does not know.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2^63 - 1, got {seed}")
    sampling = Sampling(temperature, top_k, top_p)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return Generation(model, tokenizer, _encode(tokenizer, prompt), length, sampling, generator)


def printable(pieces: Iterable[bytes]) -> Iterator[str]:
    """Bytes as text to show: a character comes with its last byte, and what is not UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; ValueError names what is out of range.

    temperature: divides the logits; 0 takes the likeliest token. top_k: keeps the k likeliest. top_p: keeps,
    of those, the likeliest that together reach the share p. Of equally likely tokens the lower id comes
    first.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (always the likeliest token) or above, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and not self.top_k == self.top_p is None:
            raise ValueError("temperature 0 always takes the likeliest token: top_k and top_p would have no effect")

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """One token id. ValueError if a logit is not finite."""
        if not logits_V.isfinite().all():
            raise ValueError("the model's logits are not finite: its training diverged")
        if self.temperature == 0:
            return int(logits_V.argmax())
        return int(torch.multinomial(self.probabilities(logits_V), 1, generator=generator))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The distribution that a token is drawn from, float64 [V]; temperature above 0."""
        logits_V = logits_V.double()
        sorted_V, order_V = torch.sort((logits_V - logits_V.max()) / self.temperature, descending=True, stable=True)
        if self.top_k is not None:
            sorted_V[self.top_k :] = -torch.inf
        p_V = sorted_V.softmax(0)
        if self.top_p is not None:
            p_V[1:][p_V.cumsum(0)[:-1] >= self.top_p] = 0
        return torch.zeros_like(p_V).scatter(0, order_V, p_V / p_V.sum())


class Generation:
    """An iterator over the bytes of each token, and what they took so far.

    tokens: drawn; prompt_tokens: read before the first. prompt_seconds, seconds: for the prompt and for the
    tokens since, without the time that the consumer spends between them.
    """

    def __init__(
        self,
        model: DecoderLM,
        tokenizer: Tokenizer,
        prompt_ids: np.ndarray,
        length: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        """`generate` is the way in."""
        model.eval()
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.prompt_tokens = len(prompt_ids)
        self.tokens = 0
        self.prompt_seconds = self.seconds = 0.0
        self._length = length
        self._generator = generator
        self._reader = _reader(model)
        self._unread = prompt_ids

    def __iter__(self) -> "Generation":
        return self

    def __next__(self) -> bytes:
        if self.tokens == self._length:
            raise StopIteration
        begin = time.perf_counter()
        logits_V = self._reader.read(self._unread)[: self.tokenizer.vocab_size].cpu()
        if self.tokens == 0:
            self.prompt_seconds = time.perf_counter() - begin
            begin = time.perf_counter()
        self._unread = np.array([self.sampling.draw(logits_V, self._generator)])
        self.tokens += 1
        piece = self.tokenizer.decode(self._unread)
        self.seconds += time.perf_counter() - begin
        return piece

    @property
    def state_bytes(self) -> int:
        """Bytes of the living keys and scan states now; 0 for a model that reads everything anew."""
        return self._reader.state_bytes

    def report(self) -> str:
        """What it took, in one line."""
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.tokens:,} tokens, {speed:,.1f} per second, after {self.prompt_tokens:,} of the prompt in "
            f"{self.prompt_seconds:.2f} s; state {self.state_bytes:,} bytes"
        )


class Reader(Protocol):
    """Reads tokens; knows what comes next."""

    @property
    def state_bytes(self) -> int: ...

    def read(self, ids: np.ndarray) -> Tensor:
        """Logits [V] of the token behind the last of the new `ids`."""


class StateReader:
    """Keeps the decode state."""

    def __init__(self, model: DecoderLM) -> None:
        self.model = model
        self.state = model.init_state(1)

    @property
    def state_bytes(self) -> int:
        """See `ModelState.bytes`."""
        return self.state.bytes

    @torch.no_grad()
    def read(self, ids: np.ndarray) -> Tensor:
        """See `Reader`."""
        for part in _tensor(ids, self.model).split(PREFILL_TOKENS, 1):
            hidden_BTD, _ = self.model.hidden(part, state=self.state)
        return F.linear(hidden_BTD[0, -1], self.model.head_weight)


class Rereader:
    """Keeps the tokens, of which it reads the last `most` (all if None) anew for each logit."""

    state_bytes = 0

    def __init__(self, model: DecoderLM, most: int | None) -> None:
        self.model = model
        self.most = most
        self.ids = np.zeros(0, dtype=np.int64)

    @torch.no_grad()
    def read(self, ids: np.ndarray) -> Tensor:
        """See `Reader`."""
        self.ids = np.concatenate([self.ids, ids])[-(self.most or 0) :]
        hidden_BTD, _ = self.model.hidden(_tensor(self.ids, self.model))
        return F.linear(hidden_BTD[0, -1], self.model.head_weight)


def _reader(model: DecoderLM) -> Reader:
    if model.positions is not None:
        return Rereader(model, model.positions.num_embeddings)
    return StateReader(model) if model.causality == "strict" else Rereader(model, None)


def _encode(tokenizer: Tokenizer, prompt: bytes) -> np.ndarray:
    try:
        ids = tokenizer.encode(prompt or START)
    except ValueError as error:
        hint = "" if prompt else "; an empty prompt stands for a newline, give another one"
        raise ValueError(f"prompt: {error}{hint}") from None
    if not len(ids):
        raise ValueError(f"prompt: the tokenizer {tokenizer.name} finds no token in it; give one at least")
    return ids


def _tensor(ids: np.ndarray, model: DecoderLM) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(model.head_weight.device)[None]
