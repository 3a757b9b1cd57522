"""Sharded weights: a `.weights.json` that maps groups to `.weights.h5` shards beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import IO, Any

from swa_avg.errors import UnreadableError, escape
from swa_avg.files.location import Location
from swa_avg.files.region import Region
from swa_avg.files.sources import LocalSource, open_source
from swa_avg.files.untrusted_json import MAX_JSON, parse_json
from swa_avg.formats.bare import layer_names
from swa_avg.formats.base import (
    PROVENANCE,
    Checkpoint,
    Provenance,
    Stage,
    Stream,
    Tensor,
    check_written,
    write_chunks,
    write_shard,
)
from swa_avg.formats.hdf5.layout import Layout, read_layout

__all__ = ["ShardedCheckpoint", "open_sharded"]

_MAX_SHARDS = 10_000


@dataclass(frozen=True)
class ShardedCheckpoint(Checkpoint):
    """A `.weights.json` and its shards; the provenance is a key of the JSON."""

    map: Mapping[str, Any] | None = None
    shard_names: tuple[str, ...] = ()

    def write(
        self,
        stream: Stream,
        provenance: Callable[[], Provenance],
        stage: Stage,
    ) -> None:
        assert self.map is not None
        base = stage.output.name.removesuffix(".json").removesuffix(".weights")
        # Keras opens the shard of this very name first, whatever the map says.
        names = {shard: f"{base}_{index:05}.weights.h5" for index, shard in enumerate(self.shard_names)}
        with ThreadPoolExecutor(1) as beside:  # each shard is read back while the next is averaged
            checks = []
            for index, shard in enumerate(self.shard_names):
                file = stage.create(names[shard], self.shards[index].size)
                size, checksum = write_chunks(file, stream(index, file))
                checks.append(beside.submit(self._check, file, index, size, checksum))
            for check in checks:
                check.result()
        weight_map = {
            path: [names[shard] for shard in where] if isinstance(where, list) else names[where]
            for path, where in self.map["weight_map"].items()
        }
        # Created last, published last: a reader finds the whole set or none of it.
        record = provenance()
        own = {} if record is None else {PROVENANCE: record}
        text = json.dumps({**self.map, "weight_map": weight_map, **own}, indent=4)
        write_shard(stage.create(stage.output.name), [text.encode()])

    def _check(self, file: IO[bytes], index: int, size: int, checksum: int) -> None:
        """See that a shard reads back as it was written, and that libhdf5 reads it."""
        from swa_avg.formats.hdf5.libhdf5 import check_readable

        check_written(file, 0, size, checksum)
        written = Region(LocalSource(self.path.with_name(self.shard_names[index]), file))
        check_readable(written, {n: t for n, t in self.tensors.items() if t.shard == index})

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        from swa_avg.formats.hdf5.rebuild import strip

        assert self.map is not None
        kept = {
            path: where
            for path, where in self.map["weight_map"].items()
            if not path.startswith("/optimizer/")
        }
        return replace(self, map={**self.map, "weight_map": kept}, **strip(self, ("optimizer",), scratch))


def open_sharded(whole: Region, like: Checkpoint | None = None) -> ShardedCheckpoint:
    """Open a `.weights.json`, `whole`, which is closed, and all its shards; `like` as for `open_hdf5`.

    Raises:
        UnreadableError: the map or a shard is missing, damaged or unsafe, or they disagree.
    """
    path = whole.path
    with closing(whole):
        if whole.size > MAX_JSON:
            raise UnreadableError(path, f"the shard map is larger than {MAX_JSON >> 20} MiB")
        record = parse_json(whole.read(0, whole.size), path, "the shard map")
    weight_map = record.get("weight_map")
    if not isinstance(weight_map, dict):
        raise UnreadableError(path, "not the map of a sharded checkpoint: no `weight_map`")
    names = _shard_names(path, weight_map)
    shards: list[Region] = []
    try:
        for name in names:
            shards.append(Region(open_source(path.with_name(name), follow=False)))
        own: dict[str, Any] = {
            "path": path,
            "shards": tuple(shards),
            "map": record,
            "shard_names": names,
            "is_average": PROVENANCE in record,
        }
        if (
            isinstance(like, ShardedCheckpoint)
            and (like.map or {}).get("weight_map") == weight_map
            and like.shares_layout(shards)
        ):
            return replace(like, **own)
        layouts = [read_layout(shard, index) for index, shard in enumerate(shards)]
        tensors = _join(path, layouts, weight_map, names)
        layers = {}
        for shard, layout in zip(shards, layouts, strict=True):
            layers.update(layer_names(shard, layout))
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return ShardedCheckpoint(
        kind="sharded Keras weights", suffixes=(".weights.json",), tensors=tensors, layer_names=layers, **own
    )


def _shard_names(path: Location, weight_map: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the shards' names in order of first mention; none may leave the folder of the map."""
    names: dict[str, None] = {}
    for where in weight_map.values():
        for name in where if isinstance(where, list) else [where]:
            if (
                not isinstance(name, str)
                or name in ("", ".", "..")
                or not name.isprintable()
                or set(name) & set("/\\:")
            ):
                raise UnreadableError(path, f"names a shard outside its folder: {escape(name)[:80]}")
            names[name] = None
    if not names or len(names) > _MAX_SHARDS:
        raise UnreadableError(path, f"names {len(names)} shards; expected 1 to {_MAX_SHARDS}")
    return tuple(names)


def _join(
    path: Location, layouts: Sequence[Layout], weight_map: Mapping[str, Any], shards: Sequence[str]
) -> dict[str, Tensor]:
    """Return the tensors of all shards, held against the map.

    A variable lies in one shard; a group may span many.
    """
    tensors: dict[str, Tensor] = {}
    found: dict[str, set[str]] = {}
    for shard, layout in zip(shards, layouts, strict=True):
        for name, tensor in layout.tensors.items():
            if name in tensors:
                raise UnreadableError(path, "lies in two shards", tensor=name)
            tensors[name] = tensor
            found.setdefault("/" + name.rpartition("/")[0], set()).add(shard)
    _check_numbers(path, tensors)
    declared = {key: set(where) if isinstance(where, list) else {where} for key, where in weight_map.items()}
    for group in sorted(declared.keys() | found.keys()):
        if declared.get(group) != found.get(group):
            listed, stored = sorted(declared.get(group, ())), sorted(found.get(group, ()))
            raise UnreadableError(
                path, f"the map says {listed}, the shards hold it in {stored}", tensor=group
            )
    return tensors


def _check_numbers(path: Location, tensors: Mapping[str, Tensor]) -> None:
    """Raise UnreadableError if variables are numbered, and a number is left out.

    Keras counts a layer's and an optimizer's variables from 0, across the shards. HDF5 keeps no checksum of
    names, and the map lists none: damage to one would show nowhere else.
    """
    groups: dict[str, set[str]] = {}
    for name in tensors:
        group, _, own = name.rpartition("/")
        groups.setdefault(group, set()).add(own)
    for group, names in groups.items():
        if all(map(str.isdecimal, names)) and names != set(map(str, range(len(names)))):
            missing = min(set(map(str, range(len(names)))) - names, key=int)
            raise UnreadableError(path, "is missing, or its name is damaged", tensor=f"{group}/{missing}")
