"""HDF5 images: where each tensor lies, and bare HDF5 checkpoints (`.weights.h5`, `.h5`, `.hdf5`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5t

from swa_avg.errors import UnreadableError
from swa_avg.formats.attributes import DamagedAttributeError, read_strings
from swa_avg.formats.base import (
    Buffer,
    Checkpoint,
    Image,
    ImageFile,
    Provenance,
    Role,
    Stage,
    Tensor,
    open_file,
)
from swa_avg.strict_json import parse_json

__all__ = [
    "LEGACY_MODEL",
    "LEGACY_WEIGHTS",
    "SIGNATURE",
    "Hdf5Checkpoint",
    "Layout",
    "open_hdf5",
    "read_layout",
]

LEGACY_MODEL = "legacy HDF5 model"
LEGACY_WEIGHTS = "legacy HDF5 weights"
SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK_SIZE = 96
_PROVENANCE = "swa_avg"
_ATTRIBUTE_BYTES = 60_000  # HDF5 takes 64 kB an attribute
_MAX_OBJECTS = 200_000
_MAX_DEPTH = 64
_CONVERT = "rewrite it without: h5repack -l CONTI -f NONE IN OUT"

_KNOWN_TYPES: dict[tuple[int, int], tuple[tuple[str, Any], ...]] = {
    (h5t.FLOAT, 2): (("float16", h5t.IEEE_F16LE),),
    (h5t.FLOAT, 4): (("float32", h5t.IEEE_F32LE),),
    (h5t.FLOAT, 8): (("float64", h5t.IEEE_F64LE),),
    (h5t.INTEGER, 1): (("int8", h5t.STD_I8LE), ("uint8", h5t.STD_U8LE)),
    (h5t.INTEGER, 2): (("int16", h5t.STD_I16LE), ("uint16", h5t.STD_U16LE)),
    (h5t.INTEGER, 4): (("int32", h5t.STD_I32LE), ("uint32", h5t.STD_U32LE)),
    (h5t.INTEGER, 8): (("int64", h5t.STD_I64LE), ("uint64", h5t.STD_U64LE)),
}
_ROLES: dict[str, Role] = {"optimizer": "optimizer", "optimizer_weights": "optimizer", "metrics": "metric"}


@dataclass(frozen=True)
class Layout:
    """What is in one HDF5 image, apart from the values."""

    tensors: Mapping[str, Tensor]
    groups: Mapping[str, int]
    """Path -> address of the object header; the root is the empty path."""


@dataclass(frozen=True)
class Hdf5Checkpoint(Checkpoint):
    """A checkpoint that is one HDF5 file; the provenance is a root attribute."""

    def write(
        self, image: Callable[[int], Iterator[Buffer]], provenance: Callable[[], Provenance], stage: Stage
    ) -> None:
        file = stage.create(stage.output.name)
        for chunk in image(0):
            file.write(chunk)
        record = provenance()
        if record is not None:
            write_provenance(file, record)

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        # In a legacy file of weights alone every top-level group is a layer.
        groups = () if self.kind == LEGACY_WEIGHTS else ("optimizer", "optimizer_weights")
        return replace(self, **strip(self, groups, scratch))


def strip(checkpoint: Checkpoint, groups: Sequence[str], scratch: Callable[[], IO[bytes]]) -> dict[str, Any]:
    """Return images and tensors of a checkpoint without some top-level groups.

    HDF5 does not give back the room of what is deleted, so each image is copied, group by group.
    """
    images = []
    tensors: dict[str, Tensor] = {}
    for index, image in enumerate(checkpoint.images):
        file = scratch()
        with h5py.File(ImageFile(image), "r") as source, h5py.File(file, "w") as target:
            for position in range(h5a.get_num_attrs(source.id)):
                _copy_attribute(h5a.open(source.id, index=position), target.id)
            for name in source:
                if name not in groups:
                    source.copy(name, target)
        file.flush()
        stripped = Image(image.path, file, 0, file.seek(0, 2))
        images.append(stripped)
        for name, tensor in read_layout(stripped, index).tensors.items():
            tensors[name] = replace(
                tensor, dtype=checkpoint.tensors[name].dtype, role=checkpoint.tensors[name].role
            )
    return {"images": tuple(images), "tensors": tensors}


def _copy_attribute(source: Any, target: Any) -> None:
    copy = h5a.create(target, source.name, source.get_type(), source.get_space())
    value = np.empty(source.shape, source.dtype)
    source.read(value)
    copy.write(value)


def write_provenance(file: IO[bytes], provenance: Mapping[str, Any]) -> None:
    """Add the provenance to an HDF5 file as JSON in the root attribute `swa_avg` (in parts if it is long).

    Through the Python file object, since h5py crashes the process where it cannot write through a path.
    """
    text = json.dumps(provenance, separators=(",", ":")).encode("ascii")
    parts = [text[start : start + _ATTRIBUTE_BYTES] for start in range(0, len(text), _ATTRIBUTE_BYTES)]
    with h5py.File(file, "r+") as hdf5:
        for number, part in enumerate(parts):
            hdf5.attrs[_PROVENANCE if len(parts) == 1 else f"{_PROVENANCE}{number}"] = np.bytes_(part)


def open_hdf5(path: Path, like: Checkpoint | None = None) -> Hdf5Checkpoint:
    """Open a Keras checkpoint that is a bare HDF5 file.

    `like` is a checkpoint of the same run; where every byte outside the tensors is the same, its layout is
    taken over without parsing the file.

    Raises:
        UnreadableError: the file is damaged, is not a Keras checkpoint, or stores a tensor in another way
            than as one contiguous run of bytes.
    """
    file = open_file(path)
    try:
        image = Image(path, file, 0, file.seek(0, 2))
        if isinstance(like, Hdf5Checkpoint) and like.shares_layout((image,)):
            return replace(like, path=path, images=(image,))
        return _keras_checkpoint(path, image, read_layout(image))
    except BaseException:
        file.close()
        raise


def _keras_checkpoint(path: Path, image: Image, layout: Layout) -> Hdf5Checkpoint:
    root = _strings(image, layout.groups[""], "layer_names", "model_config", _PROVENANCE)
    kind, suffixes = "Keras weights", [".weights.h5"]
    tensors, names, config = layout.tensors, dict[str, str](), None
    if "model_weights" in layout.groups:
        kind, suffixes = LEGACY_MODEL, [".h5", ".hdf5"]
        _check_legacy_groups(image, layout, "model_weights")
        if "model_config" in root:
            config = parse_json(b"".join(root["model_config"]), path, "model_config")
    elif "layer_names" in root:
        kind, suffixes = LEGACY_WEIGHTS, [".h5", ".hdf5"]
        _check_legacy_groups(image, layout, "")
        # The top level holds layers, whatever they are called.
        tensors = {name: replace(tensor, role="weight") for name, tensor in tensors.items()}
    elif is_keras_store(layout.groups):
        names = layer_names(image, layout)
    else:
        raise UnreadableError(
            path, "an HDF5 file, but not one that Keras wrote: no `vars` groups, no `layer_names`"
        )
    return Hdf5Checkpoint(path, kind, tuple(suffixes), (image,), tensors, config, names, _PROVENANCE in root)


def is_keras_store(groups: Iterable[str]) -> bool:
    """Tell whether these groups are the layout of Keras's own saving library (`.../vars/0`)."""
    return any(path == "vars" or path.endswith("/vars") for path in groups)


def layer_names(image: Image, layout: Layout) -> dict[str, str]:
    """Return path of a layer's group -> the layer's name, where the writer stored names (Keras 3.10 on)."""
    names = {}
    for path, header in layout.groups.items():
        if path.endswith("/vars"):
            value = _strings(image, header, "name").get("name")
            if value:
                names[path.removesuffix("/vars")] = value[0].decode("utf-8", "backslashreplace")
    return names


def _check_legacy_groups(image: Image, layout: Layout, parent: str) -> None:
    """Hold the layer and weight names of a legacy file against its groups and datasets.

    Some versions of Keras leave a file that opens cleanly when a save crashed half way.
    """
    prefix = f"{parent}/" if parent else ""
    listed = _names(image, layout.groups[parent], "layer_names")
    stored = {
        path.removeprefix(prefix).split("/")[0] for path in layout.groups if path.startswith(prefix) and path
    }
    hint = "the save that wrote it did not finish: leave this file out"
    for layer in listed:
        if layer not in stored:
            raise UnreadableError(image.path, "layer listed, but not stored", tensor=layer, hint=hint)
    for layer in sorted(stored & {*listed, "top_level_model_weights"}):
        weights = _names(image, layout.groups[prefix + layer], "weight_names", layer)
        if len(set(weights)) < len(weights):
            raise UnreadableError(image.path, "the same weight listed twice", tensor=layer, hint=hint)
        for weight in weights:
            if f"{prefix}{layer}/{weight}" not in layout.tensors:
                name = f"{layer}/{weight}"
                raise UnreadableError(image.path, "weight listed, but not stored", tensor=name, hint=hint)


def _names(image: Image, header: int, attribute: str, layer: str | None = None) -> list[str]:
    values = _strings(image, header, attribute).get(attribute)
    if values is None:
        hint = (
            "the save that wrote it did not finish, or it is stored in a newer HDF5 layout than Keras writes"
        )
        raise UnreadableError(image.path, f"no attribute `{attribute}`", tensor=layer, hint=hint)
    return [value.decode("utf-8", "backslashreplace") for value in values]


def _strings(image: Image, header: int, *names: str) -> dict[str, list[bytes]]:
    try:
        return read_strings(image, header, names)
    except DamagedAttributeError as error:
        raise UnreadableError(image.path, f"damaged HDF5 file: {error}") from error


def read_layout(image: Image, index: int = 0) -> Layout:
    """Parse an HDF5 image for where its tensors lie; no attribute and no value is read.

    The walk is iterative and limited, follows hard links only, and visits no group twice.

    Raises:
        UnreadableError: the file is damaged, or holds something other than plain contiguous tensors.
    """
    if image.size < len(SIGNATURE) or image.read(0, len(SIGNATURE)) != SIGNATURE:
        raise UnreadableError(image.path, "not an HDF5 file")
    try:
        with h5py.File(ImageFile(image), "r") as file:
            layout = _Walk(image, index).walk(file.id)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        if isinstance(error, UnreadableError):
            raise
        raise UnreadableError(image.path, f"damaged HDF5 file ({_first_line(error)})") from error
    _check_extents(image, layout.tensors.values())
    return layout


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Walk:
    """One pass over the groups of an image."""

    def __init__(self, image: Image, index: int) -> None:
        self.image = image
        self.index = index
        self.tensors: dict[str, Tensor] = {}
        self.groups: dict[str, int] = {}
        self.seen: set[int] = set()

    def walk(self, file: Any) -> Layout:
        root = h5g.open(file, b"/")
        self._enter("", h5o.get_info(root).addr)
        pending = [("", root)]
        while pending:
            path, group = pending.pop()
            for name in group:
                child = self._child(path, name)
                if group.links.get_info(name).type != h5l.TYPE_HARD:
                    raise UnreadableError(
                        self.image.path, "is a soft or external link, which Keras never writes", tensor=child
                    )
                info = h5o.get_info(group, name)
                if info.type == h5o.TYPE_GROUP:
                    self._enter(child, info.addr)
                    pending.append((child, h5g.open(group, name)))
                elif info.type == h5o.TYPE_DATASET:
                    self.tensors[child] = self._tensor(child, h5d.open(group, name))
                else:
                    raise UnreadableError(self.image.path, "is neither a group nor a dataset", tensor=child)
                if len(self.tensors) + len(self.groups) > _MAX_OBJECTS:
                    raise UnreadableError(self.image.path, f"holds more than {_MAX_OBJECTS} objects")
        return Layout({**self.tensors, **self._inner_optimizers()}, self.groups)

    def _inner_optimizers(self) -> dict[str, Tensor]:
        """Return the tensors of optimizers that a subclassed model holds as attributes, such as a GAN's.

        Told by what they are called and by what every Keras optimizer starts with: the count of its
        iterations and its learning rate.
        """
        found = {}
        for group in self.groups:
            start = [self.tensors.get(f"{group}/{index}") for index in (0, 1)]
            if not re.search(r"optimizer[^/]*/vars$", group) or None in start:
                continue
            count, rate = start
            if count and rate and count.shape == rate.shape == () and count.dtype.startswith(("int", "uint")):
                for name, tensor in self.tensors.items():
                    if name.startswith(f"{group}/"):
                        found[name] = replace(tensor, role="optimizer")
        return found

    def _child(self, path: str, name: bytes) -> str:
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise UnreadableError(self.image.path, f"holds a name that is not UTF-8: {name[:80]!r}") from None
        if text in ("", ".", "..") or "/" in text:
            raise UnreadableError(self.image.path, f"holds an impossible name: {name[:80]!r}")
        return f"{path}/{text}" if path else text

    def _enter(self, path: str, address: int) -> None:
        if address in self.seen:
            raise UnreadableError(self.image.path, "is a group that is linked twice", tensor=path)
        if path.count("/") > _MAX_DEPTH:
            raise UnreadableError(self.image.path, f"holds groups nested more than {_MAX_DEPTH} deep")
        self.seen.add(address)
        self.groups[path] = address

    def _tensor(self, name: str, dataset: Any) -> Tensor:
        dtype, itemsize = self._dtype(name, dataset)
        space = dataset.get_space()
        shape: tuple[int, ...] = space.shape if space.get_simple_extent_type() != h5py.h5s.NULL else (0,)
        nbytes = math.prod(shape) * itemsize
        properties = dataset.get_create_plist()
        if (
            properties.get_layout() != h5d.CONTIGUOUS
            or properties.get_nfilters()
            or properties.get_external_count()
        ):
            problem = "is stored chunked, compressed, compact, virtual or in another file"
            raise UnreadableError(self.image.path, problem, tensor=name, hint=_CONVERT)
        offset = dataset.get_offset() if nbytes else 0
        if offset is None:
            raise UnreadableError(self.image.path, "was never written", tensor=name)
        role = _ROLES.get(name.split("/", 1)[0], "weight")
        return Tensor(name, tuple(map(int, shape)), dtype, self.index, offset, nbytes, role)

    def _dtype(self, name: str, dataset: Any) -> tuple[str, int]:
        stored = dataset.get_type()
        kind, size = stored.get_class(), stored.get_size()
        for dtype, known in _KNOWN_TYPES.get((kind, size), ()):
            if stored.equal(known):
                return dtype, size
        if kind == h5t.OPAQUE and size == 2:
            # Keras 3 tags bfloat16 with an attribute; that it is there is enough, its value is not read.
            return ("bfloat16" if h5a.exists(dataset, b"dtype") else "opaque16"), size
        if kind == h5t.ENUM and size == 1 and stored.get_nmembers() == 2:
            return "bool", size
        raise UnreadableError(
            self.image.path, "has a type that Keras does not write for a variable", tensor=name
        )


def _check_extents(image: Image, tensors: Iterable[Tensor]) -> None:
    """Raise UnreadableError unless every extent lies inside the image and no two overlap.

    The exact same extent twice is one dataset with two names.
    """
    previous: Tensor | None = None
    for tensor in sorted((t for t in tensors if t.nbytes), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset < _SUPERBLOCK_SIZE or tensor.stop > image.size:
            problem = f"its {tensor.nbytes} bytes lie outside the file; it was truncated or damaged"
            raise UnreadableError(image.path, problem, tensor=tensor.name)
        if (
            previous
            and tensor.offset < previous.stop
            and (tensor.offset, tensor.stop)
            != (
                previous.offset,
                previous.stop,
            )
        ):
            raise UnreadableError(
                image.path, "overlaps another tensor; the file is damaged", tensor=tensor.name
            )
        previous = tensor
