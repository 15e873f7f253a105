"""`python -m lmtrain` is the command `lmtrain`."""

import sys
from pathlib import Path

# `python -m` looks into the current folder first: a file `data.py` there must not stand in for our package `data`.
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parent.parent:
    del sys.path[0]

from launch.cli import main

sys.exit(main())
