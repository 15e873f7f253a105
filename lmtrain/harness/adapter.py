"""Adapter for lm-evaluation-harness: its tasks on our checkpoints. Needs the extra `harness`.

    python -m lmtrain.harness --model lmtrain --model_args run=runs/demo --tasks lambada_openai

is `python -m lm_eval` with the model `lmtrain` known to it. Arguments: run, a run's folder or one of its checkpoints;
max_length, batch_tokens as of `lmtrain.harness.requests`. Batches are of equal tokens, so its --batch_size is not used,
and --device neither: the model is where `lmtrain eval` would have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'lmtrain[harness]'") from error

from lmtrain.harness.requests import Requests
from lmtrain.restore import open_run


@register_model("lmtrain")
class LMTrain(LM):
    """A trained run, as the harness calls models."""

    def __init__(
        self,
        run: str,
        max_length: int | None = None,
        batch_tokens: int = 16384,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.requests = Requests(open_run(run), max_length, batch_tokens)

    def loglikelihood(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ln p, whether greedy decoding would write it) of each (context, continuation)."""
        answers = self.requests.log_likelihoods(request.args for request in requests)
        return [(answer.log_likelihood, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each (text,)."""
        return self.requests.rolling(request.args[0] for request in requests)

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each (prompt, options)."""
        return self.requests.continuations(request.args for request in requests)
