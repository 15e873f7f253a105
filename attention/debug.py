"""Numbers that are not finite, stopped where they arise instead of where they end up.

Usually a NaN flows on to the loss, and the update is skipped. Whoever wants to know where it came from runs with
`debug` in the context: then the first tensor that is not finite raises, and says which one it is.
"""

from __future__ import annotations

from torch import Tensor

from attention.mixer import Context


def check_finite(ctx: Context | None, what: str, x: Tensor) -> None:
    """Raise FloatingPointError if `ctx.debug` and x holds a NaN or an infinity; `what`: x in words, as a plural.

    Costs nothing otherwise; with `debug` it waits for the device.
    """
    if ctx is None or not ctx.debug:
        return
    bad = ~x.detach().isfinite()
    if not bad.any():
        return
    nan = int(x.isnan().sum())
    place = "".join(f"layer {part}: " if isinstance(part, int) else f"{part}: " for part in ctx.place)
    first = f", the first at {bad.nonzero()[0].tolist()} of {list(x.shape)}" if x.dim() else ""
    raise FloatingPointError(
        f"{place}{what} are not finite: {nan:,} NaN and {int(bad.sum()) - nan:,} infinite of {x.numel():,}{first}"
    )
