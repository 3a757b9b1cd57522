"""Where pictures and pages are to go: looked at before the work begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from swa_avg.errors import UsageError
from swa_avg.files.publication import check_output

__all__ = ["PAGE", "PICTURES", "checked_outputs"]

PICTURES = (".png", ".svg", ".pdf")
PAGE = (".html",)
Shown = TypeVar("Shown")


def checked_outputs(
    wanted: Mapping[str, tuple[str | Path | None, tuple[str, ...]]],
    renderer: Callable[[str, str], Callable[[Shown], bytes]],
    *,
    overwrite: bool,
) -> dict[Path, Callable[[Shown], bytes]]:
    """Return what draws which file, once it is sure that the file can be written.

    Args:
        wanted: Argument -> the file that it names, None where it was not given; what its name may end with.
        renderer: Returns what draws the file of an argument, with this suffix. It may import matplotlib.
        overwrite: Files that exist may be replaced.

    Raises:
        UsageError: a name ends in something else, the file exists, or matplotlib is missing.
        SystemRefusalError: the system says that it cannot be written.
    """
    outputs = {}
    for argument, (name, suffixes) in wanted.items():
        if name is None:
            continue
        output = Path(name)
        if output.suffix not in suffixes:
            raise UsageError(f"{argument} {output}: expected a name that ends with {' or '.join(suffixes)}")
        check_output(output, overwrite=overwrite)
        try:
            outputs[output] = renderer(argument, output.suffix)
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            raise UsageError(f"{argument} {output}: needs matplotlib; pip install 'swa-avg[plot]'") from None
    return outputs
