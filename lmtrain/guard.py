"""Steps that went wrong, their update skipped or their loss a spike: what is told of them, and the way back.

All ranks see the same numbers, and decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lmtrain.config import Config
from lmtrain.counters import Counters
from lmtrain.offending import Offending
from lmtrain.resume import choose_before
from lmtrain.run import RunFolder
from lmtrain.spikes import Spikes, Verdict
from lmtrain.step import Step
from parallel.agree import by_first
from parallel.engine import Engine, StepInfo
from parallel.world import World


@dataclass(frozen=True)
class Trouble:
    """Why training rolls back. final: if it cannot, it gives up; else it goes on."""

    reason: str
    final: bool


class Guard:
    """Watches over the steps of a run, whose `counters` it is given to read, and to change when it rolls back."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        world: World,
        counters: Counters,
        offending: Offending,
        complain: Callable[[str], None],
    ) -> None:
        self.config, self.run, self.world, self.counters = config, run, world, counters
        self.offending, self.complain = offending, complain
        self.spikes = Spikes()
        self._spike: Verdict | None = None  # of the last step, if it was one

    def update(self, engine: Engine, lr: float) -> StepInfo:
        """The engine's step; if it is a spike, it changes nothing with the policy `skip`."""
        self._spike = None
        if self.config.train.spikes == "skip":
            return engine.step(lr, self._is_usual)
        info = engine.step(lr)
        if not info.skipped:
            self._is_usual(info.loss, info.grad_norm)
        return info

    def _is_usual(self, loss: float, grad_norm: float) -> bool:
        verdict = self.spikes.judge(loss, grad_norm)
        if verdict.beyond(self.config.train.spike_limit):
            self._spike = verdict
        return self._spike is None

    def tell(self, step: Step, first_sample: int) -> None:
        """What was wrong with the step that is counted last, if anything was; it read from `first_sample` on."""
        if self._spike is None and not step.info.skipped:
            return
        told = {"step": self.counters.step, "loss": step.info.loss, "grad_norm": step.info.grad_norm}
        kept = self.offending.keep(step.batches, told, first_sample)
        where = f"; its batch: {self.run.path / kept}" if kept else ""
        if (spike := self._spike) is not None:
            policy, deviations = self.config.train.spikes, {"loss": spike.loss, "grad_norm": spike.grad_norm}
            samples = [first_sample, self.counters.samples]
            self.run.event("spike", policy=policy, **told, deviations=deviations, samples=samples, offending=kept)
            self.complain(
                f"spike at step {told['step']}: loss {step.info.loss:.4f} is {spike.loss:.1f} deviations above what is "
                f"usual, the gradient norm {step.info.grad_norm:.2f} {spike.grad_norm:.1f}{where}"
            )
        if step.info.skipped:
            self.run.event("skip", **told, offending=kept)
            if spike is None:
                self.complain(
                    f"the update of step {told['step']} was skipped: loss {step.info.loss:.4f}, "
                    f"gradient norm {step.info.grad_norm:.2f}{where}"
                )

    def trouble(self, info: StepInfo) -> Trouble | None:
        """Whether to go on behind the last step, of which `info` is."""
        numbers = f"(loss {info.loss}, gradient norm {info.grad_norm})"
        skips = self.counters.skips_in_a_row
        if skips >= self.config.train.max_skips:
            return Trouble(f"{skips} updates in a row were skipped {numbers}", final=True)
        if self._spike is not None and self.config.train.spikes == "rollback":
            return Trouble(f"a spike {numbers}", final=self._too_often)
        return None

    @property
    def _too_often(self) -> bool:
        return self.counters.rollbacks >= self.config.train.max_rollbacks

    def roll_back(self, reason: str, load: Callable[[str], None]) -> bool:
        """Go back to the newest checkpoint before the trouble, never to read again what was read since; False if there
        is none, or it was done too often. (The same samples would bring the same weights to the same place.)

        load: takes over the checkpoint at a path, counters included.
        """
        if self._too_often or self.config.data.stream:
            return False
        counters, before = self.counters, replace(self.counters)
        good = before.step - max(before.skips_in_a_row, 1)
        path = by_first(self.world, lambda: choose_before(self.run, good, self.complain))
        if path is None:
            return False
        load(path)
        counters.rollbacks = before.rollbacks + 1
        counters.unread = (*before.unread, (counters.samples, before.samples))
        self.run.set_status("running", step=counters.step, checkpoint=path)
        samples = [counters.samples, before.samples]
        self.run.event("rollback", step=before.step, to=counters.step, samples=samples, reason=reason)
        self.complain(
            f"step {before.step}: {reason}: back to step {counters.step}, and on without the samples "
            f"{counters.samples} to {before.samples - 1} "
            f"(roll-back {counters.rollbacks} of {self.config.train.max_rollbacks})"
        )
        return True
