"""The command line: its commands put together, and errors as one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem
from click_default_group import DefaultGroup

from swa_avg import __version__
from swa_avg.commands.average import average
from swa_avg.commands.inspect import inspect
from swa_avg.commands.sweep import sweep
from swa_avg.commands.verify import verify
from swa_avg.errors import MismatchError, SwaAvgError, SystemRefusalError, escape

__all__ = ["main"]


class _Group(DefaultGroup):  # type: ignore[misc]
    """The commands; help and completion treat the default command's options as the program's own."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        command = self.commands[self.default_cmd_name]
        inner = click.Context(command, info_name=ctx.info_name)
        command.format_usage(inner, formatter)
        command.format_help_text(inner, formatter)
        command.format_options(inner, formatter)
        self.format_commands(ctx, formatter)
        self.format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing and not args:  # completing the first word: it may be a command
            return click.Group.parse_args(self, ctx, args)
        return list(super().parse_args(ctx, args))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        command = self.commands[self.default_cmd_name]
        inner = click.Context(command, info_name=ctx.info_name)
        if incomplete.startswith("-"):
            return list(command.shell_complete(inner, incomplete))
        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="file")]


@click.group(cls=_Group, default="average", default_if_no_args=True)
@click.version_option(__version__)
def main_group() -> None:
    """Average Keras checkpoints."""


for _command in (average, inspect, sweep, verify):
    main_group.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 2 usage, 3 to 5 by the error's class, 130 or 143 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_signal)
    try:
        main_group.main(prog_name="swa-avg", standalone_mode=False)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
        code = 0
    except SwaAvgError as error:
        lines = (
            [str(finding) for finding in error.findings]
            if isinstance(error, MismatchError)
            else [_message(error)]
        )
        for line in lines:
            click.echo(f"swa-avg: error: {escape(line)}", err=True)
        code = error.exit_code
    except click.UsageError as error:
        click.echo(f"swa-avg: error: {escape(error.format_message())} (see swa-avg --help)", err=True)
        code = 2
    except _SignalError as received:
        word = "interrupted" if received.number == signal.SIGINT else "terminated"
        click.echo(f"swa-avg: {word}; nothing was written", err=True)
        code = 128 + received.number
    except MemoryError:
        click.echo("swa-avg: error: out of memory; use fewer --threads, or --max-memory", err=True)
        code = 5
    except OSError as error:
        if error.filename is not None:
            raise
        # Standard output is full or closed; the average itself is written by now.
        click.echo(f"swa-avg: error: {error.strerror or error}", err=True)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 5
    sys.exit(code)


class _SignalError(BaseException):
    """SIGINT or SIGTERM, raised where the program stands so that everything is cleaned up."""

    def __init__(self, number: int) -> None:
        self.number = number


def _raise_signal(number: int, frame: Any) -> NoReturn:
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise _SignalError(number)


def _message(error: SwaAvgError) -> str:
    if isinstance(error, SystemRefusalError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
