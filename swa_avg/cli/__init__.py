"""The command line: options in, messages and exit codes out."""

from swa_avg.cli.program import main

__all__ = ["main"]
