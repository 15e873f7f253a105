"""Scaling laws: fitted to runs, with intervals, and without hiding how little they know.

Losses are in one unit throughout (nats per token, or bits per byte); N counts parameters without embeddings, D training
tokens, C training FLOPs. docs/scaling.md has the formulas and what each interval means.
"""

from lmtrain.scaling.fitted import LEVEL, Fitted, Interval, fit, fit_sparse, held_out, problems
from lmtrain.scaling.forms import EFFECTIVE, LOGARITHM, PLAIN, Form, Points, distinct
from lmtrain.scaling.isoflop import IsoFlop, budgets, isoflop
from lmtrain.scaling.search import Laws, search
from lmtrain.scaling.seeds import CONFIDENCE, Mean, holm, mean_of

__all__ = [
    "CONFIDENCE",
    "EFFECTIVE",
    "LEVEL",
    "LOGARITHM",
    "PLAIN",
    "Fitted",
    "Form",
    "Interval",
    "IsoFlop",
    "Laws",
    "Mean",
    "Points",
    "budgets",
    "distinct",
    "fit",
    "fit_sparse",
    "held_out",
    "holm",
    "isoflop",
    "mean_of",
    "problems",
    "search",
]
