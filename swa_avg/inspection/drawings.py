"""Pictures of how checkpoints lie to each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swa_avg.inspection.geometry import Geometry
from swa_avg.pages.pictures import Axes, Draw, Theme, legend, plain

__all__ = ["distance_matrix", "trajectory"]

Array = NDArray[np.float64]

_LABELS = 8
_WRITTEN_OUT = 10  # checkpoints up to which the matrix shows numbers


def trajectory(geometry: Geometry, labels: Sequence[str], average: str) -> Draw:
    """Draw the checkpoints in the plane of their two main directions, with the average marked.

    `labels`: one a checkpoint, of which a few are shown; `average`: what the mean is called.
    """

    def draw(axes: Axes, theme: Theme) -> None:
        plane = geometry.plane
        points, count = plane.points, len(labels)
        axes.plot(points[:, 0], points[:, 1], color=theme.muted, linewidth=0.9, zorder=2)
        size = 36 if count <= 30 else 16 if count <= 200 else 8
        edge = 0.5 if count <= 30 else 0.0
        colors = theme.colormap(np.linspace(0.0, 1.0, count))
        axes.scatter(
            points[:, 0], points[:, 1], c=colors, s=size, edgecolors=theme.muted, linewidths=edge, zorder=3
        )
        axes.scatter(
            plane.average[0],
            plane.average[1],
            marker="*",
            s=190,
            color=theme.accent,
            edgecolors=theme.paper,
            zorder=5,
            label=average,
        )
        outliers = list(geometry.outliers)
        if outliers:
            axes.scatter(
                points[outliers, 0],
                points[outliers, 1],
                s=150,
                facecolors="none",
                edgecolors=theme.alert,
                linewidths=1.6,
                zorder=4,
                label="outlier",
            )
        for row in _spread_out(points, plane.average, outliers):
            axes.annotate(
                plain(labels[row]),
                points[row],
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=9,
                zorder=6,
                parse_math=False,
                bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.5, "alpha": 0.7},
            )
        first, second = (f"{100 * share:.0f} % of the scatter" for share in plane.explained)
        axes.set(
            title="Trajectory", xlabel=f"first direction ({first})", ylabel=f"second direction ({second})"
        )
        axes.margins(0.12)
        if plane.explained[1] > 0.0:
            axes.set_aspect("equal", adjustable="datalim")
        axes.grid(True)
        legend(axes, "Trajectory")

    return draw


def _spread_out(points: Array, average: Array, always: Sequence[int]) -> list[int]:
    """Choose whose labels to show, clear of each other and of the average: the ends, then evenly."""
    last = len(points) - 1
    few, many = (
        np.linspace(0, last, number).round().astype(int).tolist() for number in (_LABELS, 4 * _LABELS)
    )
    least = 0.09 * float(np.ptp(points, axis=0).max(initial=0.0))
    chosen = list(always)
    for row in (last, 0, *few, *many):
        taken = np.array([average, *points[chosen]])
        away = bool((np.linalg.norm(taken - points[row], axis=1) > least).all())
        if (away or row == last) and row not in chosen and len(chosen) < _LABELS + len(always):
            chosen.append(row)
    return chosen


def distance_matrix(geometry: Geometry, labels: Sequence[str], axis: str) -> Draw:
    """Draw the distances between all pairs; `axis`: what the labels are."""

    def draw(axes: Axes, theme: Theme) -> None:
        distances, count = geometry.distances, len(labels)
        image = axes.imshow(distances, cmap="viridis", vmin=0.0, interpolation="nearest")
        bar = axes.get_figure().colorbar(image, ax=axes, shrink=0.9)  # type: ignore[union-attr]
        bar.set_label("Euclidean distance of the weights")
        bar.outline.set_visible(False)
        shown = list(range(0, count, -(-count // _WRITTEN_OUT)))
        names = [plain(labels[row]) for row in shown]
        rotation = 90 if max(map(len, names)) > 4 else 0
        axes.set_xticks(shown, names, rotation=rotation, parse_math=False)
        axes.set_yticks(shown, names, parse_math=False)
        axes.set(title="Distances", xlabel=axis, ylabel=axis)
        axes.spines[:].set_visible(False)
        if count <= _WRITTEN_OUT:
            half = distances.max() / 2.0
            for (row, column), value in np.ndenumerate(distances):
                color = "#ffffff" if value <= 1.1 * half else "#111111"
                axes.text(column, row, f"{value:.2g}", color=color, ha="center", va="center", fontsize=8)

    return draw
