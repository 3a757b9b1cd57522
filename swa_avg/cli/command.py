"""How a command parses its options and shows its help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

__all__ = ["Command"]

_COLUMN = 30  # click's own limit for the column of option names
_REPLACED = {
    "--decay": "--method ema:DECAY",
    "--sigma-rel": "--method power-ema:SIGMA_REL",
    "--weights": "--method weights:W,W,...",
}


class Command(click.Command):
    """A command whose `--help` lists its options under headings, and ends with examples.

    Args:
        sections: Heading -> the options under it; any other option is listed last.
        values: Heading -> rows of what an option may be, and what that means.
        examples: Command lines that run.
    """

    def __init__(
        self,
        name: str | None,
        *,
        sections: Mapping[str, Sequence[click.Option]],
        values: Mapping[str, Sequence[tuple[str, str]]] | None = None,
        examples: Sequence[str],
        params: Sequence[click.Parameter] | None = None,
        **attributes: Any,
    ) -> None:
        options = [option for section in sections.values() for option in section]
        super().__init__(name, params=[*(params or ()), *options], **attributes)
        self.sections = sections
        self.values = values or {}
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in _REPLACED and any(option.name == "method" for option in self.params):
                replacement = _REPLACED[error.option_name]
                problem = f"no such option: {error.option_name}; use {replacement}"
                raise click.UsageError(problem, ctx) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = [option for section in self.sections.values() for option in section]
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        others = [option for option in options if option not in listed]
        rows: dict[str, Sequence[tuple[str, str]]] = {
            heading: [row for option in section if (row := option.get_help_record(ctx)) is not None]
            for heading, section in {**self.sections, "Other": others}.items()
        }
        rows.update(self.values)
        # One width for all sections, each of which click would lay out by itself.
        width = min(max(len(name) for section in rows.values() for name, _ in section), _COLUMN)
        for heading, section in rows.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), text) for name, text in section])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")
