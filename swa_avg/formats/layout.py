"""HDF5 images: where each tensor lies."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import h5py
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t

from swa_avg.errors import SwaAvgError, UnreadableError
from swa_avg.formats.attributes import DamagedAttributeError
from swa_avg.formats.base import Image, ImageFile, Role, Tensor
from swa_avg.formats.structure import structures

__all__ = ["SIGNATURE", "Layout", "first_line", "read_layout"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK_SIZE = 96
_MAX_OBJECTS = 50_000
_MAX_DEPTH = 64
_MAX_NAME = 1_000
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
    datasets: Mapping[str, int]
    """The same of what is no group."""


def read_layout(image: Image, index: int = 0) -> Layout:
    """Parse an HDF5 image for where its tensors lie; no attribute and no value is read.

    The walk is iterative and limited, follows hard links only, and visits no group twice.

    Raises:
        UnreadableError: the file is damaged, or holds something other than plain contiguous tensors.
    """
    if image.size < len(SIGNATURE) or image.read(0, len(SIGNATURE)) != SIGNATURE:
        raise UnreadableError(image.path, "not an HDF5 file")
    walk = _Walk(image, index)
    try:
        with h5py.File(ImageFile(image), "r") as file:
            layout = walk.walk(file.id)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, SwaAvgError):
            raise
        problem = f"damaged HDF5 file ({first_line(error)})"
        raise UnreadableError(image.path, problem, tensor=walk.at) from error
    _check_extents(image, layout)
    return layout


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Walk:
    """One pass over the groups of an image."""

    def __init__(self, image: Image, index: int) -> None:
        self.image = image
        self.index = index
        self.tensors: dict[str, Tensor] = {}
        self.groups: dict[str, int] = {}
        self.datasets: dict[str, int] = {}
        self.seen: set[int] = set()
        self.at: str | None = None
        """The object that is looked at."""

    def walk(self, file: Any) -> Layout:
        root = h5g.open(file, b"/")
        self._enter("", h5o.get_info(root).addr)
        pending = [("", root)]
        while pending:
            path, group = pending.pop()
            for name in group:
                self.at = child = self._child(path, name)
                if child in self.tensors or child in self.groups:
                    raise UnreadableError(self.image.path, "stands twice in the file", tensor=child)
                if group.links.get_info(name).type != h5l.TYPE_HARD:
                    raise UnreadableError(
                        self.image.path, "is a soft or external link, which Keras never writes", tensor=child
                    )
                info = h5o.get_info(group, name)
                if info.type == h5o.TYPE_GROUP:
                    self._enter(child, info.addr)
                    pending.append((child, h5g.open(group, name)))
                elif info.type == h5o.TYPE_DATASET:
                    self.datasets[child] = info.addr
                    self.tensors[child] = self._tensor(child, h5d.open(group, name))
                else:
                    raise UnreadableError(self.image.path, "is neither a group nor a dataset", tensor=child)
                if len(self.tensors) + len(self.groups) > _MAX_OBJECTS:
                    raise UnreadableError(self.image.path, f"holds more than {_MAX_OBJECTS} objects")
        return Layout({**self.tensors, **self._inner_optimizers()}, self.groups, self.datasets)

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
        if len(name) > _MAX_NAME:
            raise UnreadableError(self.image.path, f"holds a name of {len(name)} bytes")
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
        # The layout first: to ask a virtual dataset for its shape would open the files that it names.
        properties = dataset.get_create_plist()
        if (
            properties.get_layout() != h5d.CONTIGUOUS
            or properties.get_nfilters()
            or properties.get_external_count()
        ):
            problem = "is stored chunked, compressed, compact, virtual or in another file"
            raise UnreadableError(self.image.path, problem, tensor=name, hint=_CONVERT)
        dtype, itemsize = self._dtype(name, dataset)
        space = dataset.get_space()
        shape: tuple[int, ...] = space.shape if space.get_simple_extent_type() != h5s.NULL else (0,)
        nbytes = math.prod(shape) * itemsize
        offset = dataset.get_offset() if nbytes else 0
        if offset is None:
            raise UnreadableError(self.image.path, "was never written", tensor=name)
        if nbytes and dataset.get_storage_size() != nbytes:
            problem = f"its shape takes {nbytes} bytes, but {dataset.get_storage_size()} are stored"
            raise UnreadableError(self.image.path, problem, tensor=name)
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


def _check_extents(image: Image, layout: Layout) -> None:
    """Raise UnreadableError unless every extent lies inside the image and overlaps nothing.

    The exact same extent twice is one dataset with two names.
    """
    end = min(image.size, _end_of_file(image))
    tensors = [tensor for tensor in layout.tensors.values() if tensor.nbytes]
    for tensor in tensors:
        if tensor.offset < _SUPERBLOCK_SIZE or tensor.stop > end:
            problem = f"its {tensor.nbytes} bytes lie outside the file; it was truncated or damaged"
            raise UnreadableError(image.path, problem, tensor=tensor.name)
    try:
        taken = structures(image, (*layout.groups.values(), *layout.datasets.values()))
    except DamagedAttributeError as error:
        raise UnreadableError(image.path, f"damaged HDF5 file ({error})") from error
    extents = {(tensor.offset, tensor.stop): tensor.name for tensor in tensors}
    position, name = 0, ""
    for (start, stop), this in sorted([*extents.items(), *((extent, "") for extent in taken)]):
        if start < position:
            problem = "overlaps another part of the file; it is damaged"
            raise UnreadableError(image.path, problem, tensor=this or name or None)
        position, name = stop, this


def _end_of_file(image: Image) -> int:
    """Return where the superblock says that the file ends: what lies beyond, HDF5 takes for free space."""
    version = image.read(8, 1)[0]
    return int(struct.unpack("<Q", image.read({0: 40, 1: 44}.get(version, 28), 8))[0])
