from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_avg.inputs.names import Ambiguity, NameReading, read_names

EPOCHS = range(1, 13)


@pytest.mark.parametrize(
    "template",
    [
        "ckpt_{epoch:04d}.keras",
        "ckpt_{epoch:02d}_{loss:.2e}.keras",
        "ep{epoch:02d}-acc{percent}.keras",
        "e{epoch}_f1={good:.2f}.keras",
        "vl{zigzag:.3f}-ep{epoch:02d}.h5",
        "e{epoch:02d}_lr{rate:g}.keras",
        "{epoch:02d}-{loss:.2f}.keras",
        "weights.{epoch:02d}-{signed:.2f}.hdf5",
        "weights.{epoch:02d}.{loss:.2f}.weights.h5",
        "resnet50_fold2_224x224_top5_{epoch}.keras",
        "2024-01-15_run3_model-{epoch}-val_acc-{good:.3f}.keras",
        "best_{good:.4f}_at_epoch={epoch}_step={steps}.keras",
        "{percent}acc_{epoch}epochs.weights.json",
        "loss={signed:+.3f},epoch={epoch}.keras",
        "v2.1-{epoch:03d}-{loss:.4f}-{good:.4f}.keras",
        "{epoch:05d}_{steps:010d}.keras",
    ],
)
def test_the_epoch_of_a_template_is_read_wherever_it_stands(template: str) -> None:
    names = [
        template.format(
            epoch=epoch,
            loss=3.2 * 0.75**epoch,
            percent=min(70, 60 + epoch),
            good=0.5 + epoch / 100,
            zigzag=0.2 + abs(epoch - 7) / 40,
            rate=1e-3 if epoch < 8 else 1e-5,
            signed=1 / epoch - 0.3,
            steps=epoch * 313,
        )
        for epoch in EPOCHS
    ]
    readings, ambiguity = read_names(names)
    assert [reading.epoch for reading in readings] == list(EPOCHS)
    assert ambiguity is None
    # A set in another order, or with gaps, as `save_best_only` leaves it, is read alike.
    some = names[10::-1] if "percent" in template else [names[row] for row in (6, 1, 0, 11)]
    assert {name: reading.epoch for name, reading in zip(some, read_names(some)[0], strict=True)} == {
        name: names.index(name) + 1 for name in some
    }


def test_metrics_are_read_with_their_labels() -> None:
    readings, _ = read_names(["m-03-val_loss=-0.42_acc_nan.keras", "m-04-val_loss=0.10_acc_0.5.keras"])
    assert [reading.epoch for reading in readings] == [3, 4]
    assert [reading.metrics["val_loss"] for reading in readings] == [-0.42, 0.10]
    assert math.isnan(readings[0].metrics["acc"])
    assert read_names(["03-0.42.keras", "04-0.41.keras"])[0][1] == NameReading(4, None, {"number": 0.41})


def test_steps_count_within_epochs() -> None:
    names = ["ckpt_0001_00000500.keras", "ckpt_0001_00001000.keras", "ckpt_0002_00001500.keras"]
    readings, _ = read_names(names)
    assert [(reading.epoch, reading.step) for reading in readings] == [(1, 500), (1, 1000), (2, 1500)]


def test_batches_that_begin_again_with_each_epoch_are_no_epochs() -> None:
    """As ModelCheckpoint(save_freq=...) names files by {epoch} and {batch}, which is that in the epoch."""
    names = [f"m-{epoch:02d}-{batch:04d}.keras" for epoch, batch in ((1, 500), (1, 1000), (2, 125), (2, 625))]
    readings, ambiguity = read_names([*names, "m-03-0250.keras"])
    assert [(one.epoch, one.step) for one in readings] == [(1, 500), (1, 1000), (2, 125), (2, 625), (3, 250)]
    assert ambiguity is None
    # Here the second field counts as well, from 1 to 8: the first may be a percentage.
    pairs = ((1, 3), (1, 6), (2, 1), (2, 4), (2, 7), (3, 2), (3, 5), (3, 8))
    readings, ambiguity = read_names([f"m-{epoch:02d}-{batch:04d}.keras" for epoch, batch in pairs])
    assert ambiguity is not None
    assert ambiguity.epochs == (1, 3)
    assert ambiguity.order_differs


def test_what_no_field_tells_is_not_guessed() -> None:
    readings, _ = read_names(["fold1.keras", "fold2.keras", "best.keras", "model-0.91.keras"])
    assert [reading.epoch for reading in readings] == [None] * 4


def test_two_readings_are_told_with_whether_they_differ_in_order() -> None:
    same, other = ["1_60.keras", "2_61.keras", "5_63.keras"], ["1_63.keras", "2_61.keras", "5_60.keras"]
    assert read_names(same)[1] == Ambiguity("1_60.keras", (1, 60), order_differs=False)
    assert read_names(other)[1] == Ambiguity("1_63.keras", (1, 63), order_differs=True)
    # One of them counts, and the other does not.
    readings, ambiguity = read_names(["03_61.keras", "04_63.keras", "05_60.keras"])
    assert ([reading.epoch for reading in readings], ambiguity) == ([3, 4, 5], None)


@given(st.lists(st.text(max_size=30), max_size=6))
def test_any_names_are_read(names: list[str]) -> None:
    readings, _ = read_names(names)
    assert len(readings) == len(names)


@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=20, unique=True),
    st.sampled_from(["ckpt_{}", "ep{:03d}", "model.{}", "w{}-final", "e-{}-x2"]),
)
def test_one_whole_number_that_differs_is_the_epoch(epochs: list[int], template: str) -> None:
    readings, _ = read_names([template.format(epoch) + ".keras" for epoch in epochs])
    assert [reading.epoch for reading in readings] == epochs
