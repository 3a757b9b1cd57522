"""Bare HDF5 checkpoints: `.weights.h5`, `.h5`, `.hdf5`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import IO

from swa_avg.errors import UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.region import Region
from swa_avg.files.sources import LocalSource
from swa_avg.files.untrusted_json import parse_json
from swa_avg.formats.base import PROVENANCE, Checkpoint, Provenance, Stage, Stream, write_shard
from swa_avg.formats.hdf5.layout import SIGNATURE, Layout, read_layout
from swa_avg.formats.hdf5.messages import AttributeReader, DamagedStructureError

__all__ = [
    "LEGACY_MODEL",
    "LEGACY_WEIGHTS",
    "SIGNATURE",
    "WEIGHTS",
    "Hdf5Checkpoint",
    "is_keras_store",
    "layer_names",
    "open_hdf5",
]

WEIGHTS = "Keras weights"
LEGACY_MODEL = "legacy HDF5 model"
LEGACY_WEIGHTS = "legacy HDF5 weights"


@dataclass(frozen=True)
class Hdf5Checkpoint(Checkpoint):
    """A checkpoint that is one HDF5 file; the provenance is a root attribute."""

    record: bytes = b""
    """The provenance as it is stored, JSON; empty where there is none."""
    training_config: bytes = b""
    """How a legacy model was compiled, JSON; likewise."""

    def write(
        self,
        stream: Stream,
        provenance: Callable[[], Provenance],
        stage: Stage,
    ) -> None:
        from swa_avg.formats.hdf5.libhdf5 import check_readable
        from swa_avg.formats.hdf5.rebuild import write_provenance

        file = stage.create(stage.output.name, self.shards[0].size)
        write_shard(file, stream(0, file))
        record = provenance()
        if record is not None:
            write_provenance(file, record, self.path, self.tensors.values())
        # There is no checksum that would tell of damage to what was copied.
        check_readable(Region(LocalSource(self.path, file)), self.tensors)

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        from swa_avg.formats.hdf5.rebuild import strip

        # In a legacy file of weights alone every top-level group is a layer.
        groups = () if self.kind == LEGACY_WEIGHTS else ("optimizer", "optimizer_weights")
        return replace(self, **strip(self, groups, scratch))


def open_hdf5(region: Region, like: Checkpoint | None = None) -> Hdf5Checkpoint:
    """Open a Keras checkpoint that is a bare HDF5 file.

    `region` is all of it; whoever opened it closes it where this fails. `like` is a checkpoint of the same
    run; where every byte outside the tensors is the same, its layout is taken over without parsing the file.

    Raises:
        UnreadableError: the file is damaged, is not a Keras checkpoint, or stores a tensor in another way
            than as one contiguous run of bytes.
    """
    if isinstance(like, Hdf5Checkpoint) and like.shares_layout((region,)):
        return replace(like, path=region.path, shards=(region,))
    return _keras_checkpoint(region, read_layout(region))


def _keras_checkpoint(region: Region, layout: Layout) -> Hdf5Checkpoint:
    path = region.path
    reader = AttributeReader(region)
    root = _strings(
        reader,
        layout.groups[""],
        *("layer_names", "model_config", "training_config", "keras_version", "backend", PROVENANCE),
    )
    kind, suffixes = WEIGHTS, [".weights.h5"]
    tensors, names, config = layout.tensors, dict[str, str](), None
    if "model_weights" in layout.groups:
        kind, suffixes = LEGACY_MODEL, [".h5", ".hdf5"]
        _check_legacy_groups(reader, layout, "model_weights")
        if "model_config" in root:
            config = parse_json(b"".join(root["model_config"]), path, "model_config")
    elif "layer_names" in root:
        kind, suffixes = LEGACY_WEIGHTS, [".h5", ".hdf5"]
        _check_legacy_groups(reader, layout, "")
        # The top level holds layers, whatever they are called.
        tensors = {name: replace(tensor, role="weight") for name, tensor in tensors.items()}
    elif is_keras_store(layout.groups):
        names = layer_names(region, layout)
    else:
        raise UnreadableError(
            path, "an HDF5 file, but not one that Keras wrote: no `vars` groups, no `layer_names`"
        )
    record = b"".join(root.get(PROVENANCE, []))
    return Hdf5Checkpoint(
        path,
        kind,
        tuple(suffixes),
        (region,),
        tensors,
        config,
        names,
        PROVENANCE in root,
        _writer(root.get("keras_version"), root.get("backend")),
        record,
        b"".join(root.get("training_config", [])),
    )


def _writer(version: list[bytes] | None, backend: list[bytes] | None) -> str | None:
    if not version:
        return None
    on = f" with {backend[0].decode('utf-8', 'backslashreplace')}" if backend else ""
    return f"Keras {version[0].decode('utf-8', 'backslashreplace')}{on}"


def is_keras_store(groups: Iterable[str]) -> bool:
    """Tell whether these groups are the layout of Keras's own saving library (`.../vars/0`)."""
    return any(path == "vars" or path.endswith("/vars") for path in groups)


def layer_names(region: Region, layout: Layout) -> dict[str, str]:
    """Return path of a layer's group -> the layer's name, where the writer stored names (Keras 3.10 on)."""
    names = {}
    reader = AttributeReader(region)
    for path, messages in layout.groups.items():
        if path.endswith("/vars"):
            value = _strings(reader, messages, "name").get("name")
            if value:
                names[path.removesuffix("/vars")] = value[0].decode("utf-8", "backslashreplace")
    return names


def _check_legacy_groups(reader: AttributeReader, layout: Layout, parent: str) -> None:
    """Hold the layer and weight names of a legacy file against its groups and datasets.

    Some versions of Keras leave a file that opens cleanly when a save crashed half way.
    """
    path = reader.region.path
    prefix = f"{parent}/" if parent else ""
    listed = _names(reader, layout.groups[parent], "layer_names")
    stored = {
        group.removeprefix(prefix).split("/")[0]
        for group in layout.groups
        if group.startswith(prefix) and group
    }
    hint = "the save that wrote it did not finish: leave this file out"
    for layer in listed:
        if layer not in stored:
            raise UnreadableError(path, "layer listed, but not stored", tensor=layer, hint=hint)
    for layer in sorted(stored & {*listed, "top_level_model_weights"}):
        weights = _names(reader, layout.groups[prefix + layer], "weight_names", layer)
        if len(set(weights)) < len(weights):
            raise UnreadableError(path, "the same weight listed twice", tensor=layer, hint=hint)
        _check_stored(path, layout, prefix + layer, weights, hint)
    if parent and "optimizer_weights" in layout.groups:
        weights = [
            name.decode("utf-8", "backslashreplace")
            for name in _strings(reader, layout.groups["optimizer_weights"], "weight_names").get(
                "weight_names", []
            )
        ]
        _check_stored(path, layout, "optimizer_weights", weights, hint)


def _check_stored(path: Location, layout: Layout, group: str, weights: Iterable[str], hint: str) -> None:
    for weight in weights:
        if f"{group}/{weight}" not in layout.tensors:
            name = f"{group.removeprefix('model_weights/')}/{weight}"
            raise UnreadableError(path, "weight listed, but not stored", tensor=name, hint=hint)


def _names(
    reader: AttributeReader, messages: Sequence[bytes], attribute: str, layer: str | None = None
) -> list[str]:
    values = _strings(reader, messages, attribute).get(attribute)
    if values is None:
        hint = (
            "the save that wrote it did not finish, or it is stored in a newer HDF5 layout than Keras writes"
        )
        raise UnreadableError(reader.region.path, f"no attribute `{attribute}`", tensor=layer, hint=hint)
    return [value.decode("utf-8", "backslashreplace") for value in values]


def _strings(reader: AttributeReader, messages: Sequence[bytes], *names: str) -> dict[str, list[bytes]]:
    try:
        return reader.strings(messages, names)
    except DamagedStructureError as error:
        raise UnreadableError(reader.region.path, f"damaged HDF5 file: {error}") from error
