from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_avg.errors import UsageError
from swa_avg.schedules import LR_schedule, constant, cyclic, linear


def descent(e, swa_start, lr_start, lr_end):
    """As SWA_keras had it."""
    t, r = e / swa_start, lr_end / lr_start
    if t <= 0.5:
        factor = 1.0
    elif t <= 0.9:
        factor = 1.0 - (1.0 - r) * (t - 0.5) / 0.4
    else:
        factor = r
    return lr_start * factor


def saw_tooth(e, c, lr_start, lr_end):
    t = (e % c + 1) / c
    return (1 - t) * lr_start + t * lr_end


@pytest.mark.parametrize(
    ("swa_start", "lr_start", "lr_end"), [(150, 0.1, 0.05), (140, 0.05, 0.04), (7, 1, 0)]
)
def test_200_epochs_of_linear_equal_the_old_descent_to_the_bit(swa_start, lr_start, lr_end):
    expected = [descent(e, swa_start, lr_start, lr_end) for e in range(200)]
    assert [linear(lr_start, lr_end, swa_start)(e) for e in range(200)] == expected
    old = [
        LR_schedule(e, flag=False, SWA_START=swa_start, lr_start=lr_start, lr_end=lr_end) for e in range(200)
    ]
    assert old == expected


@pytest.mark.parametrize(
    ("c", "lr_start", "lr_end"), [(10, 0.1, 0.05), (30, 0.05, 0.01), (1, 0.1, 0.2), (7, 0, 1)]
)
def test_200_epochs_of_cyclic_equal_the_old_saw_tooth_to_the_bit(c, lr_start, lr_end):
    expected = [saw_tooth(e, c, lr_start, lr_end) for e in range(200)]
    assert [cyclic(lr_start, lr_end, c)(e) for e in range(200)] == expected
    old = [LR_schedule(e, flag=True, SWA_START=1, lr_start=lr_start, lr_end=lr_end, c=c) for e in range(200)]
    assert old == expected


def test_the_old_defaults_hold():
    assert LR_schedule(0) == 0.1
    assert LR_schedule(149) == 0.05
    assert LR_schedule(9, True) == 0.05


def test_constant_is_constant():
    assert {constant(0.05)(e) for e in range(200)} == {0.05}


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 200))
def test_cyclic_is_lowest_where_a_saver_of_the_same_cycle_saves(c, start, epoch):
    value = cyclic(0.1, 0.01, c, start=start)(epoch)
    saved = epoch + 1 > start and (epoch + 1 - start) % c == 0
    assert math.isclose(value, 0.01) == saved
    if epoch < start:
        assert value == 0.1


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: LR_schedule(0, False, 0, 0.1, 0.05, 10), "SWA_START is 0"),
        (lambda: LR_schedule(0, False, 150, 0, 0.05, 10), "lr_start is 0"),
        (lambda: LR_schedule(0, True, 150, 0.1, 0.05, 0), "c is 0"),
        (lambda: LR_schedule(0, True, 150, 0.1, 0.05, -3), "c is -3"),
        (lambda: cyclic(0.1, 0.05, 2.5), "cycle_length is 2.5"),
        (lambda: cyclic(0.1, -0.05, 2), "lr_end is -0.05"),
        (lambda: cyclic(0.1, 0.05, 2, start=-1), "start is -1"),
        (lambda: linear(math.nan, 0.05, 2), "lr_start is nan"),
        (lambda: constant(math.inf), "lr is inf"),
        (lambda: constant(0.1).by_step(0), "steps_per_epoch is 0"),
    ],
)
def test_arguments_without_meaning_are_value_errors_that_name_them(make, problem):
    with pytest.raises(UsageError, match=problem) as caught:
        make()
    assert isinstance(caught.value, ValueError)


@pytest.mark.keras
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's, with NumPy 2.4
class TestWithKeras:
    @pytest.fixture(autouse=True)
    def keras(self):
        return pytest.importorskip("keras")

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            (constant(0.05), lambda e: 0.05),
            (linear(0.1, 0.05, 150), lambda e: descent(e, 150, 0.1, 0.05)),
            (cyclic(0.1, 0.05, 10), lambda e: saw_tooth(e, 10, 0.1, 0.05)),
        ],
    )
    def test_200_epochs_by_step_follow_the_formulas(self, schedule, expected):
        by_step = schedule.by_step(1)
        values = [float(by_step(e)) for e in range(200)]
        np.testing.assert_allclose(values, [expected(e) for e in range(200)], rtol=3e-7)

    def test_cyclic_by_step_is_the_papers_saw_tooth(self):
        c = 5 * 3
        values = [float(cyclic(0.1, 0.01, 5).by_step(3)(step)) for step in range(100)]
        t = [((i - 1) % c + 1) / c for i in range(1, 101)]
        np.testing.assert_allclose(values, [(1 - x) * 0.1 + x * 0.01 for x in t], rtol=3e-7)

    def test_linear_by_step_descends_within_epochs(self):
        values = [float(linear(0.1, 0.05, 20).by_step(4)(step)) for step in range(100)]
        np.testing.assert_allclose(
            values, [descent(step / 4, 20, 0.1, 0.05) for step in range(100)], rtol=3e-7
        )

    def test_steps_beyond_the_whole_numbers_of_float32_stay_exact(self):
        step = 2**24 + 1
        value = float(cyclic(0.1, 0.0, 7).by_step(1)(step))
        assert value == pytest.approx(saw_tooth(step, 7, 0.1, 0.0), rel=1e-6)

    def test_a_model_with_a_schedule_by_step_loads_again(self, keras, tmp_path):
        import swa_avg.callbacks  # noqa: F401 (registers the schedules)

        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(cyclic(0.1, 0.01, 2).by_step(3)), "mse")
        model.fit(np.ones((8, 1)), np.ones((8, 1)), batch_size=2, verbose=0)
        model.save(tmp_path / "a.keras")
        loaded = keras.models.load_model(tmp_path / "a.keras")
        assert float(loaded.optimizer.learning_rate) == pytest.approx(saw_tooth(4, 6, 0.1, 0.01))

    def test_keras_sets_the_rates_of_a_schedule_by_epoch(self, keras, capsys):
        from swa_avg.callbacks import PrintLearningRate

        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.5), "mse")
        scheduler = keras.callbacks.LearningRateScheduler(cyclic(0.1, 0.02, 4))
        history = model.fit(
            np.ones((2, 1)), np.ones((2, 1)), epochs=6, verbose=0, callbacks=[scheduler, PrintLearningRate()]
        )
        expected = [saw_tooth(e, 4, 0.1, 0.02) for e in range(6)]
        np.testing.assert_allclose(history.history["learning_rate"], expected, rtol=1e-6)
        printed = [line for line in capsys.readouterr().out.splitlines() if line]
        assert printed == [f"Epoch {e + 1}: learning rate {rate:g}" for e, rate in enumerate(expected)]
