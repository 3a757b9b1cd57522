"""What is inside checkpoints, whether they fit, and how they lie to each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from swa_avg.combine.combiner import stream_values, unfit
from swa_avg.errors import Finding, MismatchError, UsageError
from swa_avg.files.location import Location
from swa_avg.files.publication import check_output, publish_file
from swa_avg.formats import Checkpoint, Tensor
from swa_avg.inputs.opening import check_contents, check_shared_files, opened
from swa_avg.inputs.selection import epoch_number, expand, read_indices, select
from swa_avg.inspection.geometry import Geometry, Measurement, geometry_of
from swa_avg.planning.methods import coefficients_of
from swa_avg.planning.plan import Plan, make_plan
from swa_avg.planning.policy import FLOATS, batchnorm_layers
from swa_avg.text import Progress

__all__ = ["Contents", "Inspection", "inspect_checkpoints"]

_MEMORY = 32 * 2**20  # for the rows of one block, float64, as read, centred, and their differences
_FEWEST_VALUES = 1024
_CHUNK = 2**20


@dataclass(frozen=True)
class Contents:
    """What is inside one checkpoint."""

    path: Location
    kind: str
    writer: str | None
    """What wrote it, where it says so."""
    size: int
    """Bytes of its HDF5 files."""
    tensors: int
    """Model weights; optimizer state and metrics are not counted."""
    parameters: int
    """Values in them."""
    dtypes: Mapping[str, int]
    """Their types -> values of that type."""
    weight_bytes: int
    optimizer_bytes: int
    batchnorm_layers: tuple[str, ...]
    is_average: bool
    """Whether swa-avg wrote it."""
    epoch: int | None
    """By the index beside it, else the last whole number in its name."""
    learning_rate: float | None
    metrics: Mapping[str, float]
    """By the index; may hold NaN and infinities."""

    @property
    def optimizer_share(self) -> float:
        """Share of the bytes that the optimizer's state takes."""
        return self.optimizer_bytes / self.size if self.size else 0.0


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoints` found."""

    checkpoints: tuple[Contents, ...]
    """In training order."""
    method: str
    coefficients: tuple[float, ...]
    """One a checkpoint: those of the method."""
    treatments: Mapping[str, tuple[str, ...]]
    """`averaged`, `compared`, `copied` -> names of the newest checkpoint's tensors; empty where they do not
    fit."""
    findings: tuple[Finding, ...]
    """Everything that keeps them from being averaged."""
    measured: tuple[int, ...] = ()
    """Which checkpoints the geometry is of: those whose values are all finite."""
    geometry: Geometry | None = None
    """None of a single checkpoint, of those that do not fit, or of numbers whose squares overflow.

    Its mean is the method's, the coefficients of `measured` scaled to sum 1."""

    @property
    def outliers(self) -> tuple[Contents, ...]:
        """Checkpoints that lie in another basin than the group of the others."""
        found = self.geometry.outliers if self.geometry is not None else ()
        return tuple(self.checkpoints[self.measured[row]] for row in found)

    @property
    def groups(self) -> tuple[tuple[Contents, ...], ...]:
        """The checkpoints by basin, the largest group first."""
        groups = self.geometry.groups if self.geometry is not None else ()
        return tuple(tuple(self.checkpoints[self.measured[row]] for row in group) for group in groups)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types; numbers that are not finite become null."""
        result: dict[str, Any] = {
            "method": self.method,
            "fit": not self.findings,
            "findings": [finding._asdict() for finding in self.findings],
            "checkpoints": [
                {**asdict(contents), "optimizer_share": contents.optimizer_share, "coefficient": coefficient}
                for contents, coefficient in zip(self.checkpoints, self.coefficients, strict=True)
            ],
            "tensors": self.treatments,
            "geometry": None,
        }
        if self.geometry is not None:
            result["geometry"] = {
                "checkpoints": self.measured,
                **asdict(self.geometry),
                "outliers": [str(contents.path) for contents in self.outliers],
            }
        plain: dict[str, Any] = _plain(result)
        return plain


def inspect_checkpoints(
    inputs: str | Path | Sequence[str | Path] = (),
    *,
    epochs: str | None = None,
    best: int | None = None,
    monitor: str | None = None,
    mode: str | None = None,
    last: int | None = None,
    every: int | None = None,
    method: str = "uniform",
    decay: float | None = None,
    sigma_rel: float | None = None,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    plot: str | Path | None = None,
    report: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Tell what is inside Keras checkpoints, whether they fit together, and how far apart they lie.

    Distances, norms and angles are those of the rows of all values that `average` would average, BatchNorm's
    moving statistics among them, in float64, from one streamed pass in bounded memory. They do not depend on
    `method`, except for what is said of the mean. See `geometry_of` for what counts as an outlier. Bytes are
    not held against the checksums that archives declare.

    Args:
        inputs, epochs, best, monitor, mode, last, every: Which checkpoints, as for `average`.
        method, decay, sigma_rel, weights: The average that distances are told to, as for `average`.
        dtype: `bfloat16`, where untagged 2-byte tensors of weights-only files hold that.
        plot: A `.png`, `.svg` or `.pdf` to draw the pictures into; needs matplotlib.
        report: A `.html` to write a page with pictures and tables into; needs matplotlib.
        overwrite: Replace existing outputs.
        progress: Told (bytes to read in all, bytes read since the last call).

    Raises:
        UsageError: the request cannot be met as it was made.
        UnreadableError: an input is missing, damaged, or changed while it was read.
        SystemRefusalError: disk full, permission denied, input/output error.
    """
    outputs = _outputs(plot, report, overwrite)
    named = expand(inputs)
    paths = select(named, epochs=epochs, best=best, monitor=monitor, mode=mode, last=last, every=every)
    coefficients = coefficients_of(method, paths, decay=decay, sigma_rel=sigma_rel, weights=weights)
    with opened(paths, dtype) as checkpoints:
        inspection = Inspection(_contents(checkpoints), method, tuple(coefficients), {}, ())
        try:
            plan = make_plan(checkpoints, checkpoints[-1], coefficients)
            check_shared_files(checkpoints)
            check_contents(
                checkpoints, [[shard.crc32 for shard in checkpoint.shards] for checkpoint in checkpoints]
            )
        except MismatchError as error:
            inspection = replace(inspection, findings=error.findings)
        else:
            inspection = _measured(inspection, plan, progress)
    for output, content in [(output, render(inspection)) for output, render in outputs.items()]:
        publish_file(output, content, overwrite=overwrite)
    return inspection


def _outputs(
    plot: str | Path | None, report: str | Path | None, overwrite: bool
) -> dict[Path, Callable[[Inspection], bytes]]:
    """Return what is to be written where, once it is sure that it can be."""
    outputs: dict[Path, Callable[[Inspection], bytes]] = {}
    for option, path, suffixes in (
        ("--plot", plot, (".png", ".svg", ".pdf")),
        ("--report", report, (".html",)),
    ):
        if path is None:
            continue
        output = Path(path)
        if output.suffix not in suffixes:
            raise UsageError(f"{option} {output}; expected a name that ends with {' or '.join(suffixes)}")
        check_output(output, overwrite=overwrite)
        try:
            from swa_avg.inspection import page as pages
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            raise UsageError(f"{option} needs matplotlib; pip install 'swa-avg[plot]'") from None
        outputs[output] = pages.page if option == "--report" else pages.plot(output.suffix)
    return outputs


def _contents(checkpoints: Sequence[Checkpoint]) -> tuple[Contents, ...]:
    indexed = read_indices([checkpoint.path for checkpoint in checkpoints])
    entries = {path: entry for path, (_, entry) in indexed.items()}
    result = []
    for checkpoint in checkpoints:
        path, entry = checkpoint.path, entries.get(checkpoint.path)
        weights = [tensor for tensor in checkpoint.tensors.values() if tensor.role == "weight"]
        dtypes: Counter[str] = Counter()
        for tensor in weights:
            dtypes[tensor.dtype] += math.prod(tensor.shape)
        result.append(
            Contents(
                path=path,
                kind=checkpoint.kind,
                writer=checkpoint.writer,
                size=checkpoint.size,
                tensors=len(weights),
                parameters=dtypes.total(),
                dtypes=dict(dtypes.most_common()),
                weight_bytes=sum(tensor.nbytes for tensor in weights),
                optimizer_bytes=sum(t.nbytes for t in checkpoint.tensors.values() if t.role == "optimizer"),
                batchnorm_layers=tuple(batchnorm_layers(checkpoint)),
                is_average=checkpoint.is_average,
                epoch=epoch_number(path) if entry is None else entry.epoch,
                learning_rate=None if entry is None else entry.learning_rate,
                metrics={} if entry is None else dict(entry.metrics),
            )
        )
    return tuple(result)


def _measured(inspection: Inspection, plan: Plan, progress: Progress | None) -> Inspection:
    """Return the inspection with all that reading the values tells."""
    findings: tuple[Finding, ...] = ()
    measurement, odd, unequal = _measure(plan, progress)
    if odd or unequal:
        findings = tuple(unfit(plan, _CHUNK))
    measured = [row for row in range(len(plan.inputs)) if row not in odd]
    geometry = None
    if len(measured) > 1 and plan.averaged:
        chosen = np.array([plan.coefficients[row] for row in measured])
        if not chosen.sum() > 0.0:
            chosen = np.ones(len(measured))
        geometry = geometry_of(measurement.of(measured), chosen / chosen.sum())
    treatments = {
        title: tuple(tensor.name for tensor in tensors)
        for title, tensors in (
            ("averaged", plan.averaged),
            ("compared", plan.compared),
            ("copied", plan.copied),
        )
    }
    return replace(
        inspection, findings=findings, treatments=treatments, measured=tuple(measured), geometry=geometry
    )


def _measure(plan: Plan, progress: Progress | None) -> tuple[Measurement, set[int], bool]:
    """Read every value that is averaged or compared, once.

    Return the measurement, the inputs that hold values which are not finite, and whether integers that must
    be equal differ.
    """
    count = len(plan.inputs)
    measurement = Measurement(count)
    odd: set[int] = set()
    unequal = False
    columns = max(_FEWEST_VALUES, _MEMORY // (3 * 8 * count))
    block_bytes = columns * min((FLOATS[tensor.dtype] for tensor in plan.averaged), default=8)
    rows = np.empty((count, columns))
    total = count * sum(tensor.nbytes for tensor in (*plan.averaged, *plan.compared))
    is_kernel = _kernels(plan.averaged)
    for block in stream_values(plan, block_bytes):
        width = kernels = 0
        integers: list[bytes] = []
        for number, values in enumerate(block):
            floats = sorted(
                ((not is_kernel(tensor), array) for tensor, array in values if tensor.dtype in FLOATS),
                key=lambda entry: entry[0],
            )
            kernels = sum(len(array) for other, array in floats if not other)
            width = sum(len(array) for _, array in floats)
            if floats:
                np.concatenate([array for _, array in floats], out=rows[number, :width])
            if number in odd or not np.isfinite(rows[number, :width]).all():
                odd.add(number)
                rows[number, :width] = 0.0
            found = [array.tobytes() for tensor, array in values if tensor.dtype not in FLOATS]
            integers = integers or found
            unequal = unequal or found != integers
            if progress is not None:
                progress(total, sum(array.nbytes for _, array in values))
        measurement.add(rows[:, :width], kernels)
    return measurement, odd, unequal


def _kernels(tensors: Sequence[Tensor]) -> Callable[[Tensor], bool]:
    """Return which tensors are kernels: those of two dimensions or more, or all where there are none."""
    least = 2 if any(len(tensor.shape) > 1 for tensor in tensors) else 0
    return lambda tensor: len(tensor.shape) >= least


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)  # a location
