"""Primitives of pages and pictures, which matplotlib draws."""

from __future__ import annotations

import contextlib
import os
import sys


def _import_matplotlib() -> None:
    """Import it whatever MPLBACKEND says.

    A name of no backend would end the import, though none is needed to draw into files. One that there is
    counts as before, for what else draws in this process.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl

        if backend is not None:
            with contextlib.suppress(ValueError):
                mpl.rcParams["backend"] = backend
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


_import_matplotlib()
