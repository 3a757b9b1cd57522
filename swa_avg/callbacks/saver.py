"""`CheckpointSaver`: save the checkpoints of a run, to average them later."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import keras

from swa_avg.batchnorm.loading import check_model
from swa_avg.callbacks.filenames import FileNames
from swa_avg.callbacks.kept_average import kept_average_warnings
from swa_avg.callbacks.model_state import is_chief, learning_rate, scalars, steps, sync
from swa_avg.callbacks.run_folder import RunFolder, published
from swa_avg.callbacks.snapshot import Snapshot, Task, saved_view
from swa_avg.callbacks.writer import ModelWriter
from swa_avg.errors import SwaAvgError, UsageError
from swa_avg.inputs.index import MODES, Entry
from swa_avg.inputs.metrics import direction

__all__ = ["CheckpointSaver", "check_count"]

_MISSED = (
    "{}: values of {}, which the model saves but does not list among its variables, may be a little newer "
    "than the rest; from now on training waits for each save"
)


class CheckpointSaver(keras.callbacks.Callback):  # type: ignore[misc]
    """Save the model at the ends of epochs, with an index, into a folder that `swa-avg` averages.

    Each file appears under its name complete, and on disk, or not at all; a failed save leaves earlier files
    as they are and ends `fit` with its error. With `background`, training waits only until the arrays are
    copied to host memory; a thread writes the file, one at a time. Keras writes the first; later ones are its
    bytes with the values of their moment, which is what Keras would write, in half the time.

    The learning rate is never touched. Runs are continued: the index of the folder is read at the start, and
    epochs that are trained again replace their checkpoints. Two runs need two folders.

    Only checkpoints whose content is as this class recorded it in the index, in this run or an earlier one,
    are deleted or replaced. Any other file stays, with a warning; if it has the name of a checkpoint to be
    saved, that one is saved as `..-again.keras`.

    Args:
        directory: Folder for the checkpoints and `checkpoints.json`; created if need be.
        start_epoch: 0-based index of the first epoch to save, like Keras's `initial_epoch`: of 150 epochs,
            140 saves the last ten.
        every: Save every N-th epoch, counted from `start_epoch`; or every N steps: `"500 steps"`.
        cycle_length: Epochs in a cycle of the learning rate, counted from `start_epoch`: save at the end of
            each cycle (after epochs `start_epoch + c`, `start_epoch + 2c`, ... as `fit` prints them), where a
            saw-tooth is lowest. With `every`, of every N-th cycle.
        filename: A format of `epoch`, the 1-based number that `fit` prints, `step`, and metrics:
            `"ckpt_{epoch:04d}_{val_loss:.3f}.keras"`. By default `ckpt_{epoch:04d}.keras`, or for steps
            `ckpt_{epoch:04d}_{step:08d}.keras`; `.weights.h5` with `weights_only`.
        weights_only: Save as `model.save_weights` does, not as `model.save`.
        include_optimizer: Save the optimizer's state, and in a `.keras` file how the model was compiled.
        keep_last: Keep only this many of the newest files.
        keep_best: Keep only this many of the files with the best values of `monitor`. A file stays if either
            keeps it.
        monitor: A metric by the name that `fit` logs, for `keep_best` and `swa-avg --best`. A checkpoint
            whose epoch did not log it, as with `validation_freq`, is worse than any that has it; until one
            has it, `keep_best` keeps all.
        mode: `min` or `max`: which values of `monitor` are better. `auto` goes by the compiled metric, then
            by the name (accuracy, AUC, precision, recall, F1 up; losses, errors down), and refuses others.
        background: Write on a thread of its own.
        verbose: 1 prints each file's name.

    Raises:
        UsageError: (here) an argument has no meaning; (at the first save) which values of `monitor` are
            better, or how to fill in `filename`, is not clear.
        SystemRefusalError: (in `fit`) disk full, permission denied, input/output error.
        UnreadableError: (in `fit`) the folder holds a damaged index.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        start_epoch: int = 0,
        every: int | str = 1,
        cycle_length: int | None = None,
        filename: str | None = None,
        weights_only: bool = False,
        include_optimizer: bool = True,
        keep_last: int | None = None,
        keep_best: int | None = None,
        monitor: str | None = None,
        mode: str = "auto",
        background: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        if "://" in str(directory):
            raise UsageError(f"{directory} is not a folder of this machine; save here, and copy afterwards")
        check_count("start_epoch", start_epoch, least=0)
        for name, value in (
            ("cycle_length", cycle_length),
            ("keep_last", keep_last),
            ("keep_best", keep_best),
        ):
            if value is not None:
                check_count(name, value)
        if mode not in ("auto", *MODES):
            raise UsageError(f"mode is {mode!r}; expected auto, min or max")
        if keep_best is not None and monitor is None:
            raise UsageError("keep_best needs monitor, such as monitor='val_loss'")
        count, self._by_step = _parse_every(every)
        if self._by_step and cycle_length is not None:
            raise UsageError(
                "cycle_length counts epochs; with every in steps, give the cycle's steps as every"
            )
        self._start_epoch = start_epoch
        self._period = count * (cycle_length or 1)
        self._names = FileNames(filename, by_step=self._by_step, weights_only=weights_only)
        self._include_optimizer = include_optimizer
        self._monitor = monitor
        self._mode = mode
        self._background = background
        self._verbose = verbose
        self._folder = RunFolder(Path(directory), keep_last, keep_best, by_step=self._by_step)
        self._opened = False
        self._writer = ModelWriter()
        self._task: Task | None = None
        self._saved = 0
        self._missed: set[str] = set()
        self._epoch: int | None = None
        self._step = 0
        self._batch = -1
        if self._by_step:
            # Only here: a callback with this method makes `fit` wait for the logs of every batch.
            self.on_train_batch_end = self._after_batch

    def save(
        self, model: Any, epoch: int, metrics: Mapping[str, Any] | None = None, *, step: int | None = None
    ) -> None:
        """Save `model` now; what custom training loops call.

        Args:
            model: A built Keras model. On JAX, with the variables assigned that a stateless loop has updated.
            epoch: 0-based index, as in `for epoch in range(epochs)`; the file carries the number after it.
            metrics: By name, scalars.
            step: Steps trained so far; by default what the optimizer has counted.
        """
        check_model(model)
        sync(model)
        self.wait()
        chief = is_chief(model)
        if chief and not self._opened:
            self._folder.first_epoch = epoch
            self._open()
        logged = scalars(metrics)
        step = step if step is not None else steps(model)
        path, findings = self._folder.place(self._names.name(epoch + 1, step, logged))
        if chief:
            self._warn([*findings, *self._missing(epoch + 1, logged)])
        entry = Entry(path.name, epoch + 1, step, learning_rate(model), logged, _now())
        self._resolve_mode(model, logged)
        if self._verbose and chief:
            print(f"\nEpoch {epoch + 1}: saving {path}")
        if self._background or not chief:
            # All workers read their variables, which may be a collective operation; the chief alone writes.
            snapshot = Snapshot(model, self._include_optimizer)
            if chief:
                self._task = Task(snapshot, path, partial(self._write, model), partial(self._record, entry))
                self._task.start()
        else:
            with published(path) as temporary:
                self._write(model, temporary)
            self._warn(self._record(entry))
        self._saved += 1

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            SystemRefusalError: the last save failed; its file is not there, earlier ones are.
        """
        task, self._task = self._task, None
        if task is None:
            return
        task.join()
        if task.error is None:
            self._warn(task.warnings)
            if task.snapshot.missed:
                self._background = False
                self._warn([_MISSED.format(task.path, ", ".join(sorted(task.snapshot.missed)))])
        elif isinstance(task.error, (OSError, SwaAvgError)) or not isinstance(task.error, Exception):
            raise task.error
        else:
            self._retry(task)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._task is not None:
            self._task.join()

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        check_model(self.model)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self.wait()
        self._saved = 0
        self._missed = set()
        self._epoch = None
        if is_chief(self.model):
            self._warn(kept_average_warnings(self))
            self._open()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._epoch is None:
            # Not earlier: BackupAndRestore sets the epoch and the optimizer's count as training begins.
            self._folder.first_epoch = epoch
            self._step = steps(self.model) or 0
        self._epoch = epoch
        self._batch = -1
        self._raise_early()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        done = epoch + 1 - self._start_epoch
        if not self._by_step and done > 0 and done % self._period == 0:
            self.save(self.model, epoch, logs)
        else:
            self._raise_early()

    def _after_batch(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Count steps; with `steps_per_execution`, Keras calls this once for several."""
        before, self._step = self._step, self._step + batch - self._batch
        self._batch = batch
        epoch = self._epoch or 0
        if epoch >= self._start_epoch and self._step // self._period > before // self._period:
            self.save(self.model, epoch, logs, step=self._step)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self.wait()
        if self._saved == 0:
            _warn_nothing(f"{type(self).__name__} saved nothing", self._expected(), self._epoch, self.params)

    def _expected(self) -> str:
        if self._by_step:
            return f"a checkpoint every {self._period} steps after epoch {self._start_epoch}"
        return f"the first checkpoint after epoch {self._start_epoch + self._period}"

    def _open(self) -> None:
        self._warn(self._folder.open())
        self._opened = True

    def _resolve_mode(self, model: Any, metrics: Mapping[str, float]) -> None:
        if self._monitor is None:
            return
        if self._mode == "auto":
            self._mode = direction(model, self._monitor)

    def _missing(self, epoch: int, metrics: Mapping[str, float]) -> list[str]:
        """Return a warning if a metric that is asked for was not logged, the first time in a training.

        With `validation_freq`, some epochs have none of `val_...`: no reason to end training.
        """
        fields = self._names.metrics
        wanted = fields if self._monitor is None else {*fields, self._monitor}
        missing = sorted(wanted - metrics.keys() - self._missed)
        self._missed.update(missing)
        if not missing:
            return []
        effects = []
        if self._monitor in missing:
            effects.append("rank last")
        if not fields.isdisjoint(missing):
            effects.append("have nan in their names")
        logged = ", ".join(sorted(metrics)) or "no metrics"
        without = f"checkpoints without {'it' if len(missing) == 1 else 'them'} {' and '.join(effects)}"
        return [f"epoch {epoch} logged {logged}, but not {', '.join(missing)}; {without}"]

    def _write(self, model: Any, temporary: Path) -> None:
        """Write the values that the variables have on this thread."""
        self._writer.write(saved_view(model, include_optimizer=self._include_optimizer), temporary)

    def _record(self, entry: Entry) -> list[str]:
        return self._folder.record(entry, self._monitor, self._mode if self._monitor is not None else None)

    def _raise_early(self) -> None:
        """Let an error, or a change to saving without a thread, come before the next save does."""
        if self._task is not None and not self._task.is_alive():
            self.wait()

    def _retry(self, task: Task) -> None:
        """Save on this thread what another could not, with the values that the variables had then."""
        warnings.warn(
            f"this model cannot be saved in the background ({task.error}); from now on training waits",
            stacklevel=2,
        )
        self._background = False
        with task.snapshot.assigned(), published(task.path) as temporary:
            task.write(temporary)
        self._warn(task.record())

    def _warn(self, messages: Sequence[str]) -> None:
        for message in messages:
            warnings.warn(message, stacklevel=2)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _warn_nothing(what: str, expected: str, epoch: int | None, params: Mapping[str, Any] | None) -> None:
    planned = (params or {}).get("epochs")
    ended = "before its first epoch" if epoch is None else f"after epoch {epoch + 1}"
    of = f" of {planned}" if planned is not None else ""
    warnings.warn(f"{what}: expected {expected}, but training ended {ended}{of}", stacklevel=3)


def _parse_every(every: int | str) -> tuple[int, bool]:
    """Return the number, and whether it counts steps."""
    if not isinstance(every, str):
        check_count("every", every)
        return every, False
    match = re.fullmatch(r"([0-9]{1,15}) (epoch|step)s?", every.strip())
    if match is None or int(match.group(1)) < 1:
        raise UsageError(f"every is {every!r}; expected a number of epochs, or such as '500 steps'")
    return int(match.group(1)), match.group(2) == "step"


def check_count(name: str, value: int, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least {least}")
