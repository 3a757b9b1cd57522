"""Folders that `tf.data.Dataset.save` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from swa_avg.data.batches import ArrayData, Data
from swa_avg.data.binding import check_rows, pick
from swa_avg.data.rows import Rows, RowWriter
from swa_avg.data.spec import Spec, fits
from swa_avg.data.streams import StreamData
from swa_avg.errors import UnreadableError, UsageError, first_line

__all__ = ["open_saved"]

_TOGETHER = 256


def open_saved(path: Path, spec: Spec) -> Data:
    """Open a saved dataset of rows, or of batches of them.

    Rows of one shape are copied once to a temporary file and drawn from it at random: a dataset is often
    saved sorted by class, and can be read in its own order only. Rows of several shapes come in that order.

    Raises:
        UnreadableError: it is not such a folder, or damaged.
        UsageError: TensorFlow is not installed.
    """
    if not (path / "dataset_spec.pb").is_file():
        problem = "expected a folder written by tf.data.Dataset.save; found one without dataset_spec.pb"
        hint = (
            "of images, name a function, MODULE:FUNCTION, that returns "
            "keras.utils.image_dataset_from_directory(FOLDER, labels=None, image_size=SIZE)"
        )
        raise UnreadableError(path, problem, hint=hint)
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UsageError(f"reading the dataset in {path} needs TensorFlow: pip install tensorflow") from error
    with _readable(path):
        dataset = tf.data.Dataset.load(str(path))
        parts, _ = pick(str(path), spec, dataset.element_spec)
        if _holds_rows(parts, spec):
            row_shapes = [part.shape for _, part in parts.values()]
            dataset = dataset.batch(_TOGETHER if _fixed(row_shapes) else 1)
        else:
            row_shapes = [part.shape[1:] for _, part in parts.values()]
    source = StreamData(str(path), spec, _elements(path, dataset))
    text = any(part.dtype == tf.string for _, part in parts.values())
    if text or not _fixed(row_shapes):
        what = "rows of text" if text else "rows of several shapes"
        source.notes.append(f"{what} are used in the order in which they were saved")
        return source
    return _copied(path, spec, source)


def _holds_rows(parts: Mapping[str, tuple[str, Any]], spec: Spec) -> bool:
    """Tell whether the elements are rows rather than batches, by what the model takes."""
    for name, (_, part) in parts.items():
        expected = spec.shape_of(name)
        if expected is not None and part.shape.rank is not None and part.shape.rank < len(expected):
            return fits((1, *part.shape), expected)
    return False


def _fixed(shapes: Sequence[Any]) -> bool:
    return all(shape.is_fully_defined() for shape in shapes)


def _elements(path: Path, dataset: Any) -> Iterator[Any]:
    with _readable(path):
        yield from dataset.as_numpy_iterator()


def _copied(path: Path, spec: Spec, source: StreamData) -> Data:
    """Copy what is used to temporary files, one an input, and draw from there."""
    with ExitStack() as stack:
        writers: dict[str, RowWriter] = {}
        keys: dict[str, str] = {}
        for batch in source.raw():
            for name, (key, values) in batch.items():
                if name not in writers:
                    writers[name] = stack.enter_context(closing(RowWriter(path)))
                    keys[name] = key
                writers[name].write(values)
        if not writers:
            raise UnreadableError(path, "expected at least one row; found none")
        rows: dict[str, Rows] = {name: writer.rows() for name, writer in writers.items()}
        check_rows(str(path), spec, {name: (keys[name], array) for name, array in rows.items()})
        data = ArrayData(str(path), spec, rows, keys)
        data.stack = stack.pop_all()
    data.ignored = source.ignored
    data.structure = source.structure
    return data


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn TensorFlow's complaints about the folder into ours."""
    import tensorflow as tf
    from google.protobuf.message import Error as ProtobufError

    try:
        yield
    except (tf.errors.OpError, ProtobufError, ValueError, TypeError) as error:
        if isinstance(error, UnreadableError | UsageError):
            raise
        raise UnreadableError(path, f"damaged dataset ({first_line(error)})") from error
