"""The entropy-floor experiment: which selections learn to read ahead, on letters that nobody can predict.

    python benchmarks/floor.py [--only NAME ...] [--steps N] [--json FILE]

Every configuration of configs/leak is trained on fresh letters and scored on 4,096 other sequences: in one pass, by
quarter of the sequence, and, where it selects ahead, prefix by prefix. Distances are nats per token from ln 4; what is
below 0 was read from later letters. docs/causality.md says what to expect.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from report import publish

from lmtrain.config import ConfigError, load, shipped_configs
from lmtrain.floor import FloorReport, trial
from lmtrain.waiting import Waiting, to_stderr


def row(name: str, report: FloorReport) -> dict[str, Any]:
    """The numbers of one configuration."""
    alone = report.prefix_wise
    return {
        "config": name,
        "causality": report.causality,
        "one pass": report.one_pass.mean - report.floor,
        "standard error": report.one_pass.standard_error,
        **{f"quarter {i + 1}": quarter.mean - report.floor for i, quarter in enumerate(report.quarters)},
        "prefix-wise": None if alone is None else alone.mean - report.floor,
        "its standard error": None if alone is None else alone.standard_error,
        "below": report.below,
        "steps": report.steps,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in shipped_configs() if name.startswith("leak/")]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--steps", type=int, help="instead of those of the configurations")
    parser.add_argument("--json", help="where to keep the numbers")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        try:
            config = load(name)
        except ConfigError as error:
            to_stderr(f"{name} is left out: {error}")
            continue
        steps = arguments.steps or config.train.steps
        model = dataclasses.replace(config.model, vocab_size=config.data.alphabet)
        config = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, steps=steps))
        report = trial(config, watch=Waiting())
        rows.append(row(name, report))
        to_stderr(f"{name}: {report.verdict}")
    print("nats per token from ln 4, by one pass, in all and by quarter of the sequence, and prefix by prefix")
    publish(rows, arguments.json)


if __name__ == "__main__":
    main()
