"""The command line: its commands put together, and errors as one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem
from click_default_group import DefaultGroup

from swa_avg.cli.average_command import average
from swa_avg.cli.inspect_command import inspect
from swa_avg.cli.sweep_command import sweep
from swa_avg.cli.terminal import say, take_streams
from swa_avg.cli.verify_command import verify
from swa_avg.errors import MismatchError, SwaAvgError, SwaAvgWarning, SystemRefusalError
from swa_avg.interrupts import Interrupted, interrupts

__all__ = ["main"]


class _Group(DefaultGroup):  # type: ignore[misc]
    """The commands; help and completion treat the default command's options as the program's own."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        command = self.commands[self.default_cmd_name]
        inner = click.Context(command, info_name=ctx.info_name)
        command.format_usage(inner, formatter)
        command.format_help_text(inner, formatter)
        command.format_options(inner, formatter)
        with formatter.section("Commands, of which average is the default"):
            formatter.write_dl([(name, each.get_short_help_str()) for name, each in self.commands.items()])
        command.format_epilog(inner, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing and not args:  # completing the first word: it may be a command
            return click.Group.parse_args(self, ctx, args)
        if "--" in args and args[0] not in self.commands:  # which the group would keep from the command
            args = [str(self.default_cmd_name), *args]
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # of which click makes exit code 1, without a word
            raise SystemRefusalError(errno.EIO, "a connection was closed") from error

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        command = self.commands[self.default_cmd_name]
        inner = click.Context(command, info_name=ctx.info_name)
        if incomplete.startswith("-"):
            return list(command.shell_complete(inner, incomplete))
        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="file")]


@click.group(cls=_Group, default="average", default_if_no_args=True)
def main_group() -> None:
    """Average Keras checkpoints."""


for _command in (average, inspect, sweep, verify):
    main_group.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 2 usage, 3 to 5 by the error's class, 130 or 143 interrupted."""
    try:
        output = take_streams()
    except OSError as error:
        _complain(_message(error))
        sys.exit(5)
    interrupts.begin()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupts)
        code = _run()
        if output.failure is not None:
            _complain(f"standard output: cannot write: {output.failure.strerror}")
            code = 5
        interrupts.ignore()
    except Interrupted as interrupted:
        word = "interrupted" if interrupted.number == signal.SIGINT else "terminated"
        say([f"swa-avg: {word}; nothing was written"])
        code = 128 + interrupted.number
    sys.exit(code)


def _run() -> int:
    """Run the command line, tell what went wrong if anything did, and return the exit code."""
    # NumPy starts threads for linear algebra. There is none in averaging, which they delay by a third; in
    # inspecting they wait spinning, and on a machine that has other work, for many times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    warnings.simplefilter("ignore", SwaAvgWarning)  # the commands print them
    try:
        main_group.main(prog_name="swa-avg", standalone_mode=False)
    except MismatchError as error:
        _complain(*error.lines)
        return error.exit_code
    except SwaAvgError as error:
        _complain(_message(error))
        return error.exit_code
    except click.UsageError as error:
        _complain(f"{error.format_message()} (see swa-avg --help)")
        return 2
    except MemoryError:
        _complain("out of memory; use fewer --threads, or --max-memory")
        return 5
    except OSError as error:
        _complain(_message(error))
        return 5
    return 0


def _complain(*problems: str) -> None:
    say(f"swa-avg: error: {problem}" for problem in problems)


def _message(error: OSError | SwaAvgError) -> str:
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    return str(error)
