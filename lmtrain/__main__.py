"""`python -m lmtrain` is the command `lmtrain`."""

import sys

from launch.cli import main

sys.exit(main())
