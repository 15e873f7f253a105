"""Texts and models whose losses are known, or that leak on purpose, for the tests of evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attention.mixer import Context, Cost, Mixer, MixerOutput
from data.dataset import TokenDataset
from lmtrain.config import ModelConfig
from lmtrain.model import DecoderLM

BIGRAM = [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1 / 4, 1 / 2, 1 / 4]]
PROTOCOLS = [(1, 1), (2, 1), (4, 4), (5, 3), (8, 1), (64, 16), (64, 64), (1000, 1000), (1000, 7)]


class ToyTokenizer:
    """Token i is the i-th letter, as often as it has bytes."""

    name = "toy"

    def __init__(self, token_bytes: Sequence[int]) -> None:
        self.token_bytes = np.array(token_bytes, dtype=np.int64)
        self.vocab_size = len(token_bytes)

    def decode(self, ids: np.ndarray) -> bytes:
        return b"".join(bytes([97 + i]) * int(self.token_bytes[i]) for i in ids)


def dataset_of(tokens, documents=(0,), token_bytes=(1, 2, 3), words=4) -> TokenDataset:
    """A split whose tokens have the given sizes in bytes. words: of each document, or of the first alone."""
    tokenizer: Any = ToyTokenizer(token_bytes)
    tokens = np.array(tokens, dtype=np.uint8)
    starts = np.array([*documents, len(tokens)], dtype=np.int64)
    of_document = np.add.reduceat(tokenizer.token_bytes[tokens], starts[:-1])
    words_of = np.array([words, *[0] * (len(documents) - 1)] if isinstance(words, int) else words)
    titles = [f"document {index}" for index in range(len(documents))]
    return TokenDataset(tokens, starts, "f1", tokenizer, "toy corpus", "validation", of_document, words_of, titles)


def stretch_of(dataset: TokenDataset, start: int, stop: int) -> TokenDataset:
    """These tokens as a text of their own."""
    return dataset_of(dataset.tokens[start:stop], token_bytes=dataset.tokenizer.token_bytes)


def random_dataset(length: int, vocabulary: int = 3, documents=(0,), seed: int = 0) -> TokenDataset:
    generator = np.random.default_rng(seed)
    return dataset_of(generator.integers(0, vocabulary, length), documents, generator.integers(1, 5, vocabulary))


def bigram_model(table=BIGRAM) -> DecoderLM:
    """p(next | token) is the token's row of the table: one-hot embedding, no layers, logarithms as head."""
    p = torch.tensor(table, dtype=torch.float64)
    model = DecoderLM(ModelConfig(dim=len(p), layers=0, vocab_size=len(p))).double()
    model.norm = nn.Identity()
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(len(p)))
        model.head.weight.copy_(p.log().T)
    return model


def decoder(pattern: str, vocabulary: int = 3, seed: int = 0, **settings: Any) -> DecoderLM:
    """A small model in float64, with every matrix large enough that attention matters."""
    torch.manual_seed(seed)
    mixers = {
        "near": {"kind": "local", "heads": 2, "window": 3},
        "far": {"kind": "local", "heads": 2, "kv_heads": 1, "window": 5},
        "five": {"kind": "local", "heads": 2, "window": 5},
        "all": {"kind": "dense", "heads": 2},
    }
    sizes = {"dim": 8, "layers": 2, "ffn_dim": 8, "init_std": 0.7}
    config = ModelConfig(mixers=mixers, pattern=pattern, vocab_size=vocabulary, **(sizes | settings))
    return DecoderLM(config).double()


class Peek(Mixer):
    """Leaks on purpose: writes the next token, if there is one, into the second half of the features."""

    causality = "selects_ahead"

    def forward(self, x: Tensor, ctx: Context | None = None, state: Any = None) -> MixerOutput:
        half = x.shape[2] // 2
        following = torch.cat([x[:, 1:, :half], torch.zeros_like(x[:, :1, :half])], 1)
        return MixerOutput(torch.cat([torch.zeros_like(following), following], 2), {})

    def init_state(self, batch: int, limit: int | None = None) -> Any:
        raise AssertionError("its selection needs the whole sequence")

    def cost(self, length: int) -> Cost:
        return Cost(0, 0, 0, 0)


def peeking_model(vocabulary: int) -> DecoderLM:
    """Knows the next token for certain wherever there is one in its input, else nothing at all."""
    model = decoder("near", vocabulary, dim=2 * vocabulary, layers=1, ffn_dim=1)
    block = model.blocks[0]
    block.mixers = nn.ModuleDict({"peek": Peek()})
    block.mixer_norm = model.norm = nn.Identity()
    with torch.no_grad():
        for parameter in block.ffn.parameters():
            parameter.zero_()
        identity = torch.eye(vocabulary)
        model.embedding.weight.copy_(torch.cat([identity, torch.zeros_like(identity)], 1))
        model.head.weight.copy_(torch.cat([torch.zeros_like(identity), 100 * identity], 1))
    return model
