"""`python -m swa_avg` is the same program as `swa-avg`."""

import os
import sys

# Python puts the current folder first on the path. Modules that lie beside checkpoints must not run, and with
# `swa-avg` they do not: as in pip, the folder is removed before anything else is imported. (os is loaded by
# then; pathlib is not.)
try:
    if sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
        del sys.path[0]
except OSError:  # there is no current folder any more
    pass

from swa_avg.cli import main

main()
