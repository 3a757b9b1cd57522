"""Draw the learning-rate schedules: python scripts/plot_schedules.py OUT.png

Needs matplotlib. Marks where CheckpointSaver and SWA capture weights, from the same start and cycle length.
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from swa_avg.schedules import Schedule, constant, cyclic, linear

EPOCHS = 200
SWA_START = 150
LR_START, LR_END = 0.05, 0.01
CYCLE = 10


def by_step(schedule: Schedule, steps_per_epoch: int) -> tuple[list[float], list[float]]:
    """Return epochs and rates at every step, from the formula with its lengths in steps."""
    lengths = {
        name: value * steps_per_epoch if name in ("swa_start", "cycle_length", "start") else value
        for name, value in schedule.parameters.items()
    }
    in_steps = Schedule(schedule.kind, lengths)
    steps = range(EPOCHS * steps_per_epoch)
    return [step / steps_per_epoch for step in steps], [in_steps(step) for step in steps]


def main() -> None:
    panels = [
        (f"constant({LR_END})", constant(LR_END), range(SWA_START, EPOCHS)),
        (
            f"linear({LR_START}, {LR_END}, swa_start={SWA_START})",
            linear(LR_START, LR_END, SWA_START),
            range(SWA_START, EPOCHS),
        ),
        (
            f"cyclic({LR_START}, {LR_END}, cycle_length={CYCLE}, start={SWA_START})",
            cyclic(LR_START, LR_END, CYCLE, start=SWA_START),
            range(SWA_START + CYCLE - 1, EPOCHS, CYCLE),
        ),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), sharey=True, constrained_layout=True)
    for axis, (title, schedule, captures) in zip(axes, panels, strict=True):
        axis.axvspan(SWA_START, EPOCHS, color="0.94", label=f"from epoch {SWA_START}")
        axis.plot(*by_step(schedule, 20), color="C1", linewidth=1, label="by step", zorder=3)
        rates = [schedule(epoch) for epoch in range(EPOCHS)]
        axis.step(range(EPOCHS), rates, where="post", color="C0", linewidth=1.6, label="by epoch")
        axis.plot(
            [epoch + 1 for epoch in captures],
            [schedule(epoch) for epoch in captures],
            "o",
            color="C3",
            markersize=3,
            clip_on=False,
            zorder=4,
            label="captured",
        )
        axis.set(title=title, xlabel="epoch", xlim=(0, EPOCHS), ylim=(0, LR_START * 1.12))
        axis.title.set_fontsize(9.5)
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("learning rate")
    axes[0].legend(loc="upper left", bbox_to_anchor=(0.02, 0.85), frameon=False, fontsize=8.5)
    figure.savefig(sys.argv[1], dpi=150)


if __name__ == "__main__":
    main()
