"""Continuations of several prompts at once, each as it would be alone.

All rows read as many tokens as the shortest prompt has in one pass; from there on every row reads one at a time: its
own prompt as far as it goes, then what was drawn for it. So no row is padded, and a strict model says of each what it
says of it alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lmtrain.generate import PREFILL_TOKENS, Rereader, Sampling
from lmtrain.model import DecoderLM


@dataclass(frozen=True)
class Prompt:
    """What to go on from, ids [n] with n > 0, for `length` tokens or until `ends` says yes to what was written."""

    ids: np.ndarray
    length: int
    ends: Callable[[Sequence[int]], bool]
    sampling: Sampling
    seed: int


@torch.no_grad()
def write_together(model: DecoderLM, vocabulary: int, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The ids, below `vocabulary`, that follow each prompt. The model has no table of positions, and is strict."""
    assert model.positions is None, "a table of positions is read anew for each token"
    assert model.causality == "strict", "a token would change what those before it mean"
    state = model.init_state(len(prompts))
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    left = set(range(len(prompts)))
    read = min(len(prompt.ids) for prompt in prompts)
    unread = torch.from_numpy(np.stack([prompt.ids[:read] for prompt in prompts]).astype(np.int64))
    while left:
        for part in unread.to(model.head_weight.device).split(max(1, PREFILL_TOKENS // len(prompts)), 1):
            hidden_BTD = model.hidden(part, state=state).y
        logits_BV = F.linear(hidden_BTD[:, -1], model.head_weight)[:, :vocabulary].cpu()
        following = torch.zeros(len(prompts), 1, dtype=torch.int64)  # rows that are done read on, and nobody looks
        for row, prompt in enumerate(prompts):
            if read < len(prompt.ids):
                following[row] = int(prompt.ids[read])
            elif row in left:
                following[row] = prompt.sampling.draw(logits_BV[row], generators[row])
                written[row].append(int(following[row]))
                if len(written[row]) == prompt.length or prompt.ends(written[row]):
                    left.discard(row)
        unread, read = following, read + 1
    return written


def write_alone(model: DecoderLM, vocabulary: int, prompt: Prompt) -> list[int]:
    """The ids, below `vocabulary`, that follow the prompt, of a model with a table of positions."""
    assert model.positions is not None, "others need not read anew"
    reader = Rereader(model, model.positions.num_embeddings)
    generator = torch.Generator().manual_seed(prompt.seed)
    written: list[int] = []
    unread = prompt.ids
    while len(written) < prompt.length and not (written and prompt.ends(written)):
        written.append(prompt.sampling.draw(reader.read(unread)[:vocabulary].cpu(), generator))
        unread = np.array(written[-1:])
    return written
