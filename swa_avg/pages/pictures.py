"""Pictures for light and dark paper, legible on a phone and with any colour vision."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from swa_avg.errors import escape
from swa_avg.text import counted

__all__ = [
    "DARK",
    "LIGHT",
    "Axes",
    "Draw",
    "Picture",
    "Theme",
    "legend",
    "lines",
    "picture",
    "plain",
    "save",
    "undrawn",
]

Array = NDArray[np.float64]
Draw = Callable[[Axes, "Theme"], None]

_LOGARITHMIC = 30.0
_LARGEST = 1e300
"""Beyond it, the differences that axes are laid out by are infinite."""


@dataclass(frozen=True)
class Theme:
    """Colours; those of series are Okabe and Ito's (2008), lightened or darkened for the paper."""

    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    accent: str
    alert: str
    ramp: tuple[str, ...]
    """From the first checkpoint to the last."""

    def settings(self) -> Any:
        """Return matplotlib's rcParams."""
        return {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "text.color": self.ink,
            "axes.labelcolor": self.ink,
            "axes.edgecolor": self.muted,
            "xtick.color": self.muted,
            "ytick.color": self.muted,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "axes.grid": False,
            "grid.color": self.grid,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "font.size": 10,
            "font.family": ["DejaVu Sans"],
            "legend.frameon": False,
            "legend.fontsize": 9,
            "axes.axisbelow": True,
            "svg.hashsalt": "swa-avg",
        }

    @property
    def colormap(self) -> LinearSegmentedColormap:
        """The ramp, for values from 0 to 1."""
        return LinearSegmentedColormap.from_list("order", list(self.ramp))


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    muted="#59636e",
    grid="#e3e7eb",
    series=("#0072b2", "#d55e00", "#007a5a", "#b0558a"),
    accent="#d55e00",
    alert="#a13800",
    ramp=("#9ec7e8", "#0072b2", "#00263f"),
)
DARK = Theme(
    paper="#14171b",
    ink="#e7eaee",
    muted="#a3adb8",
    grid="#2b3138",
    series=("#56b4e9", "#ff9d4d", "#3fd0a0", "#e79ac4"),
    accent="#ff9d4d",
    alert="#ffb086",
    ramp=("#2c5678", "#56b4e9", "#e4f4ff"),
)


@dataclass(frozen=True)
class Picture:
    """One picture as two SVG images."""

    caption: str
    light: bytes
    dark: bytes
    width: int
    """CSS pixels."""
    height: int


def picture(caption: str, draw: Draw, size: tuple[float, float] = (4.7, 3.8)) -> Picture:
    """Draw on light and on dark paper; `size` in inches."""
    light, dark = (_rendered([draw], theme, size, ".svg") for theme in (LIGHT, DARK))
    return Picture(caption, light, dark, round(96 * size[0]), round(96 * size[1]))


def save(draws: Sequence[Draw], suffix: str) -> bytes:
    """Return all drawings as one file, two to a row, on light paper; `suffix` is .png, .svg or .pdf."""
    rows = -(-len(draws) // 2)
    columns = min(2, len(draws))
    return _rendered(draws, LIGHT, (5.6 * columns, 4.4 * rows), suffix)


def _rendered(draws: Sequence[Draw], theme: Theme, size: tuple[float, float], suffix: str) -> bytes:
    stream = io.BytesIO()
    with mpl.rc_context(theme.settings()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that the font lacks become boxes
        figure = Figure(figsize=size, layout="constrained")
        columns = min(2, len(draws))
        for number, draw in enumerate(draws, 1):
            draw(figure.add_subplot(-(-len(draws) // columns), columns, number), theme)
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix)
        figure.savefig(stream, format=suffix.removeprefix("."), dpi=160, metadata=metadata)
    return stream.getvalue()


def lines(
    title: str, axis: str, unit: str, positions: Sequence[float], values: Mapping[str, Sequence[float]]
) -> Draw:
    """Draw series over epochs or another axis; those that start with `val_` are dashed with other markers.

    Values that are not finite, or too large (see `undrawn`), leave gaps. Positive values that span more than
    a factor of 30 are drawn on a logarithmic axis.
    """

    def draw(axes: Axes, theme: Theme) -> None:
        shown = {name: _drawable(series) for name, series in values.items()}
        finite = [value for series in shown.values() for value in series[np.isfinite(series)].tolist()]
        for number, (name, series) in enumerate(shown.items()):
            held_out = name.startswith("val_")
            axes.plot(
                positions,
                series,
                color=theme.series[number % len(theme.series)],
                linestyle="--" if held_out else "-",
                marker=("s" if held_out else "o") if len(positions) <= 60 else "",
                markersize=4,
                linewidth=1.6,
                label=legend_text(name),
            )
        if finite and min(finite) > 0.0 and max(finite) > _LOGARITHMIC * min(finite):
            axes.set_yscale("log")
        axes.set_xlabel(plain(axis), parse_math=False)
        axes.set_ylabel(plain(unit), parse_math=False)
        axes.set_title(plain(title), parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True)
        if len(values) > 1:
            legend(axes, title)

    return draw


def _drawable(series: Sequence[float]) -> Array:
    values = np.asarray(series, np.float64)
    return np.where(np.abs(values) <= _LARGEST, values, np.nan)


def undrawn(values: Iterable[float]) -> str:
    """Return the end of a caption where some values are too large to be drawn, else nothing."""
    count = sum(_LARGEST < abs(value) < np.inf for value in values)
    return f" Not drawn, beyond {_LARGEST:.0e} in size: {counted(count, 'value')}." if count else ""


def legend(axes: Axes, title: str) -> None:
    """Put the legend between the title and the axes, where it covers no data."""
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=2,
        borderaxespad=0.0,
        borderpad=0.2,
        handletextpad=0.5,
    )
    rows = -(-len(legend.get_texts()) // 2)
    axes.set_title(plain(title), pad=6 + 16 * rows, parse_math=False)


def legend_text(name: str) -> str:
    """Return a name as matplotlib's legend takes it: `$` would start a formula, a leading `_` hide it."""
    text = plain(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def plain(name: str) -> str:
    text = escape(name)
    return text if len(text) <= 24 else text[:11] + "…" + text[-12:]
