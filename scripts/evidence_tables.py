"""What evidence.py recorded, as the README's section and picture. Needs neither Keras nor what it trains on.

python scripts/evidence_tables.py    print the section, and draw scripts/images/evidence.png
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]

RECORD = Path(__file__).with_name("evidence.jsonl")
PICTURE = Path(__file__).with_name("images") / "evidence.png"
BASELINE = "last, refreshed"
RIVAL = "a run with cosine decay, last"
COLUMNS = {
    ("images", "constant"): "images, constant rate",
    ("images", "cyclic"): "images, cyclic rate",
    ("text", "constant"): "text",
    ("tabular", "constant"): "tabular",
    ("digits", "constant"): "digits",
}
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom."""


def load(path: Path = RECORD) -> list[Record]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def key(record: Record) -> tuple[str, str, int]:
    return record["workload"], record["schedule"], record["seed"]


def measure(scores: dict[str, float]) -> float:
    """Return what is better the higher it is: accuracy in %, or where there is none, minus the loss."""
    return 100.0 * scores["accuracy"] if "accuracy" in scores else -scores["loss"]


def minus_loss(scores: dict[str, float]) -> float:
    return -scores["loss"]


def column(
    records: Sequence[Record], where: tuple[str, str], of: Callable[[dict[str, float]], float] = measure
) -> dict[str, np.ndarray]:
    """Return contender -> its measure, one value a seed; of a cosine decay, of the same seeds."""
    workload, schedule = where
    runs = {key(record): record["scores"] for record in records}
    seeds = sorted(seed for *found, seed in runs if tuple(found) == where)
    values = {
        title: np.array([of(runs[workload, schedule, seed][title]) for seed in seeds])
        for title in runs[workload, schedule, seeds[0]]
    }
    # A decayed rate leaves moving statistics that have settled: the rival takes what suits it better.
    rivals = [
        np.array([of(runs[workload, "cosine", seed][title]) for seed in seeds])
        for title in ("last, as saved", BASELINE)
    ]
    return {**values, RIVAL: max(rivals, key=np.mean)}


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the mean of paired differences, and half the width of its 95 % interval by Student's t."""
    count = len(differences)
    return float(differences.mean()), float(T_QUANTILES[count - 2] * differences.std(ddof=1) / count**0.5)


def compared(better: np.ndarray, worse: np.ndarray) -> str:
    """Return a paired difference in words: its mean, its interval, and in how many runs it is above 0."""
    differences = better - worse
    if not differences.any():
        return "the same"
    digits = 2 if worse.mean() > 0 else 3  # points of accuracy, or loss
    mean, half = interval(differences)
    return f"{mean:+.{digits}f} ± {half:.{digits}f} ({(differences > 0).sum()})"


def table(records: Sequence[Record]) -> str:
    """Return all contenders as a table in Markdown."""
    columns = {title: column(records, where) for where, title in COLUMNS.items()}
    cells = {BASELINE: [_plain(found[BASELINE]) for found in columns.values()]}
    for title in dict.fromkeys(title for found in columns.values() for title in found):
        if title != BASELINE:
            cells[title] = [compared(found[title], found[BASELINE]) for found in columns.values()]
    heads = [f"{title}, n = {len(found[BASELINE])}" for title, found in columns.items()]
    rows = [["", *heads], ["---", *["---:"] * len(heads)], *([title, *row] for title, row in cells.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(values: np.ndarray) -> str:
    mean = values.mean()
    return f"{mean:.2f} %" if mean > 0 else f"{-mean:.3f}"


def draw(records: Sequence[Record], picture: Path = PICTURE) -> None:
    """Draw gains by contender, and gains of windows against what `inspect` sees of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), constrained_layout=True, gridspec_kw={"width_ratios": (1.35, 1)}
    )
    titles = [
        "mean of the last 2",
        "mean of the last 4",
        "mean of the last 8",
        "mean of all 16",
        "power-ema:0.1",
        "greedy soup",
        "what `sweep` chose",
        RIVAL,
    ]
    for number, (where, name) in enumerate(COLUMNS.items()):
        found = column(records, where, minus_loss)
        gains = [100.0 * (found[title] - found[BASELINE]) / -found[BASELINE] for title in titles]
        means, halves = np.array([interval(gain) for gain in gains]).T
        places = np.arange(len(titles))[::-1] + 0.24 - 0.12 * number
        left.errorbar(
            means, places, xerr=halves, fmt="o", markersize=3.5, linewidth=1, color=f"C{number}", label=name
        )
    left.set_yticks(np.arange(len(titles))[::-1], [title.replace("`", "") for title in titles])
    left.set_xlabel(
        "test loss, % lower than that of the last checkpoint, refreshed\n(mean and 95 % interval)"
    )
    left.legend(frameon=False, fontsize=8)
    colours = {"images": "C0", "text": "C2", "tabular": "C3", "digits": "C4"}
    for name, colour in colours.items():
        points = [window for window in windows(records) if window["workload"] == name]
        right.plot(
            [window["balance"] for window in points],
            [100.0 * gain(window) for window in points],
            "o",
            markersize=2.5,
            alpha=0.6,
            markeredgewidth=0,
            color=colour,
            label=name,
        )
    right.axvline(THRESHOLD, color="0.4", linewidth=1, linestyle="--")
    right.set_xlabel("distance of the last checkpoint to the mean,\nrelative to that of the first")
    right.set_ylabel("loss of the mean, % lower than the last's")
    right.legend(frameon=False, fontsize=8, loc="upper left")
    right.set_ylim(-12, 35)
    for axis in (left, right):
        (axis.axvline if axis is left else axis.axhline)(0.0, color="0.6", linewidth=0.8)
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(picture, dpi=110)


def windows(records: Sequence[Record]) -> list[Record]:
    """Return the windows of all runs, with the workloads that they are of."""
    return [
        {**window, "workload": record["workload"], "schedule": record["schedule"]}
        for record in records
        for window in record["windows"]
    ]


def gain(window: Record) -> float:
    """Return by which share the loss of a window's mean is lower than that of its last checkpoint."""
    return 1.0 - float(window["mean"] / window["alone"])


THRESHOLD = 0.9


def section(records: Sequence[Record]) -> str:
    return table(records)


if __name__ == "__main__":
    recorded = load()
    print(section(recorded))
    draw(recorded)
