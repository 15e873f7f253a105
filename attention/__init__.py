"""Sequence mixers: which keys each query may meet, and the one attention operation that serves them all.

Every file of this folder is imported here, so a mixer registers itself by being in the folder.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
