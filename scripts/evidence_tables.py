"""What evidence.py recorded, as tables, sentences and a picture. Needs neither Keras nor what it trains on.

python scripts/evidence_tables.py    print all of it, and draw scripts/images/evidence.png
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swa_avg.inspection.movement import LEVEL

Record = dict[str, Any]

RECORD = Path(__file__).with_name("evidence.jsonl")
PICTURE = Path(__file__).with_name("images") / "evidence.png"
REFRESHED, SAVED, CHOSEN = "last, refreshed", "last, as saved", "what `sweep` chose"
ALT = "Gains by contender, and gains of series of checkpoints by their pace"
RIVAL = "a run with cosine decay, last"
SAME = {"mean of all 16": "mean of all 16, or decay:linear"}
SUMMARY = (SAVED, "mean of the last 4", "mean of all 16", CHOSEN, RIVAL)
"""What the README's table has beside the last checkpoint, refreshed."""
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
    seeds = [
        seed
        for name, kind, seed in runs
        if (name, kind) == where and (name, "cosine", seed) in runs  # not where a run was interrupted
    ]
    values = {
        title: np.array([of(runs[workload, schedule, seed][title]) for seed in seeds])
        for title in runs[workload, schedule, seeds[0]]
    }
    # A decayed rate leaves moving statistics that have settled: the rival takes what suits it better.
    rivals = [
        np.array([of(runs[workload, "cosine", seed][title]) for seed in seeds])
        for title in ("last, as saved", REFRESHED)
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


def table(records: Sequence[Record], titles: Sequence[str] = ()) -> str:
    """Return these contenders, or all, as a table in Markdown."""
    columns = {title: column(records, where) for where, title in COLUMNS.items()}
    cells = {REFRESHED: [_plain(found[REFRESHED]) for found in columns.values()]}
    for title in dict.fromkeys(title for found in columns.values() for title in found):
        if title in titles or (not titles and title not in (REFRESHED, "decay:linear")):
            cells[SAME.get(title, title)] = [
                compared(found[title], found[REFRESHED]) for found in columns.values()
            ]
    heads = [f"{title}, n = {len(found[REFRESHED])}" for title, found in columns.items()]
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
        gains = [100.0 * (found[title] - found[REFRESHED]) / -found[REFRESHED] for title in titles]
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
            [window["pace"] for window in points],
            [100.0 * window["gain"] for window in points],
            "o",
            markersize=2.5,
            alpha=0.6,
            markeredgewidth=0,
            color=colour,
            label=name,
        )
    right.axvline(LEVEL, color="0.4", linewidth=1, linestyle="--")
    right.set_xlabel("pace: length of the later half of the steps,\nrelative to the earlier half")
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
    """Return the windows of all runs, with the workloads that they are of, and the gain of each one's mean:
    the share by which its loss is lower than that of the last checkpoint."""
    return [
        {
            **window,
            "workload": record["workload"],
            "schedule": record["schedule"],
            "gain": 1.0 - window["mean"] / window["alone"],
        }
        for record in records
        for window in record["windows"]
    ]


def helped(some: Sequence[Record]) -> int:
    """Return the percentage of windows whose mean is better than their last checkpoint."""
    return round(100.0 * float(np.mean([window["gain"] > 0.0 for window in some])))


def hit_rates(some: Sequence[Record], feature: str) -> dict[str, int]:
    """Return workload -> in what percentage of its windows a level that fits the others tells the sign."""
    values = np.array([window[feature] for window in some])
    better = np.array([window["gain"] > 0.0 for window in some])
    of = np.array([window["workload"] for window in some])
    candidates = [
        (level, up) for level in np.quantile(values, np.arange(1, 100) / 100.0) for up in (True, False)
    ]

    def hits(where: np.ndarray, level: float, up: bool) -> float:
        return float((((values >= level) == up) == better)[where].mean())

    rates = {}
    for workload in dict.fromkeys(of.tolist()):
        level, up = max(candidates, key=lambda candidate: hits(of != workload, *candidate))
        rates[workload] = round(100.0 * hits(of == workload, level, up))
    return rates


def summary(records: Sequence[Record]) -> str:
    """Return what the README says: a table, the picture, and what follows."""
    columns = {where: column(records, where) for where in COLUMNS}
    held = {name: found for (name, schedule), found in columns.items() if schedule == "constant"}
    some = windows(records)
    decayed = [window for window in some if window["schedule"] == "cosine"]
    kept_up = [window for window in some if window["schedule"] != "cosine"]

    def each(better: str, worse: str, names: Sequence[str] = tuple(held)) -> str:
        return ", ".join(f"{name} {compared(held[name][better], held[name][worse])}" for name in names)

    def clear(better: str, worse: str) -> str:
        found = {name: interval(values[better] - values[worse]) for name, values in held.items()}
        return ", ".join(name for name, (mean, half) in found.items() if mean > half) or "none"

    points = [
        "- **When.** While the rate is kept up: there the mean of 4, 8 or 16 checkpoints was better than "
        f"the last of them in {helped(kept_up)} % of {len(kept_up)} series; in runs whose rate decays, in "
        f"{helped(decayed)} % of {len(decayed)}.",
        f"- **How much.** What `sweep` chose is better beyond chance on {clear(CHOSEN, REFRESHED)}.",
        "- **The refresh alone.** The last, refreshed, against the last as saved: "
        f"{each(REFRESHED, SAVED, ('images', 'digits'))}; the others have no BatchNorm.",
        "- **How long a window.** All 16, half of the run or more, are too many where it still descends; the "
        f"last 4 against them: {each('mean of the last 4', 'mean of all 16')}.",
        "- **Against what rival.** What `sweep` chose, against a cosine decay over as many epochs: "
        f"{each(CHOSEN, RIVAL)}; beyond chance on {clear(CHOSEN, RIVAL)}.",
    ]
    picture = f"![{ALT}](scripts/images/{PICTURE.name})"
    return "\n\n".join([table(records, SUMMARY), picture, "\n".join(map(_wrapped, points))])


def details(records: Sequence[Record]) -> str:
    """Return what scripts/README.md says: the whole table, and how good the rule of `inspect` is."""
    some = windows(records)
    level = [window for window in some if window["pace"] >= LEVEL]
    shrinking = [window for window in some if window["pace"] < LEVEL]
    always = {
        name: helped([window for window in some if window["workload"] == name])
        for name in dict.fromkeys(window["workload"] for window in some)
    }

    def listed(rates: dict[str, int]) -> str:
        return ", ".join(f"{name} {rate}" for name, rate in rates.items())

    made, minutes = records[-1]["made"], sum(record["cpu_seconds"] for record in records) / 60.0
    legend = (
        "The first row is accuracy, or loss where there is none (text: nats a byte; tabular: squared error "
        "in variances). The others are gains over it, paired by seed, ± their 95 % intervals, and in "
        "brackets in how many of the n runs there is one. The cosine's peak rate on images and text is the "
        "better of two on other seeds, like that of the runs to average; elsewhere it is theirs."
    )
    rule = (
        "`inspect` tells, from the length of the later half of the steps between checkpoints relative to "
        f"the earlier half: from {LEVEL} on, the mean was better in {helped(level)} % of {len(level)} "
        f"series, below in {helped(shrinking)} % of {len(shrinking)}. A level fitted to the other workloads "
        f"alone is right about {listed(hit_rates(some, 'pace'))} % of the series; that averaging always "
        f"helps, about {listed(always)} %; the mean angle of turns, fitted likewise, about "
        f"{listed(hit_rates(some, 'turn'))} %. Recorded on {made['date']} by `bash scripts/evidence.sh` "
        f"({made['machine']}; {made['versions']}): {len(records)} runs, {minutes:.0f} minutes of one core."
    )
    return "\n\n".join([table(records), _wrapped(legend), _wrapped(rule)])


def _wrapped(paragraph: str) -> str:
    indent = "  " if paragraph.startswith("- ") else ""
    return textwrap.fill(paragraph, 120, subsequent_indent=indent, break_on_hyphens=False)


if __name__ == "__main__":
    recorded = load()
    print(summary(recorded), details(recorded), sep="\n\n")
    draw(recorded)
