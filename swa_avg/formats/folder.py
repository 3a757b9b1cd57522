"""Models that are folders: `model.save(path, zipped=False)`, and presets of KerasHub.

A folder holds what a `.keras` archive holds, each member a file: the configuration, the weights, and assets.
The weights are of a format that stands alone, `model.weights.h5` or a sharded `model.weights.json`; a preset
of a task keeps those of its head apart, in `task.weights.h5`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import IO, Any

from swa_avg.errors import Finding, UnreadableError
from swa_avg.files.location import Location, files_under
from swa_avg.files.region import Region
from swa_avg.files.sources import open_source
from swa_avg.files.untrusted_json import MAX_JSON, parse_json
from swa_avg.formats.base import (
    RECORD_NAME,
    Checkpoint,
    Stage,
    StoredRecord,
    Stream,
    Tensor,
    different_parts,
    record_in,
    with_record,
    write_shard,
)
from swa_avg.formats.hdf5_file import Hdf5Checkpoint
from swa_avg.formats.sharded import ShardedCheckpoint

__all__ = ["FolderCheckpoint", "is_model_alone", "is_model_folder", "open_folder"]

_CONFIG, _METADATA = "config.json", "metadata.json"
_WEIGHTS = ("model.weights.h5", "model.weights.json")
_HEAD = "task.weights.h5"
_JSON = re.compile(r"[a-z_]+\.json")
_SHARD = re.compile(r"model_[0-9]{5,}\.weights\.h5")
_MAX_FILES = 1_000  # all are open until they are published

OpenFile = Callable[[Location, Checkpoint | None], Checkpoint]


@dataclass(frozen=True, kw_only=True)
class FolderCheckpoint(Checkpoint):
    """A model in a folder; the record is a key of its metadata.json."""

    parts: tuple[Checkpoint, ...]
    """The files of weights; tensors of all but the first are named behind the name of their file."""
    settings: Mapping[str, bytes]
    """The JSON files, by name."""
    assets: Mapping[str, Location]
    """The other files, by their paths inside the folder."""

    @property
    def files(self) -> tuple[Location, ...]:
        weights = (file for part in self.parts for file in part.files)
        return (*weights, *(self.path / name for name in self.settings), *self.assets.values())

    @property
    def weights_path(self) -> Location | None:
        return None if len(self.parts) > 1 else self.parts[0].path

    def write(self, stream: Stream, record: Callable[[], StoredRecord], stage: Stage) -> None:
        folder = stage.output.name
        first = 0
        for part in self.parts:
            inside = _Inside(stage, f"{folder}/{part.path.name}")
            part.write(lambda shard, first=first: stream(first + shard), lambda: None, inside)  # type: ignore[misc]
            first += len(part.shards)
        for name, asset in self.assets.items():
            with closing(open_source(asset, follow=False)) as source:
                region = Region(source)
                write_shard(stage.create(f"{folder}/{name}", source.size), region.chunks())
                region.check_unchanged()
        metadata = json.dumps(with_record(self._stored_metadata(), record())).encode()
        # The configuration is last: without it, the folder holds no model.
        for name in sorted(self.settings, key=lambda name: name == _CONFIG):
            content = metadata if name == _METADATA else self.settings[name]
            write_shard(stage.create(f"{folder}/{name}"), [content])

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        parts = [part.without_optimizer(scratch) for part in self.parts]
        tensors = {
            name: replace(tensor, dtype=self.tensors[name].dtype) for name, tensor in _tensors(parts).items()
        }
        shards = tuple(shard for part in parts for shard in part.shards)
        return replace(self, parts=tuple(parts), tensors=tensors, shards=shards)

    def as_weights(self) -> Checkpoint | None:
        if len(self.parts) > 1:
            return None
        weights = self.parts[0].as_weights()
        return weights and replace(weights, path=self.path, tensors=self.tensors)

    def differences(self, template: Checkpoint, *, rebuilt: bool) -> Iterator[Finding]:
        assert isinstance(template, FolderCheckpoint)
        yield from super().differences(template, rebuilt=rebuilt)
        yield from different_parts(self.path, self._others(), template._others())

    def _others(self) -> dict[str, Any]:
        """Return what stands for each file but the weights; of an asset, its CRC-32."""
        found: dict[str, Any] = {**self.settings, _METADATA: {**self._stored_metadata(), RECORD_NAME: None}}
        for name, asset in self.assets.items():
            with closing(open_source(asset, follow=False)) as source:
                found[name] = Region(source).checksum()
        return found

    def _stored_metadata(self) -> dict[str, Any]:
        return parse_json(self.settings[_METADATA], self.path, _METADATA)

    def close(self) -> None:
        for part in self.parts:
            part.close()
        super().close()


class _Inside:
    """A stage within the folder that another one makes."""

    def __init__(self, stage: Stage, output: str) -> None:
        self._stage = stage
        self.output = stage.output.parent / output

    def create(self, name: str, size: int = 0) -> IO[bytes]:
        return self._stage.create(f"{self.output.parent.name}/{name}", size)


def is_model_folder(path: Location) -> bool:
    """Tell whether a folder holds a model."""
    if not all((path / name).is_file() for name in (_CONFIG, _METADATA)):
        return False
    return any((path / name).is_file() for name in _WEIGHTS)


def is_model_alone(path: Location) -> bool:
    """Tell whether a folder holds a model and nothing else."""
    return is_model_folder(path) and all(map(_is_of_model, files_under(path)))


def _is_of_model(name: str) -> bool:
    known = name in (*_WEIGHTS, _HEAD) or _JSON.fullmatch(name) or _SHARD.fullmatch(name)
    return bool(known) or _is_asset(name)


def _is_asset(name: str) -> bool:
    return name.partition("/")[0] == "assets"


def open_folder(path: Location, like: Checkpoint | None, open_file: OpenFile) -> FolderCheckpoint:
    """Open the model in a folder; `open_file` opens a file of weights, and `like` is as for a `Format`.

    Raises:
        UnreadableError: a file is missing, damaged, or a symbolic link.
    """
    known = like if isinstance(like, FolderCheckpoint) else None
    members = {name: file for name, file in files_under(path).items() if _is_of_model(name)}
    if len(members) > _MAX_FILES:
        raise UnreadableError(path, f"a folder of more than {_MAX_FILES:,} files")
    weights = [name for name in (*_WEIGHTS, _HEAD) if name in members]
    if _WEIGHTS[0] in weights and _WEIGHTS[1] in weights:
        hint = "remove the one that is not of this model"
        raise UnreadableError(path, f"holds both {_WEIGHTS[0]} and {_WEIGHTS[1]}", hint=hint)
    settings = {
        name: _read(file) for name, file in members.items() if _JSON.fullmatch(name) and name not in weights
    }
    assets = {name: file for name, file in members.items() if _is_asset(name)}
    for file in members.values():  # none is a link; and a copy of the newest on this machine is complete
        open_source(file, follow=False).close()
    metadata = parse_json(settings[_METADATA], path, _METADATA)
    version = metadata.get("keras_version")
    own: dict[str, Any] = {
        "path": path,
        "settings": settings,
        "assets": assets,
        "config": _config(path, settings, known),
        "record": record_in(metadata, path),
        "writer": f"Keras {version}" if isinstance(version, str) else None,
    }
    parts: list[Checkpoint] = []
    try:
        for number, name in enumerate(weights):
            twin = known.parts[number] if known is not None and number < len(known.parts) else None
            parts.append(open_file(members[name], twin))
            if not isinstance(parts[-1], Hdf5Checkpoint | ShardedCheckpoint) or parts[-1].is_legacy:
                raise UnreadableError(parts[-1].path, "does not hold what Keras writes into a folder")
    except BaseException:
        for part in parts:
            part.close()
        raise
    own |= {"parts": tuple(parts), "shards": tuple(shard for part in parts for shard in part.shards)}
    if known is not None and [id(part.tensors) for part in parts] == [id(p.tensors) for p in known.parts]:
        return replace(known, **own)
    empty = [f"{_prefix(parts, part)}{group}" for part in parts for group in part.empty_groups]
    return FolderCheckpoint(
        kind="Keras model folder",
        suffixes=("",),
        tensors=_tensors(parts),
        layer_names={
            _prefix(parts, part) + group: name for part in parts for group, name in part.layer_names.items()
        },
        empty_groups=frozenset(empty),
        **own,
    )


def _read(file: Location) -> bytes:
    with closing(open_source(file, follow=False)) as source:
        if source.size > MAX_JSON:
            raise UnreadableError(file, f"is larger than {MAX_JSON >> 20} MiB")
        return Region(source).read(0, source.size)


def _config(
    path: Location, settings: Mapping[str, bytes], known: FolderCheckpoint | None
) -> Mapping[str, Any] | None:
    """Return the model's configuration, and beside it those of a preset's other parts, by their files."""
    names = settings.keys() - {_METADATA}
    if known is not None and all(known.settings.get(name) == settings[name] for name in names):
        return known.config
    parsed = {name: parse_json(settings[name], path, name) for name in sorted(names)}
    config = {key: value for key, value in parsed.pop(_CONFIG).items() if key != "compile_config"}
    return {**config, **parsed}


def _prefix(parts: Sequence[Checkpoint], part: Checkpoint) -> str:
    return "" if part is parts[0] else f"{part.path.name}/"


def _tensors(parts: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """Return the tensors of all parts, by names and shards of the whole."""
    tensors: dict[str, Tensor] = {}
    first = 0
    for part in parts:
        prefix = _prefix(parts, part)
        for name, tensor in part.tensors.items():
            tensors[prefix + name] = replace(tensor, name=prefix + name, shard=first + tensor.shard)
        first += len(part.shards)
    return tensors
