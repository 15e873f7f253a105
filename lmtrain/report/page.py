"""The report as one HTML file: no script, no request, readable in light and dark. What users named is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lmtrain.report.chart import Chart, safe, short
from lmtrain.report.figures import STATE_LENGTH, state_bytes
from lmtrain.report.svg import draw, style
from lmtrain.scaling import LEVEL
from lmtrain.sweep.comparison import Collected
from lmtrain.sweep.fit import SweepFit
from lmtrain.sweep.fit_text import fit_lines
from lmtrain.sweep.seeds import Cell, Difference, Variants, telling

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="lmtrain report">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{style}
body{{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1300px;margin:2em auto;
padding:0 1em}}
h1,h2{{line-height:1.2}} h2{{margin-top:2em}}
.wide{{overflow-x:auto}} table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
th,td{{padding:.25em .7em;border-bottom:1px solid var(--rule);text-align:left;white-space:nowrap}}
td.number{{text-align:right}} .figures{{display:flex;flex-wrap:wrap;gap:1em}} figure{{margin:0;min-width:0}}
pre{{overflow-x:auto}} .note{{opacity:.8}}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(fits: SweepFit, charts: Sequence[Chart]) -> str:
    """The whole file."""
    collected, variants = fits.collected, Variants(fits.collected)
    parts = [
        f"<h1>{safe(collected.name)}</h1>",
        _summary(collected),
        "<h2>Results</h2>",
        "<p>Means over seeds; ± is the half width of the 95 % interval (Student's t); one seed has none.</p>",
        table(*_results(collected, variants)),
        *_differences(fits),
        "<h2>Figures</h2>",
        '<div class="figures">',
        *(f"<figure>{draw(chart, alone=False)}</figure>" for chart in charts),
        "</div>",
        *_laws(fits),
        *_failed(collected),
        *_commands(collected),
    ]
    return _PAGE.format(title=safe(collected.name), style=style(), body="\n".join(parts))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Numbers, and what begins like one, to the right."""
    cells = [
        "".join(f'<td class="number">{safe(c)}</td>' if _numeric(c) else f"<td>{safe(c)}</td>" for c in row)
        for row in rows
    ]
    names = "".join(f"<th>{safe(name)}</th>" for name in head)
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide"><table>\n<tr>{names}</tr>\n{body}\n</table></div>'


def _numeric(cell: object) -> bool:
    return str(cell).lstrip("+-")[:1].isdigit()


def _summary(collected: Collected) -> str:
    counts = f"{len(collected.runs)} runs, {len(collected.failures)} failed; losses in {collected.unit.name}"
    lines = [f"<p>{counts}, of the validation text.</p>"]
    if collected.unit.note:
        lines.append(f'<p class="note">{safe(collected.unit.note)}</p>')
    if collected.claimed:
        names = ", ".join(run.name for run in collected.claimed)
        lines.append(f"<p>Left out, since one pass of a model that sees ahead is no code length: {safe(names)}.</p>")
    return "\n".join(lines)


def _results(collected: Collected, variants: Variants) -> tuple[list[str], list[list[object]]]:
    head = ["variant", "at", collected.unit.name, "±", "seeds", "N", "N, all", "FLOPs", "tokens/s", "seconds"]
    head += ["peak memory", f"state at {STATE_LENGTH:,}", "strict", "scoring"]
    return head, [_result(collected, cell) for cell in variants.cells]


def _result(collected: Collected, cell: Cell) -> list[object]:
    loss, first = cell.mean(collected.loss), cell.runs[0]
    half = "" if loss.half is None else f"{loss.half:.4f}"
    row: list[object] = [cell.variant, cell.place, f"{loss.value:.4f}", half, ", ".join(str(r.seed) for r in cell.runs)]
    row += [f"{first.parameters:,}", f"{first.parameters_total:,}", f"{first.flops:.3g}"]
    row += [f"{cell.mean(lambda run: run.tokens_per_second).value:,.0f}"]
    row += [f"{cell.mean(lambda run: run.seconds).value:,.1f}"]
    row += [_bytes(cell.mean(lambda run: float(run.peak_memory)).value), _bytes(state_bytes(first))]
    return [*row, "yes" if first.strict else "no", first.scoring]


def _bytes(number: float) -> str:
    return f"{short(number)}B" if number else "unknown"


def _differences(fits: SweepFit) -> list[str]:
    if not fits.differences:
        return []
    other = fits.differences[0].other
    shown, left_out = telling(fits.differences)
    return [
        f"<h2>In pairs with {safe(other)}</h2>",
        f"<p>Loss minus that of {safe(other)} with the same seed, and the half width of its 95 % interval. "
        "p of all: how often chance alone makes one of the differences at this place look so sure.</p>",
        *([f'<p class="note">{left_out}</p>'] if left_out else []),
        table(Difference.head(fits.collected.unit.name), [d.cells() for d in shown]),
    ]


def _laws(fits: SweepFit) -> list[str]:
    """Each law, or why there is none; once, if no mixer has enough runs."""
    parts = ["<h2>Laws</h2>"]
    if not any(fit.laws for fit in fits.fits):
        return [*parts, f"<p>{safe(fits.fits[0].refusal)}.</p>"]
    parts.append(f"<p>In brackets intervals of {LEVEL:.0%}, by drawing runs anew; forks of one trunk together.</p>")
    for fit in fits.fits:
        parts += [f"<h3>{safe(fit.mixer or fits.collected.name)}</h3>", _lines(fit_lines(fit))]
    return parts


def _lines(lines: Sequence[str]) -> str:
    return "<pre>" + "\n".join(safe(line) for line in lines) + "</pre>"


def _failed(collected: Collected) -> list[str]:
    if not collected.failures:
        return ["<h2>Failed runs</h2>", "<p>None.</p>"]
    rows = [
        [f.name, f.reason, f.attempts, "" if f.exit_code is None else f.exit_code, f.log] for f in collected.failures
    ]
    return ["<h2>Failed runs</h2>", table(["run", "why", "attempts", "exit code", "log"], rows)]


def _commands(collected: Collected) -> list[str]:
    """Every command, and each environment once."""
    environments: dict[str, list[str]] = {}
    for run in collected.runs:
        environments.setdefault(_shown(run.environment), []).append(run.name)
    parts = ["<h2>Environment and commands</h2>"]
    for text, names in environments.items():
        which = f"{len(names)} runs" if len(names) > 1 else names[0]
        parts.append(f"<details><summary>environment of {safe(which)}</summary>{_lines(text.splitlines())}</details>")
    commands = [f"{run.name}: {run.command}" for run in collected.runs]
    return [*parts, f"<details><summary>commands</summary>{_lines(commands)}</details>"]


def _shown(environment: dict[str, Any]) -> str:
    """Without what differs from run to run and is shown elsewhere."""
    return json.dumps({key: value for key, value in environment.items() if key != "command"}, indent=1)
