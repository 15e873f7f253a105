"""Generation: what the state remembers is what reading everything anew would see; sampling; text."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmtrain.generate as generate_module
from data.tokenizer import ByteTokenizer, CharacterTokenizer
from lmtrain.config import ModelConfig
from lmtrain.generate import Sampling, generate, printable
from lmtrain.model import DecoderLM

BYTES = ByteTokenizer()
PROMPT = b"def generate(model"


def decoder(pattern: str, **settings: Any) -> DecoderLM:
    """A small byte model in float64, its matrices so large that attention matters."""
    torch.manual_seed(0)
    mixers = {
        "near": {"kind": "local", "heads": 2, "window": 6},
        "all": {"kind": "dense", "heads": 2, "kv_heads": 1},
    }
    sizes = {"dim": 16, "layers": 2, "ffn_dim": 16, "init_std": 0.5, "vocab_size": 256}
    return DecoderLM(ModelConfig(mixers=mixers, pattern=pattern, **(sizes | settings))).double()


def coin(p: list[float]) -> DecoderLM:
    """Draws each token from the distribution p, whatever came before."""
    model = DecoderLM(ModelConfig(dim=1, layers=0, vocab_size=len(p)))
    model.norm = nn.Identity()
    nn.init.ones_(model.embedding.weight)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor(p).log()[:, None])
    return model


class Letters:
    """Tokens 0, 1, 2, ... are a, b, c, ..."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8) - ord("a")

    def decode(self, ids: np.ndarray) -> bytes:
        return bytes((ids + ord("a")).tolist())


def by_reading_everything(model: DecoderLM, prompt: bytes, length: int, most: int | None = None) -> bytes:
    """Greedy generation from the definition: one pass over all tokens (the last `most`) for each new one."""
    ids = list(prompt)
    for _ in range(length):
        read = ids if most is None else ids[-most:]
        with torch.no_grad():
            ids.append(int(model(torch.tensor([read]))[0, -1].argmax()))
    return bytes(ids[len(prompt) :])


@pytest.mark.parametrize("pattern", ["near", "all", "near+all", "near all"])
def test_greedy_with_state_equals_rereading(pattern):
    model = decoder(pattern)
    written = b"".join(generate(model, BYTES, PROMPT, length=60, temperature=0))
    assert written == by_reading_everything(model, PROMPT, 60)
    assert len(set(written)) > 5  # no constant that any model would write


def test_a_long_prompt_is_read_in_parts(monkeypatch):
    model = decoder("near+all")
    whole = b"".join(generate(model, BYTES, PROMPT, length=20, temperature=0))
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 5)
    assert b"".join(generate(model, BYTES, PROMPT, length=20, temperature=0)) == whole


@pytest.mark.parametrize("prompt", [b"abc", b"abcdefgh", PROMPT])
def test_a_table_of_positions_sees_its_last_tokens(prompt):
    model = decoder("all", learned_positions=8)
    written = b"".join(generate(model, BYTES, prompt, length=20, temperature=0))
    assert written == by_reading_everything(model, prompt, 20, most=8)


def test_a_model_that_selects_ahead_reads_everything_anew(monkeypatch):
    class SelectsAhead(DecoderLM):
        causality = "selects_ahead"

    model = decoder("all")
    written = b"".join(generate(model, BYTES, PROMPT, length=20, temperature=0))
    model.__class__ = SelectsAhead
    monkeypatch.delattr(DecoderLM, "init_state")
    again = generate(model, BYTES, PROMPT, length=20, temperature=0)
    assert b"".join(again) == written
    assert again.state_bytes == 0


@pytest.mark.parametrize("prompt", [b"x", PROMPT])
@pytest.mark.parametrize(
    "mixer",
    [
        {"kind": "mosa", "heads": 2, "head_dim": 8, "keep": 4, "selection": "paper"},
        {"kind": "routing", "heads": 2, "clusters": 3, "window": 4, "selection": "paper"},
    ],
    ids=lambda mixer: mixer["kind"],
)
def test_published_selections_read_the_prefix_anew(mixer, prompt):
    """They have no state: what a token gives to the next changes with every token that comes."""
    torch.manual_seed(0)
    mixers = {"near": {"kind": "local", "heads": 2, "window": 4}, "far": mixer}
    config = ModelConfig(dim=32, layers=2, ffn_dim=64, vocab_size=256, mixers=mixers, pattern="near+far")
    model = DecoderLM(config).double().eval()
    generation = generate(model, BYTES, prompt, length=20, temperature=0)
    assert b"".join(generation) == by_reading_everything(model, prompt, 20)
    assert generation.state_bytes == 0


def test_state_holds_the_living_keys_only():
    model = decoder("near")
    generation = generate(model, BYTES, PROMPT, length=100)
    sizes = []
    for _ in generation:
        sizes.append(generation.state_bytes)
    assert set(sizes) == {model.cost(length).state_bytes for length in (18, 117)}
    assert sizes[0] == 2 * 5 * 2 * 16 * 8  # layers x (window - 1) keys x (k and v) x width x float64


def test_state_of_dense_grows_by_each_token_read():
    model = decoder("all")
    generation = generate(model, BYTES, PROMPT, length=10)
    sizes = [generation.state_bytes for _ in generation]
    assert sizes == [model.cost(length).state_bytes for length in range(18, 28)]


def test_top_k_1_is_greedy():
    model = decoder("near+all")
    greedy = b"".join(generate(model, BYTES, PROMPT, length=40, temperature=0))
    assert b"".join(generate(model, BYTES, PROMPT, length=40, top_k=1, temperature=5.0)) == greedy
    assert b"".join(generate(model, BYTES, PROMPT, length=40, top_p=1e-9)) == greedy
    assert b"".join(generate(model, BYTES, PROMPT, length=40, temperature=5e-324)) == greedy


def test_seed():
    def written(seed):
        return b"".join(generate(decoder("near"), BYTES, PROMPT, length=40, seed=seed))

    assert written(1) == written(1)
    assert len({written(seed) for seed in (0, 1, 2, None, None)}) == 5


def test_draws_from_the_distribution():
    """Chi-square of 4,000 tokens, 3 degrees of freedom: one seed in 1,000 exceeds 16.3."""
    p = [0.5, 0.25, 0.2, 0.05]
    written = b"".join(generate(coin(p), Letters(4), b"a", length=4000, seed=3))
    counts = Counter(written)
    chi_square = sum((counts[ord("a") + i] - 4000 * p[i]) ** 2 / (4000 * p[i]) for i in range(4))
    assert chi_square < 16.3


class TestProbabilities:
    p = [0.2, 0.5, 0.05, 0.25]

    def of(self, **options):
        return Sampling(**options).probabilities(torch.tensor(self.p).log()).tolist()

    def test_temperature(self):
        assert self.of() == pytest.approx(self.p, abs=1e-6)
        squared = [x * x for x in self.p]
        assert self.of(temperature=0.5) == pytest.approx([x / sum(squared) for x in squared], abs=1e-6)

    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"top_k": 1}, [1]),
            ({"top_k": 3}, [0, 1, 3]),
            ({"top_k": 9}, [0, 1, 2, 3]),
            ({"top_p": 0.49}, [1]),
            ({"top_p": 0.51}, [1, 3]),
            ({"top_p": 0.76}, [0, 1, 3]),
            ({"top_p": 0.96}, [0, 1, 2, 3]),
            ({"top_p": 1.0}, [0, 1, 2, 3]),
            ({"top_k": 2, "top_p": 0.6}, [1]),  # of the two, the first holds two thirds
            ({"top_k": 2, "top_p": 0.7}, [1, 3]),
        ],
    )
    def test_what_is_kept_keeps_its_proportions(self, options, kept):
        mass = sum(self.p[i] for i in kept)
        expected = [self.p[i] / mass if i in kept else 0 for i in range(4)]
        assert self.of(**options) == pytest.approx(expected, abs=1e-6)
        assert [i for i, p in enumerate(self.of(**options)) if p] == kept

    def test_of_equals_the_lower_id_comes_first(self):
        assert Sampling(top_k=2).probabilities(torch.zeros(4)).tolist() == [0.5, 0.5, 0, 0]


def test_never_draws_a_token_that_the_tokenizer_lacks():
    """A vocabulary padded to 300: the most likely token, 299, is none of the 256 bytes."""
    model = coin([0.1 / 299] * 299 + [0.9])
    assert len(b"".join(generate(model, BYTES, b"a", length=5, temperature=0))) == 5
    assert len(b"".join(generate(model, BYTES, b"a", length=50))) == 50


def test_an_empty_prompt_is_a_newline():
    model = decoder("near")
    newline, empty = (generate(model, BYTES, p, length=20, temperature=0) for p in (b"\n", b""))
    assert b"".join(newline) == b"".join(empty)
    assert empty.prompt_tokens == 1


def test_leaves_gradients_to_the_consumer_and_goes_to_evaluation_mode():
    model = decoder("near", dropout=0.5).train()
    greedy = [b"".join(generate(model, BYTES, PROMPT, length=20, temperature=0)) for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert not model.training
    next(generate(model, BYTES, PROMPT, length=2))
    assert torch.is_grad_enabled()


def test_report():
    generation = generate(decoder("near"), BYTES, PROMPT, length=7)
    list(generation)
    assert (generation.tokens, generation.prompt_tokens) == (7, 18)
    assert generation.seconds > 0
    assert generation.prompt_seconds > 0
    assert generation.report().startswith("7 tokens, ")
    assert generation.report().endswith(f"state {generation.state_bytes:,} bytes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1 token, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"temperature": 0, "top_k": 5}, "no effect"),
        ({"temperature": 0, "top_p": 0.5}, "no effect"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**63}, "seed must be from 0 to"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        generate(decoder("near"), BYTES, PROMPT, **({"length": 5} | options))


def test_a_prompt_that_the_tokenizer_cannot_encode():
    model, tokenizer = decoder("near", vocab_size=3), CharacterTokenizer("abc")
    with pytest.raises(ValueError, match="prompt: byte 2: character 'd'"):
        generate(model, tokenizer, b"abd", length=5)
    with pytest.raises(ValueError, match="empty prompt stands for a newline"):
        generate(model, tokenizer, b"", length=5)


def test_weights_that_diverged():
    model = coin([0.5, 0.5])
    nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        next(generate(model, Letters(2), b"a", length=5))


class TestPrintable:
    def test_characters_come_whole(self):
        text = "aé€😀\n"
        pieces = [bytes([byte]) for byte in text.encode()]
        assert list(printable(pieces)) == list(text)

    def test_what_is_not_utf8_is_replaced(self):
        assert "".join(printable([b"a\xff", b"b"])) == "a\ufffdb"
        assert "".join(printable([b"\xe2", b"\x82", b"b"])) == "\ufffdb"

    def test_a_character_cut_off_at_the_end(self):
        assert list(printable([b"a", b"\xe2", b"\x82"])) == ["a", "\ufffd"]
