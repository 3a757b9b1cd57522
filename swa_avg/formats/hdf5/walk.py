"""Collect what a walk over the groups of an HDF5 region finds, whether our parser or libhdf5 reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from swa_avg.errors import UnreadableError
from swa_avg.files.region import Region
from swa_avg.formats.base import Role, Tensor

__all__ = ["Walk"]

_MAX_OBJECTS = 50_000
_MAX_DEPTH = 64
_MAX_NAME = 1_000
_OPTIMIZER = re.compile(
    r"(?:^|[/_])(?:optim\w*|opts?|adam\w*|nadam|sgd|rmsprop|adagrad|adadelta|adafactor|ftrl|lion|lamb|muon)(?:[/_0-9])"
)
_ROLES: dict[str, Role] = {"optimizer": "optimizer", "optimizer_weights": "optimizer", "metrics": "metric"}


@dataclass
class Walk:
    """What one pass over the groups of a region has found so far."""

    region: Region
    index: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, Sequence[bytes]] = field(default_factory=dict)
    datasets: dict[str, Sequence[bytes]] = field(default_factory=dict)
    at: str | None = None
    """The object that is being read."""
    _entered: set[int] = field(default_factory=set)

    def child(self, path: str, name: bytes) -> str:
        """Return the path of what a group holds under `name`, after checking the name and the count."""
        if len(name) > _MAX_NAME:
            raise UnreadableError(self.region.path, f"holds a name of {len(name)} bytes")
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise UnreadableError(
                self.region.path, f"holds a name that is not UTF-8: {name[:80]!r}"
            ) from None
        if text in ("", ".", "..") or "/" in text:
            raise UnreadableError(self.region.path, f"holds an invalid name: {name[:80]!r}")
        self.at = child = f"{path}/{text}" if path else text
        if child in self.tensors or child in self.groups:
            raise UnreadableError(self.region.path, "appears twice in the file", tensor=child)
        if len(self.tensors) + len(self.groups) >= _MAX_OBJECTS:
            raise UnreadableError(self.region.path, f"holds more than {_MAX_OBJECTS} objects")
        return child

    def enter(self, path: str, address: int, attributes: Sequence[bytes]) -> None:
        """Record a group, which may be reached only once."""
        if address in self._entered:
            raise UnreadableError(self.region.path, "is a group that is linked twice", tensor=path)
        if path.count("/") > _MAX_DEPTH:
            raise UnreadableError(self.region.path, f"holds groups nested more than {_MAX_DEPTH} deep")
        self._entered.add(address)
        self.groups[path] = attributes

    def add(self, name: str, shape: tuple[int, ...], kind: tuple[str, int], offset: int) -> None:
        """Record a dataset; `kind` is its type and the bytes of a value."""
        dtype, itemsize = kind
        nbytes = math.prod(shape) * itemsize
        role = _ROLES.get(name.split("/", 1)[0], "weight")
        offset = offset if nbytes else 0
        self.tensors[name] = Tensor(name, tuple(map(int, shape)), dtype, self.index, offset, nbytes, role)

    def refuse_link(self, name: str) -> UnreadableError:
        problem = "is a soft or external link, which Keras never writes"
        return UnreadableError(self.region.path, problem, tensor=name)

    def refuse_storage(self, name: str) -> UnreadableError:
        problem = "is stored chunked, compressed, compact, virtual or in another file"
        hint = "rewrite it without: h5repack -l CONTI -f NONE IN OUT"
        return UnreadableError(self.region.path, problem, tensor=name, hint=hint)

    def refuse_type(self, name: str) -> UnreadableError:
        problem = "has a type that Keras does not write for a variable"
        return UnreadableError(self.region.path, problem, tensor=name)

    def refuse_object(self, name: str) -> UnreadableError:
        return UnreadableError(self.region.path, "is neither a group nor a dataset", tensor=name)

    def check_size(self, name: str, nbytes: int, offset: int | None, stored: int) -> None:
        """Raise UnreadableError unless all of a dataset's bytes were written."""
        if nbytes and offset is None:
            raise UnreadableError(self.region.path, "was never written", tensor=name)
        if offset is not None and stored != nbytes:
            problem = f"its shape takes {nbytes} bytes, but {stored} are stored"
            raise UnreadableError(self.region.path, problem, tensor=name)

    def inner_optimizers(self) -> dict[str, Tensor]:
        """Return the tensors of optimizers that a subclassed model holds, such as a GAN's.

        They are recognized by what they are called (`gen_opt`, `optimizers/0`, `d_adam`), by the number of
        iterations that every Keras optimizer starts with, and by the shapes of the rest: scalars, and slots
        for weights.
        """
        members: dict[str, list[Tensor]] = {}
        for name, tensor in self.tensors.items():
            members.setdefault(name.rpartition("/")[0], []).append(tensor)
        named = {group for group in members if group.endswith("/vars") and _OPTIMIZER.search(group)}
        shapes = {t.shape for group, tensors in members.items() if group not in named for t in tensors}
        found = {}
        for group in named:
            count = self.tensors.get(f"{group}/0")
            slots = [tensor for tensor in members[group] if tensor is not count]
            counts = count is not None and count.shape == () and count.dtype.startswith(("int", "uint"))
            if counts and all(tensor.shape in {(), *shapes} for tensor in slots):
                found.update({t.name: replace(t, role="optimizer") for t in members[group]})
        return found
