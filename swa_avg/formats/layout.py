"""HDF5 images: where each tensor lies."""

from __future__ import annotations

import itertools
import math
import operator
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from swa_avg.errors import UnreadableError
from swa_avg.formats.attributes import (
    AttributeReader,
    DamagedStructureError,
    decode,
    number_of,
    shape_of,
)
from swa_avg.formats.base import PROVENANCE, Role, Tensor
from swa_avg.formats.image import Image
from swa_avg.formats.structure import Extent, Message, NewerStructureError, Structures

__all__ = ["SIGNATURE", "Layout", "Walk", "read_layout"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK_SIZE = 96
_MAX_OBJECTS = 50_000
_MAX_DEPTH = 64
_MAX_NAME = 1_000
_ROLES: dict[str, Role] = {"optimizer": "optimizer", "optimizer_weights": "optimizer", "metrics": "metric"}

_DATASPACE, _DATATYPE, _EXTERNAL, _STORAGE, _FILTERS = 0x0001, 0x0003, 0x0007, 0x0008, 0x000B
_ROOT_ATTRIBUTES = {
    *(b"layer_names", b"keras_version", b"backend", b"model_config", b"training_config"),
    PROVENANCE.encode(),
}
_GROUP_ATTRIBUTES = {b"name", b"weight_names", b"layer_names", b"keras_version", b"backend"}
_DATASET_ATTRIBUTES = {b"dtype"}
_SHARED = 2
_CONTIGUOUS = 1
_OPAQUE = 5
_BOOL = (  # h5py's: an enumeration of int8
    bytes.fromhex("18 020000 01000000 10 080000 01000000 00000800") + b"FALSE\0\0\0TRUE\0\0\0\0\0\1"
)
_UNALLOCATED = 2**64 - 1


@dataclass(frozen=True)
class Layout:
    """What is in one HDF5 image, apart from the values."""

    tensors: Mapping[str, Tensor]
    groups: Mapping[str, Sequence[bytes]]
    """Path -> attribute messages; the root is the empty path."""
    datasets: Mapping[str, Sequence[bytes]]
    """The same of what is no group."""


def read_layout(image: Image, index: int = 0) -> Layout:
    """Parse an HDF5 image for where its tensors lie; no value is read.

    libhdf5 is asked only where a group keeps its links in a newer way than Keras's files do, and never
    for an attribute.

    Raises:
        UnreadableError: the file is damaged, or holds something other than plain contiguous tensors.
    """
    if image.size < len(SIGNATURE) or image.read(0, len(SIGNATURE)) != SIGNATURE:
        raise UnreadableError(image.path, "not an HDF5 file")
    walk = Walk(image, index)
    try:
        structures = Structures(image)
        try:
            _walk(walk, structures)
        except NewerStructureError:
            from swa_avg.formats.libhdf5 import walk_newer

            walk, structures = Walk(image, index), Structures(image)
            walk_newer(walk, structures)
        _check_attributes(walk)
    except (DamagedStructureError, struct.error, IndexError, MemoryError) as error:
        problem = f"damaged HDF5 file ({error or 'a structure is too large'})"
        raise UnreadableError(image.path, problem, tensor=walk.at) from error
    layout = Layout({**walk.tensors, **walk.inner_optimizers()}, walk.groups, walk.datasets)
    _check_extents(image, layout.tensors.values(), structures)
    return layout


@dataclass
class Walk:
    """One pass over the groups of an image: what has been found so far."""

    image: Image
    index: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, Sequence[bytes]] = field(default_factory=dict)
    datasets: dict[str, Sequence[bytes]] = field(default_factory=dict)
    at: str | None = None
    """The object that is looked at."""
    _entered: set[int] = field(default_factory=set)

    def child(self, path: str, name: bytes) -> str:
        """Return the path of what a group holds under `name`, after checks of name and number."""
        if len(name) > _MAX_NAME:
            raise UnreadableError(self.image.path, f"holds a name of {len(name)} bytes")
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise UnreadableError(self.image.path, f"holds a name that is not UTF-8: {name[:80]!r}") from None
        if text in ("", ".", "..") or "/" in text:
            raise UnreadableError(self.image.path, f"holds an impossible name: {name[:80]!r}")
        self.at = child = f"{path}/{text}" if path else text
        if child in self.tensors or child in self.groups:
            raise UnreadableError(self.image.path, "stands twice in the file", tensor=child)
        if len(self.tensors) + len(self.groups) >= _MAX_OBJECTS:
            raise UnreadableError(self.image.path, f"holds more than {_MAX_OBJECTS} objects")
        return child

    def enter(self, path: str, address: int, attributes: Sequence[bytes]) -> None:
        """Note a group, which may be reached once only."""
        if address in self._entered:
            raise UnreadableError(self.image.path, "is a group that is linked twice", tensor=path)
        if path.count("/") > _MAX_DEPTH:
            raise UnreadableError(self.image.path, f"holds groups nested more than {_MAX_DEPTH} deep")
        self._entered.add(address)
        self.groups[path] = attributes

    def add(self, name: str, shape: tuple[int, ...], kind: tuple[str, int], offset: int) -> None:
        """Note a dataset, of a type and so many bytes a value."""
        dtype, itemsize = kind
        nbytes = math.prod(shape) * itemsize
        role = _ROLES.get(name.split("/", 1)[0], "weight")
        offset = offset if nbytes else 0
        self.tensors[name] = Tensor(name, tuple(map(int, shape)), dtype, self.index, offset, nbytes, role)

    def refuse_link(self, name: str) -> UnreadableError:
        problem = "is a soft or external link, which Keras never writes"
        return UnreadableError(self.image.path, problem, tensor=name)

    def refuse_storage(self, name: str) -> UnreadableError:
        problem = "is stored chunked, compressed, compact, virtual or in another file"
        hint = "rewrite it without: h5repack -l CONTI -f NONE IN OUT"
        return UnreadableError(self.image.path, problem, tensor=name, hint=hint)

    def refuse_type(self, name: str) -> UnreadableError:
        problem = "has a type that Keras does not write for a variable"
        return UnreadableError(self.image.path, problem, tensor=name)

    def refuse_object(self, name: str) -> UnreadableError:
        return UnreadableError(self.image.path, "is neither a group nor a dataset", tensor=name)

    def check_size(self, name: str, nbytes: int, offset: int | None, stored: int) -> None:
        """Raise UnreadableError unless a dataset's bytes were written, all of them."""
        if nbytes and offset is None:
            raise UnreadableError(self.image.path, "was never written", tensor=name)
        if offset is not None and stored != nbytes:
            problem = f"its shape takes {nbytes} bytes, but {stored} are stored"
            raise UnreadableError(self.image.path, problem, tensor=name)

    def inner_optimizers(self) -> dict[str, Tensor]:
        """Return the tensors of optimizers that a subclassed model holds as attributes, such as a GAN's.

        Told by what they are called and by what every Keras optimizer starts with: the count of its
        iterations and its learning rate.
        """
        groups = set()
        for group in self.groups:
            count, rate = (self.tensors.get(f"{group}/{index}") for index in (0, 1))
            if not re.search(r"optimizer[^/]*/vars$", group) or count is None or rate is None:
                continue
            if count.shape == rate.shape == () and count.dtype.startswith(("int", "uint")):
                groups.add(group)
        return {
            name: replace(tensor, role="optimizer")
            for name, tensor in self.tensors.items()
            if name.rpartition("/")[0] in groups
        }


def _walk(walk: Walk, structures: Structures) -> None:
    """Look at every object that can be reached; iterative, and no object is read twice.

    Raises:
        NewerStructureError: an object is of a newer kind than those that are read here.
    """
    if structures.is_newer:
        raise NewerStructureError
    known: dict[int, list[Message]] = {}
    root = structures.messages(structures.root)
    walk.enter("", structures.root, structures.attributes(root))
    pending = [("", root)]
    while pending:
        path, messages = pending.pop()
        links = structures.links(messages)
        if links is None:
            raise walk.refuse_object(path)
        for name, address in links:
            child = walk.child(path, name)
            if address is None:
                raise walk.refuse_link(child)
            if address not in known:
                known[address] = structures.messages(address)
            messages = known[address]
            attributes = structures.attributes(messages)
            if any(kind == _STORAGE for kind, _, _ in messages):
                walk.datasets[child] = attributes
                _add_tensor(walk, child, messages, attributes)
            else:
                walk.enter(child, address, attributes)
                pending.append((child, messages))


def _add_tensor(walk: Walk, name: str, messages: Sequence[Message], attributes: Iterable[bytes]) -> None:
    kinds = [kind for kind, _, _ in messages]
    if any(kinds.count(kind) > 1 for kind in (_DATASPACE, _DATATYPE, _STORAGE)):
        raise DamagedStructureError("a dataset has two shapes, types or places")
    bodies = {kind: body for kind, _, body in messages}
    flags = {kind: flag for kind, flag, _ in messages}
    storage = bodies[_STORAGE]
    if storage[0] not in (3, 4) or flags.get(_DATASPACE, 0) & _SHARED:
        raise NewerStructureError
    if storage[1] != _CONTIGUOUS or _FILTERS in bodies or _EXTERNAL in bodies:
        raise walk.refuse_storage(name)
    if not {_DATASPACE, _DATATYPE} <= bodies.keys():
        raise DamagedStructureError("a dataset has no shape or no type")
    if flags[_DATATYPE] & _SHARED:
        raise walk.refuse_type(name)
    kind = _type(bodies[_DATATYPE], attributes)
    if kind is None:
        raise walk.refuse_type(name)
    shape = shape_of(bodies[_DATASPACE])
    offset, stored = struct.unpack_from("<QQ", storage, 2)
    nbytes = math.prod(shape) * kind[1]
    walk.check_size(name, nbytes, None if offset == _UNALLOCATED else offset, stored)
    walk.add(name, shape, kind, offset)


def _type(datatype: bytes, attributes: Iterable[bytes]) -> tuple[str, int] | None:
    """Return what type a datatype message stands for, and its bytes a value; None if Keras has none such."""
    number = number_of(datatype)
    kind, size = datatype[0] & 15, int.from_bytes(datatype[4:8], "little")
    if number is not None:
        return number, size
    if kind == _OPAQUE and size == 2:
        # Keras 3 tags bfloat16 with an attribute; that it is there is enough.
        tagged = any(decode(body).name == b"dtype" for body in attributes)
        return ("bfloat16" if tagged else "opaque16"), size
    if datatype.rstrip(b"\0") == _BOOL:
        return "bool", size
    return None


def _check_attributes(walk: Walk) -> None:
    """Raise UnreadableError unless Keras's attributes have their names and can be what Keras makes them.

    Others may be there: people add their own, such as the names of classes.

    Raises:
        DamagedStructureError: an attribute is malformed.
    """
    reader = AttributeReader(walk.image)
    for path, messages in walk.groups.items():
        walk.at = path or None
        _check_names(walk, messages, _GROUP_ATTRIBUTES if path else _ROOT_ATTRIBUTES)
    for path, messages in walk.datasets.items():
        walk.at = path
        _check_names(walk, messages, _DATASET_ATTRIBUTES)
        if messages and reader.strings(messages, ["dtype"]).get("dtype") not in (None, [b"bfloat16"]):
            raise walk.refuse_type(path)


def _check_names(walk: Walk, messages: Iterable[bytes], known: set[bytes]) -> None:
    """Raise an error if an attribute of an object is called almost like a known one, or that is no text."""
    found = {attribute.name.rstrip(b"0123456789"): attribute for attribute in map(decode, messages)}
    if not all(found[name].is_text for name in found.keys() & known):
        raise DamagedStructureError("an attribute is no text")
    for own, other in itertools.product(found.keys() - known, known - found.keys()):
        if len(own) == len(other) and sum(map(operator.ne, own, other)) == 1:
            shown = own.decode("utf-8", "backslashreplace")
            problem = f"has no attribute `{other.decode()}`, and one `{shown}`: its name is damaged"
            raise UnreadableError(walk.image.path, problem, tensor=walk.at, hint="leave this file out")


def _check_extents(image: Image, tensors: Iterable[Tensor], structures: Structures) -> None:
    """Raise UnreadableError unless every extent lies inside the image and overlaps nothing.

    The exact same extent twice is one dataset with two names.
    """
    stored = [tensor for tensor in tensors if tensor.nbytes]
    for tensor in stored:
        if tensor.offset < _SUPERBLOCK_SIZE or tensor.stop > structures.end:
            problem = f"its {tensor.nbytes} bytes lie outside the file; it was truncated or damaged"
            raise UnreadableError(image.path, problem, tensor=tensor.name)
    extents: dict[Extent, str] = {(tensor.offset, tensor.stop): tensor.name for tensor in stored}
    position, name = 0, ""
    for (start, stop), this in sorted([*extents.items(), *((extent, "") for extent in structures.found)]):
        if start < position:
            problem = "overlaps another part of the file; it is damaged"
            raise UnreadableError(image.path, problem, tensor=this or name or None)
        position, name = stop, this
