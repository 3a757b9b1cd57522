"""`SWA`: save the last epochs, and average them as training ends."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from swa_avg.averaging import Report, average
from swa_avg.batchnorm import Refresh
from swa_avg.batchnorm.observe import active_layers
from swa_avg.batchnorm.refresh import check_data
from swa_avg.callbacks.last import after_all_callbacks
from swa_avg.callbacks.model_state import is_chief
from swa_avg.callbacks.saver import CheckpointSaver, check_count
from swa_avg.errors import UsageError
from swa_avg.inputs.index import Entry

__all__ = ["SWA"]

_AVERAGE = "swa.keras"


class SWA(CheckpointSaver):
    """Save the last epochs, average them when training ends, and give the model their mean.

    What is averaged are the saved files, by `swa_avg.average`: no copy of the weights is kept in memory, the
    sum runs in float64, and the checkpoints stay for any other choice. A run that ends early by an error has
    lost nothing: `swa-avg` averages what there is. Source: Izmailov et al. 2018 (arXiv:1803.05407),
    algorithm 1.

    The model ends with the average wherever SWA is in the list: where a callback after it puts other weights
    back as training ends, such as `EarlyStopping(restore_best_weights=True)`, SWA loads the average again,
    with a warning.

    Args:
        filepath: Folder for the checkpoints and, in the end, `swa.keras`.
        swa_start: 0-based index of the first epoch to average: of 150 epochs, 140 averages the last ten.
        cycle_length: Epochs in a cycle of the learning rate, counted from `swa_start`: average the ends of
            the cycles only.
        bn_data: What `swa_avg.refresh_batchnorm` takes, such as the training inputs: for models with
            BatchNorm, whose statistics are not those of the averaged weights. Looked at as training begins:
            all rows of arrays, and the first of batches that can be iterated over again.
        bn_batch_size: Rows a batch of `bn_data`, if that does not come in batches; 128 by default.
        bn_samples: Rows of `bn_data` to use; all by default.
        keep_checkpoints: Keep the files that were averaged.
        verbose: 1 prints what is done.

    Raises:
        UsageError: an argument has no meaning; (in `fit`) a `swa.keras` is there that SWA did not write.
        UnreadableError: (in `fit`) `bn_data` cannot be read, do not fit the model, or hold NaN.
        MismatchError: (at the end of `fit`) the weights cannot be averaged: quantized, or not finite.
        SystemRefusalError: (in `fit`) disk full, permission denied, input/output error.
    """

    def __init__(
        self,
        filepath: str | PathLike[str],
        swa_start: int,
        cycle_length: int | None = None,
        bn_data: Any = None,
        bn_batch_size: int | None = None,
        bn_samples: int | None = None,
        keep_checkpoints: bool = True,
        verbose: int = 0,
    ) -> None:
        if Path(filepath).suffix in (".keras", ".h5", ".hdf5"):
            raise UsageError(
                f"filepath {str(filepath)!r} names a file; expected a folder, for swa.keras in it"
            )
        for name, value in (("bn_batch_size", bn_batch_size), ("bn_samples", bn_samples)):
            if value is not None:
                check_count(name, value)
        super().__init__(filepath, swa_start, cycle_length=cycle_length, verbose=verbose)
        self._refresh = None
        if bn_data is not None:
            self._refresh = Refresh(bn_data, batch_size=bn_batch_size, samples=bn_samples)
        self._keep_checkpoints = keep_checkpoints

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        if is_chief(self.model):
            self._check_bn_data()
        super().on_train_begin(logs)
        if is_chief(self.model) and (reason := self._folder.why_taken(_AVERAGE)) is not None:
            output = self._folder.path / _AVERAGE
            raise UsageError(
                f"{output} would be replaced, but {reason}: move it away, or name another folder"
            )

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        super().on_train_end(logs)
        if self._saved == 0 or not is_chief(self.model):
            return
        entries = [entry for entry in self._folder.entries() if self._is_captured(entry)]
        paths = [self._folder.path / entry.file for entry in entries]
        output, findings = self._folder.place(_AVERAGE)
        self._warn(findings)
        refresh = None
        if self._refresh is not None:
            refresh = replace(self._refresh, model=self.model)
        # Hours of training are not to end in a refusal: what is unrelated is warned of.
        report = average(paths, output, overwrite=True, refresh=refresh, allow_unrelated=True)
        self._folder.record_average(output)
        if refresh is None:
            self.model.load_weights(output)
        self._warn(self._findings(report))
        if self._verbose:
            print(f"\nThe model has the mean of {len(paths)} epochs, and is saved as {output}")
        if not self._keep_checkpoints:
            self._warn(self._folder.forget(entries))
        weights = list(self.model.trainable_weights)
        after_all_callbacks(self.model, partial(self._hold, weights, _checksum(weights), output))

    def _hold(self, weights: Sequence[Any], checksum: int, output: Path) -> None:
        """Load the average again if `weights`, the trained ones, no longer have this checksum.

        A callback that sets other variables alone, such as BatchNorm's statistics, keeps what it did.
        """
        if _checksum(weights) != checksum:
            self.model.load_weights(output)
            self._warn(
                [
                    "another callback, such as EarlyStopping(restore_best_weights=True), replaced the "
                    "average as training ended; SWA has loaded it again from "
                    f"{output}: leave one of the two out"
                ]
            )

    def _check_bn_data(self) -> None:
        """Say now, not after hours of training, what the refresh will say of its data."""
        to_refresh = active_layers(self.model)
        if self._refresh is not None:
            check_data(self.model, self._refresh)
            if not to_refresh:
                self._warn(["the model has no BatchNorm to refresh: bn_data will change nothing"])
        elif to_refresh:
            self._warn(
                ["the model has BatchNorm, whose statistics will not fit averaged weights: pass bn_data"]
            )

    def _is_captured(self, entry: Entry) -> bool:
        """Tell whether an entry is of the epochs to average; later ones are of an earlier, longer run."""
        done = entry.epoch - self._start_epoch
        return 0 < done <= (self._epoch or 0) + 1 - self._start_epoch and done % self._period == 0

    @staticmethod
    def _findings(report: Report) -> list[str]:
        findings = []
        if report.relation.problem is not None:
            findings.append(report.relation.problem)
        if len(report.plan.inputs) == 1:
            findings.append("SWA averaged one epoch only: the weights are that epoch's")
        if report.refresh is not None:
            findings.extend(report.refresh.warnings)
        elif report.batchnorm_layers:
            findings.append(
                "the model has BatchNorm, whose statistics are now averages of the epochs' statistics, not "
                "those of the averaged weights: pass bn_data, or refresh them, before you trust it"
            )
        return findings


def _checksum(weights: Sequence[Any]) -> int:
    """Return the CRC-32 of the values of variables."""
    checksum = 0
    for variable in weights:
        checksum = zlib.crc32(variable.numpy().tobytes(), checksum)
    return checksum
