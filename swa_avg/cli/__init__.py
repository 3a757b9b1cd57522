"""The command line: options in, messages and exit codes out."""

import gc

# Hardly anything that is imported becomes garbage: to look for some at every 700 objects takes a tenth of
# `--help`. What runs for long makes more objects than this.
gc.set_threshold(100_000)

from swa_avg.cli.program import main  # noqa: E402

__all__ = ["main"]
