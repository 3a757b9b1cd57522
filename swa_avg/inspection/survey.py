"""What is inside checkpoints, whether they fit, and how they lie to each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from swa_avg.combine.blocks import Source, is_same
from swa_avg.combine.values import invalid_values, stream_values
from swa_avg.errors import Finding, MismatchError
from swa_avg.files.publication import publish_file
from swa_avg.formats import Checkpoint
from swa_avg.inputs.listing import Listing, list_checkpoints
from swa_avg.inputs.opening import check_averages, check_contents, check_shared_files, opened
from swa_avg.inputs.ranking import with_log
from swa_avg.inputs.related import kernels_among
from swa_avg.inputs.selection import Selection, select
from swa_avg.inspection.geometry import Measurement, geometry_of
from swa_avg.inspection.movement import movement_of
from swa_avg.inspection.outputs import PAGE, PICTURES, checked_outputs
from swa_avg.inspection.report import Contents, Inspection
from swa_avg.planning.methods import Method
from swa_avg.planning.plan import Plan, coefficients_of, make_plan
from swa_avg.planning.policy import FLOATS, batchnorm_layers, other_weights
from swa_avg.text import Progress

__all__ = ["inspect_checkpoints"]

_MEMORY = 32 * 2**20  # for the rows of one block, float64, as read, centred, and their differences
_FEWEST_VALUES = 1024
_CHUNK = 2**20


def inspect_checkpoints(
    inputs: str | Path | Sequence[str | Path] = (),
    *,
    epochs: str | int | range | None = None,
    best: int | None = None,
    monitor: str | None = None,
    mode: str | None = None,
    metrics: str | Path | None = None,
    last: int | None = None,
    every: int | None = None,
    method: str | Sequence[float] = "uniform",
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
    not checked against the checksums that archives declare.

    Args:
        inputs, epochs, best, monitor, mode, last, every: Which checkpoints, as for `average`.
        metrics: The log that holds their metrics, as for `average`; they are shown without `best`, too.
        method: The average whose distances are measured, as for `average`.
        dtype: `bfloat16`, where untagged 2-byte tensors of weights-only files hold that.
        plot: A `.png`, `.svg` or `.pdf` to draw the pictures into; needs matplotlib.
        report: A `.html` to write a page with pictures and tables into; needs matplotlib.
        overwrite: Replace existing outputs.
        progress: Told (bytes to read in all, bytes read since the last call).

    Returns:
        What was found, with `findings` where they cannot be averaged.

    Raises:
        UsageError: the request cannot be met as it was made.
        UnreadableError: an input is missing, damaged, or changed while it was read.
        SystemRefusalError: disk full, permission denied, input/output error.

    Example:
        >>> inspect_checkpoints("run", last=10, report="run.html").outliers
        ()
    """
    chosen_method = Method.parse(method)
    outputs = checked_outputs(
        {"plot": (plot, PICTURES), "report": (report, PAGE)}, _renderer, overwrite=overwrite
    )
    wanted = Selection(epochs, best, monitor, mode, None if best is None else metrics, last, every)
    listing = select(with_log(list_checkpoints(inputs), metrics), wanted)
    coefficients = coefficients_of(chosen_method, listing)
    with opened(listing.paths, dtype) as checkpoints:
        inspection = Inspection(
            _contents(checkpoints, listing),
            listing,
            str(chosen_method),
            tuple(coefficients),
            {},
            (),
            other_weights=other_weights(checkpoints[-1].optimizer_config),
        )
        try:
            plan = make_plan(checkpoints, checkpoints[-1], coefficients)
            check_shared_files(checkpoints)
            check_averages(checkpoints)
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


def _renderer(argument: str, suffix: str) -> Callable[[Inspection], bytes]:
    from swa_avg.inspection import page as pages

    return pages.page if argument == "report" else pages.plot(suffix)


def _contents(checkpoints: Sequence[Checkpoint], listing: Listing) -> tuple[Contents, ...]:
    result = []
    for checkpoint, listed in zip(checkpoints, listing.files, strict=True):
        weights = [tensor for tensor in checkpoint.tensors.values() if tensor.role == "weight"]
        dtypes: Counter[str] = Counter()
        for tensor in weights:
            dtypes[tensor.dtype] += math.prod(tensor.shape)
        result.append(
            Contents(
                path=checkpoint.path,
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
                epoch=listed.epoch,
                learning_rate=listed.learning_rate,
                metrics=dict(listed.metrics),
            )
        )
    return tuple(result)


def _measured(inspection: Inspection, plan: Plan, progress: Progress | None) -> Inspection:
    """Return the inspection with all that reading the values tells."""
    findings: tuple[Finding, ...] = ()
    measurement, odd, unequal, constants = _measure(plan, progress)
    if odd or unequal:
        findings = tuple(invalid_values(plan, _CHUNK))
    measured = [row for row in range(len(plan.inputs)) if row not in odd]
    geometry = None
    if len(measured) > 1 and plan.averaged:
        chosen = np.array([plan.coefficients[row] for row in measured])
        if not chosen.sum() > 0.0:
            chosen = np.ones(len(measured))
        geometry = geometry_of(measurement.of(measured), chosen / chosen.sum())
    movement = None
    if geometry is not None and len(geometry.groups) == 1:
        rates = [inspection.checkpoints[row].learning_rate for row in measured]
        movement = movement_of(np.square(geometry.distances), rates)
    treatments = {
        title: tuple(tensor.name for tensor in tensors)
        for title, tensors in (
            ("averaged", [tensor for tensor in plan.averaged if tensor.name not in constants]),
            ("compared", (*plan.compared, *(t for t in plan.averaged if t.name in constants))),
            ("copied", plan.copied),
        )
    }
    return replace(
        inspection,
        findings=findings,
        treatments=treatments,
        measured=tuple(measured),
        geometry=geometry,
        movement=movement,
        constants=tuple(sorted(constants)),
    )


def _measure(plan: Plan, progress: Progress | None) -> tuple[Measurement, set[int], bool, set[str]]:
    """Read every value that is averaged or compared, once.

    Return the measurement, the inputs that hold values which are not finite, whether integers that must be
    equal differ, and the tensors that hold such values and are the same in all inputs: these values count 0.
    """
    count = len(plan.inputs)
    measurement = Measurement(count)
    odd: set[int] = set()
    constants: set[str] = set()
    unequal = False
    columns = max(_FEWEST_VALUES, _MEMORY // (3 * 8 * count))
    block_bytes = columns * min((FLOATS[tensor.dtype] for tensor in plan.averaged), default=8)
    rows = np.empty((count, columns))
    total = count * sum(tensor.nbytes for tensor in (*plan.averaged, *plan.compared))
    within = {tensor.name for tensor in kernels_among(plan.averaged) or plan.averaged}
    sources = list(map(Source.of, plan.inputs))
    for block in stream_values(plan, block_bytes):
        width = kernels = 0
        integers: list[bytes] = []
        for number, values in enumerate(block):
            floats = sorted(
                ((tensor.name not in within, array) for tensor, array in values if tensor.dtype in FLOATS),
                key=lambda entry: entry[0],
            )
            kernels = sum(len(array) for other, array in floats if not other)
            width = sum(len(array) for _, array in floats)
            if floats:
                np.concatenate([array for _, array in floats], out=rows[number, :width])
            if number not in odd and not np.isfinite(rows[number, :width]).all():
                for tensor, array in values:
                    if tensor.dtype in FLOATS and not np.isfinite(array).all() and is_same(sources, tensor):
                        constants.add(tensor.name)
                        array[~np.isfinite(array)] = 0.0
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
    return measurement, odd, unequal, constants
