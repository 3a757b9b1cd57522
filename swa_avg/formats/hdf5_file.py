"""Checkpoints that are one HDF5 file: `.weights.h5`, and the legacy `.h5` and `.hdf5`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from swa_avg.errors import Finding, UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.region import Region
from swa_avg.files.sources import LocalSource
from swa_avg.files.untrusted_json import parse_json
from swa_avg.formats.base import (
    RECORD_NAME,
    Buffer,
    Checkpoint,
    Format,
    Settings,
    Stage,
    StoredRecord,
    Stream,
    Tensor,
    write_shard,
)
from swa_avg.formats.hdf5.layout import SIGNATURE, Layout, read_layout
from swa_avg.formats.hdf5.messages import AttributeReader, DamagedStructureError

__all__ = ["FORMAT", "Hdf5Checkpoint", "check_store", "is_keras_store", "layer_names"]

_SUFFIX = ".weights.h5"
_LEGACY_SUFFIXES = (".h5", ".hdf5")
_LEGACY_WEIGHTS = "legacy HDF5 weights"
_TOP_LEVEL, _OPTIMIZER = "top_level_model_weights", "optimizer_weights"


@dataclass(frozen=True, kw_only=True)
class Hdf5Checkpoint(Checkpoint):
    """A checkpoint that is one HDF5 file; the record is a root attribute of it."""

    kind: str = "Keras weights"
    suffixes: tuple[str, ...] = (_SUFFIX,)

    def write(self, stream: Stream, record: Callable[[], StoredRecord], stage: Stage) -> None:
        from swa_avg.formats.hdf5.libhdf5 import check_readable
        from swa_avg.formats.hdf5.rebuild import write_record

        file = stage.create(stage.output.name, self.shards[0].size)
        write_shard(file, stream(0))
        made = record()
        if made is not None:
            write_record(file, made, self.path, self.tensors.values())
        # What was copied has no checksum of its own that would reveal damage.
        check_readable(Region(LocalSource(self.path, file)), self.tensors)

    def write_again(self, value: Callable[[Tensor], Buffer], settings: Settings | None, stage: Stage) -> None:
        # What lies between the tensors was parsed, and comes from memory: libhdf5 need not look at it.
        write_shard(stage.create(stage.output.name, self.shards[0].size), self.refilled(value)(0))

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        from swa_avg.formats.hdf5.rebuild import strip

        # In a legacy file of weights alone every top-level group is a layer.
        groups = () if self.kind == _LEGACY_WEIGHTS else ("optimizer", _OPTIMIZER)
        return replace(self, **strip(self, groups, scratch))

    def as_weights(self) -> Checkpoint | None:
        return None if self.is_legacy else self

    def differences(self, template: Checkpoint, *, rebuilt: bool) -> Iterator[Finding]:
        return iter(())  # the record itself lies between the tensors, and Keras reads nothing else there


def _open(region: Region, like: Checkpoint | None) -> Hdf5Checkpoint:
    if isinstance(like, Hdf5Checkpoint) and like.shares_layout((region,)):
        return replace(like, path=region.path, shards=(region,))
    return _keras_checkpoint(region, read_layout(region))


def _keras_checkpoint(region: Region, layout: Layout) -> Hdf5Checkpoint:
    path = region.path
    reader = AttributeReader(region)
    root = _strings(
        reader,
        layout.groups[""],
        *("layer_names", "model_config", "training_config", "keras_version", "backend", RECORD_NAME),
    )
    own: dict[str, Any] = {"tensors": layout.tensors}
    if "model_weights" in layout.groups:
        own |= {"kind": "legacy HDF5 model", "suffixes": _LEGACY_SUFFIXES, "is_legacy": True}
        _check_legacy_groups(reader, layout, "model_weights")
        for key, name in (("config", "model_config"), ("training_config", "training_config")):
            if name in root:
                own[key] = parse_json(b"".join(root[name]), path, name)
        own["optimizer_config"] = own.get("training_config", {}).get("optimizer_config")
    elif "layer_names" in root:
        own |= {"kind": _LEGACY_WEIGHTS, "suffixes": _LEGACY_SUFFIXES, "is_legacy": True}
        _check_legacy_groups(reader, layout, "")
        # The top level holds layers, whatever they are called.
        own["tensors"] = {name: replace(tensor, role="weight") for name, tensor in layout.tensors.items()}
    elif is_keras_store(layout.groups):
        own |= {"layer_names": layer_names(region, layout), "empty_groups": check_store(path, layout)}
    elif "lora" not in layout.groups:  # KerasHub's factors alone, which no plan takes
        raise UnreadableError(
            path, "an HDF5 file, but not one that Keras wrote: no `vars` groups, no `layer_names`"
        )
    if RECORD_NAME in root:
        own["record"] = parse_json(b"".join(root[RECORD_NAME]), path, "its record of how it was made")
    return Hdf5Checkpoint(
        path,
        shards=(region,),
        writer=_writer(root.get("keras_version", ()), root.get("backend", ())),
        **own,
    )


def _writer(version: Sequence[bytes], backend: Sequence[bytes]) -> str | None:
    on = f" with {_text(backend[0])}" if backend else ""
    return f"Keras {_text(version[0])}{on}" if version else None


def is_keras_store(groups: Iterable[str]) -> bool:
    """Tell whether these groups are the layout of Keras's own saving library (`.../vars/0`)."""
    return any(path == "vars" or path.endswith("/vars") for path in groups)


def check_store(path: Location, layout: Layout) -> frozenset[str]:
    """Return the `vars` groups without a tensor of a file that Keras's own saving library wrote.

    The library puts variables into such a group, whatever a layer or an optimizer calls them. HDF5 has no
    checksum of names: a damaged one shows here, or where checkpoints are compared.

    Raises:
        UnreadableError: something lies outside these groups.
    """
    tensors = [name for name in layout.tensors if "/vars/" in f"/{name}"]
    groups = [group for group in layout.groups if "/vars/" in f"/{group}/"]
    _check_explained(path, layout, tensors, groups, "in a group `vars`, where Keras puts every variable")
    return frozenset(groups).difference(name.rpartition("/")[0] for name in tensors)


def layer_names(region: Region, layout: Layout) -> dict[str, str]:
    """Return path of a layer's group -> the layer's name, where the writer stored names (Keras 3.10 on).

    The empty path is the model itself.
    """
    names = {}
    reader = AttributeReader(region)
    for path, messages in layout.groups.items():
        if path == "vars" or path.endswith("/vars"):
            value = _strings(reader, messages, "name").get("name")
            if value:
                names[path.removesuffix("vars").removesuffix("/")] = _text(value[0])
    return names


def _check_legacy_groups(reader: AttributeReader, layout: Layout, parent: str) -> None:
    """Check that a legacy file stores the layers and weights that it lists, and no others.

    A save that crashed half way leaves, with some versions of Keras, a file that opens cleanly.
    """
    path = reader.region.path
    prefix = f"{parent}/" if parent else ""
    layers = _names(reader, layout.groups[parent], "layer_names")
    hint = "the save that wrote it did not finish: leave this file out"
    for layer in layers:
        if prefix + layer not in layout.groups:
            raise UnreadableError(path, "layer listed, but not stored", tensor=layer, hint=hint)
    if prefix + _TOP_LEVEL in layout.groups:
        layers.append(_TOP_LEVEL)
    listed: set[str] = set()
    for layer in sorted(set(layers)):
        weights = _names(reader, layout.groups[prefix + layer], "weight_names", layer)
        if len(set(weights)) < len(weights):
            raise UnreadableError(path, "the same weight listed twice", tensor=layer, hint=hint)
        listed.update(f"{prefix}{layer}/{weight}" for weight in weights)
    groups = {prefix + layer for layer in layers}
    if parent and _OPTIMIZER in layout.groups:
        found = _strings(reader, layout.groups[_OPTIMIZER], "weight_names").get("weight_names", ())
        listed.update(f"{_OPTIMIZER}/{_text(weight)}" for weight in found)
        groups.add(_OPTIMIZER)
    for name in sorted(listed - layout.tensors.keys()):
        shown = name.removeprefix("model_weights/")
        raise UnreadableError(path, "weight listed, but not stored", tensor=shown, hint=hint)
    _check_explained(path, layout, listed, groups, "in a list of layers or weights")


def _check_explained(
    path: Location, layout: Layout, tensors: Collection[str], groups: Collection[str], expected: str
) -> None:
    """Raise UnreadableError if anything is stored but these, and the groups that lead to them."""
    known = {*tensors, *groups, ""}
    for name in (*tensors, *groups):
        known.update(name[: match.start()] for match in re.finditer("/", name))
    for stored in (layout.tensors, layout.groups):
        for name in sorted(stored.keys() - known, key=lambda name: (-name.count("/"), name)):
            problem = f"is not {expected}: a name is damaged, or another program added it"
            raise UnreadableError(path, problem, tensor=name, hint="leave this file out")


def _names(
    reader: AttributeReader, messages: Sequence[bytes], attribute: str, layer: str | None = None
) -> list[str]:
    values = _strings(reader, messages, attribute).get(attribute)
    if values is None:
        hint = (
            "the save that wrote it did not finish, or it is stored in a newer HDF5 layout than Keras writes"
        )
        raise UnreadableError(reader.region.path, f"no attribute `{attribute}`", tensor=layer, hint=hint)
    return list(map(_text, values))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def _strings(reader: AttributeReader, messages: Sequence[bytes], *names: str) -> dict[str, list[bytes]]:
    try:
        return reader.strings(messages, names)
    except DamagedStructureError as error:
        raise UnreadableError(reader.region.path, f"damaged HDF5 file: {error}") from error


FORMAT = Format(description="HDF5", suffixes=(_SUFFIX, *_LEGACY_SUFFIXES), signature=SIGNATURE, open=_open)
