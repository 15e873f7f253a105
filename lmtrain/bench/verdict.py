"""In words: from which length on a mixer pays, and where it loses."""

from __future__ import annotations

from collections.abc import Sequence

from lmtrain.bench.results import Comparison, Part, Pass

LEGEND = "x: times as fast as the baseline; ?: too close to call, the repeats of the two overlap"
PARTS: dict[Part, str] = {"mixer": "whole mixer", "attention": "attention alone"}
MORE_MEMORY = 1.05  # of the baseline's: less is not worth a word


def verdicts(comparisons: Sequence[Comparison]) -> dict[str, list[str]]:
    """For each name a sentence per part."""
    found: dict[str, list[str]] = {}
    for c in comparisons:
        found.setdefault(c.name, []).append(f"{PARTS[c.part]} beside {c.baseline}: {_verdict(c)}.")
    return found


def speed_up(c: Comparison, length: int, which: Pass) -> str:
    """`1.66x`, or `1.02x?` where the repeats of the two overlap."""
    return f"{c.speed_up(length, which):.2f}x" + ("?" if c.close(length, which) else "")


def faster_from(c: Comparison, which: Pass) -> str:
    """`2,048 (~1,340)`: the least measured length, and where the curves cross; `?` if at the longest none is ahead."""
    found = c.crossover(which)
    return "" if found is None else f"{found}{'?' if c.close(c.lengths[-1], which) else ''}"


def _verdict(c: Comparison) -> str:
    if not c.lengths:
        return "never measured at one length"
    longest = c.lengths[-1]
    clauses = [
        f"{_from_where(c)}; {speed_up(c, longest, 'both')} at {longest:,}, "
        f"where living pairs alone would allow {c.bound(longest):.2f}x"
    ]
    lost = [f"{words} at {found}" for words, which in _WAYS if (found := _losses(c, which))]
    clauses.append(f"slower {'; '.join(lost)}" if lost else "slower nowhere")
    if (memory := c.memory(longest)) > MORE_MEMORY:
        clauses.append(f"holds {memory:.2f} times the memory at {longest:,}")
    return "; ".join(clauses)


_WAYS: tuple[tuple[str, Pass], ...] = (("forward + backward", "both"), ("forward alone", "forward"))


def _from_where(c: Comparison) -> str:
    if c.close(c.lengths[-1], "both"):
        return f"level with it at {c.lengths[-1]:,}, the longest"
    found = c.crossover("both")
    assert found is not None
    if found.first is None:
        beaten = len(c.loses("both")) == len(c.lengths)
        return f"loses everywhere up to {c.lengths[-1]:,}" if beaten else f"loses at {c.lengths[-1]:,}, the longest"
    if found.crossing is None:
        return f"faster from {found.first:,} on, the shortest measured"
    return f"faster from {found.first:,} on (measured; the curves cross near {found.crossing:,.0f})"


def _losses(c: Comparison, which: Pass) -> str:
    return ", ".join(f"{length:,} ({speed_up(c, length, which)})" for length in c.loses(which))
