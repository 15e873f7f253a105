"""What a command prints: text for people, or with --json one object for machines."""

import argparse
import json
from collections.abc import Callable
from typing import Any


def show(arguments: argparse.Namespace, to_json: Callable[[], Any], to_text: Callable[[], str]) -> None:
    """Print the one that was asked for; the other is not made."""
    print(json.dumps(to_json(), indent=1, allow_nan=False) if arguments.json else to_text())
