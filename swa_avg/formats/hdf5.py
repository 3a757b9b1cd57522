"""Bare HDF5 checkpoints: `.weights.h5`, `.h5`, `.hdf5`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from swa_avg.errors import UnreadableError
from swa_avg.formats.attributes import AttributeReader, DamagedStructureError
from swa_avg.formats.base import PROVENANCE, Checkpoint, Chunk, Provenance, Stage, write_image
from swa_avg.formats.image import Image
from swa_avg.formats.layout import SIGNATURE, Layout, read_layout
from swa_avg.strict_json import parse_json

__all__ = [
    "LEGACY_MODEL",
    "LEGACY_WEIGHTS",
    "SIGNATURE",
    "WEIGHTS",
    "Hdf5Checkpoint",
    "check_store",
    "is_keras_store",
    "layer_names",
    "open_hdf5",
]

WEIGHTS = "Keras weights"
LEGACY_MODEL = "legacy HDF5 model"
LEGACY_WEIGHTS = "legacy HDF5 weights"
_TOP_LEVEL, _OPTIMIZER = "top_level_model_weights", "optimizer_weights"


@dataclass(frozen=True)
class Hdf5Checkpoint(Checkpoint):
    """A checkpoint that is one HDF5 file; the provenance is a root attribute."""

    record: bytes = b""
    """The provenance as it is stored, JSON; empty where there is none."""
    training_config: bytes = b""
    """How a legacy model was compiled, JSON; likewise."""

    def write(
        self,
        image: Callable[[int, IO[bytes]], Iterator[Chunk]],
        provenance: Callable[[], Provenance],
        stage: Stage,
    ) -> None:
        from swa_avg.formats.libhdf5 import check_readable
        from swa_avg.formats.rebuild import write_provenance

        file = stage.create(stage.output.name, self.images[0].size)
        write_image(file, image(0, file))
        record = provenance()
        if record is not None:
            write_provenance(file, record, self.path, self.tensors.values())
        # There is no checksum that would tell of damage to what was copied.
        check_readable(Image(self.path, file), self.tensors)

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        from swa_avg.formats.rebuild import strip

        # In a legacy file of weights alone every top-level group is a layer.
        groups = () if self.kind == LEGACY_WEIGHTS else ("optimizer", "optimizer_weights")
        return replace(self, **strip(self, groups, scratch))


def open_hdf5(path: Path, file: IO[bytes], like: Checkpoint | None = None) -> Hdf5Checkpoint:
    """Open a Keras checkpoint that is a bare HDF5 file.

    `file` is `path`, open for reading; whoever opened it closes it where this fails. `like` is a
    checkpoint of the same run; where every byte outside the tensors is the same, its layout is taken over
    without parsing the file.

    Raises:
        UnreadableError: the file is damaged, is not a Keras checkpoint, or stores a tensor in another way
            than as one contiguous run of bytes.
    """
    image = Image(path, file)
    if isinstance(like, Hdf5Checkpoint) and like.shares_layout((image,)):
        return replace(like, path=path, images=(image,))
    return _keras_checkpoint(path, image, read_layout(image))


def _keras_checkpoint(path: Path, image: Image, layout: Layout) -> Hdf5Checkpoint:
    reader = AttributeReader(image)
    root = _strings(
        reader,
        layout.groups[""],
        *("layer_names", "model_config", "training_config", "keras_version", "backend", PROVENANCE),
    )
    kind, suffixes = WEIGHTS, [".weights.h5"]
    tensors, names, config = layout.tensors, dict[str, str](), None
    empty_groups: frozenset[str] = frozenset()
    if "model_weights" in layout.groups:
        kind, suffixes = LEGACY_MODEL, [".h5", ".hdf5"]
        _check_legacy_groups(reader, layout, "model_weights")
        if "model_config" in root:
            config = parse_json(b"".join(root["model_config"]), path, "model_config")
        if "training_config" in root:
            parse_json(b"".join(root["training_config"]), path, "training_config")
    elif "layer_names" in root:
        kind, suffixes = LEGACY_WEIGHTS, [".h5", ".hdf5"]
        _check_legacy_groups(reader, layout, "")
        # The top level holds layers, whatever they are called.
        tensors = {name: replace(tensor, role="weight") for name, tensor in tensors.items()}
    elif is_keras_store(layout.groups):
        empty_groups = check_store(path, layout)
        names = layer_names(image, layout)
    else:
        raise UnreadableError(
            path, "an HDF5 file, but not one that Keras wrote: no `vars` groups, no `layer_names`"
        )
    record = b"".join(root.get(PROVENANCE, []))
    return Hdf5Checkpoint(
        path,
        kind,
        tuple(suffixes),
        (image,),
        tensors,
        config,
        names,
        is_average=PROVENANCE in root,
        writer=_writer(root.get("keras_version"), root.get("backend")),
        empty_groups=empty_groups,
        record=record,
        training_config=b"".join(root.get("training_config", [])),
    )


def _writer(version: list[bytes] | None, backend: list[bytes] | None) -> str | None:
    if not version:
        return None
    on = f" with {backend[0].decode('utf-8', 'backslashreplace')}" if backend else ""
    return f"Keras {version[0].decode('utf-8', 'backslashreplace')}{on}"


def is_keras_store(groups: Iterable[str]) -> bool:
    """Tell whether these groups are the layout of Keras's own saving library (`.../vars/0`)."""
    return any(path == "vars" or path.endswith("/vars") for path in groups)


def check_store(path: Path, layout: Layout) -> frozenset[str]:
    """Return those `vars` groups of a file of Keras's saving library that hold no tensor.

    Whatever a layer or an optimizer calls its variables, the library puts them into such a group. HDF5 keeps
    no checksum of names: damage to one shows here, or where checkpoints are compared.

    Raises:
        UnreadableError: there is something outside these groups.
    """
    tensors = [name for name in layout.tensors if "/vars/" in f"/{name}"]
    groups = [group for group in layout.groups if "/vars/" in f"/{group}/"]
    _check_explained(path, layout, tensors, groups, "in a group `vars`, where Keras puts every variable")
    return frozenset(groups).difference(name.rpartition("/")[0] for name in tensors)


def layer_names(image: Image, layout: Layout) -> dict[str, str]:
    """Return path of a layer's group -> the layer's name, where the writer stored names (Keras 3.10 on).

    The empty path is the model itself.
    """
    names = {}
    reader = AttributeReader(image)
    for path, messages in layout.groups.items():
        if path == "vars" or path.endswith("/vars"):
            value = _strings(reader, messages, "name").get("name")
            if value:
                names[path.removesuffix("vars").removesuffix("/")] = value[0].decode(
                    "utf-8", "backslashreplace"
                )
    return names


def _check_legacy_groups(reader: AttributeReader, layout: Layout, parent: str) -> None:
    """Raise UnreadableError unless a legacy file stores the layers and weights that it lists, and no others.

    Some versions of Keras leave a file that opens cleanly when a save crashed half way.
    """
    path = reader.image.path
    prefix = f"{parent}/" if parent else ""
    hint = "the save that wrote it did not finish: leave this file out"
    layers = _names(reader, layout.groups[parent], "layer_names")
    for layer in layers:
        if prefix + layer not in layout.groups:
            raise UnreadableError(path, "layer listed, but not stored", tensor=layer, hint=hint)
    listed: set[str] = set()
    top = [_TOP_LEVEL] if prefix + _TOP_LEVEL in layout.groups else []
    for layer in sorted({*layers, *top}):
        weights = _names(reader, layout.groups[prefix + layer], "weight_names", layer)
        if len(set(weights)) < len(weights):
            raise UnreadableError(path, "the same weight listed twice", tensor=layer, hint=hint)
        listed.update(f"{prefix}{layer}/{weight}" for weight in weights)
    groups = {prefix + layer for layer in (*layers, *top)}
    if parent and _OPTIMIZER in layout.groups:
        found = _strings(reader, layout.groups[_OPTIMIZER], "weight_names").get("weight_names", [])
        listed.update(f"{_OPTIMIZER}/{weight.decode('utf-8', 'backslashreplace')}" for weight in found)
        groups.add(_OPTIMIZER)
    for name in sorted(listed - layout.tensors.keys()):
        shown = name.removeprefix("model_weights/")
        raise UnreadableError(path, "weight listed, but not stored", tensor=shown, hint=hint)
    _check_explained(path, layout, listed, groups, "in a list of layers or weights")


def _check_explained(
    path: Path, layout: Layout, tensors: Collection[str], groups: Collection[str], expected: str
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
        raise UnreadableError(reader.image.path, f"no attribute `{attribute}`", tensor=layer, hint=hint)
    return [value.decode("utf-8", "backslashreplace") for value in values]


def _strings(reader: AttributeReader, messages: Sequence[bytes], *names: str) -> dict[str, list[bytes]]:
    try:
        return reader.strings(messages, names)
    except DamagedStructureError as error:
        raise UnreadableError(reader.image.path, f"damaged HDF5 file: {error}") from error
