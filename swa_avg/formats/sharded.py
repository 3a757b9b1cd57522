"""Sharded weights: a `.weights.json` that maps groups to `.weights.h5` shards beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import IO, Any

from swa_avg.errors import Finding, UnreadableError, escape
from swa_avg.files.location import Location
from swa_avg.files.names import is_plain_name
from swa_avg.files.region import Region
from swa_avg.files.sources import LocalSource, open_source
from swa_avg.files.untrusted_json import MAX_JSON, parse_json
from swa_avg.formats.base import (
    RECORD_NAME,
    Checkpoint,
    Format,
    Stage,
    StoredRecord,
    Stream,
    Tensor,
    check_written,
    record_in,
    with_record,
    write_chunks,
    write_shard,
)
from swa_avg.formats.hdf5.layout import Layout, read_layout
from swa_avg.formats.hdf5_file import check_store, layer_names

__all__ = ["FORMAT", "ShardedCheckpoint"]

_SUFFIXES = (".weights.json",)
_MAX_SHARDS = 10_000


@dataclass(frozen=True, kw_only=True)
class ShardedCheckpoint(Checkpoint):
    """A `.weights.json` and its shards; the record is a key of the JSON."""

    map: Mapping[str, Any]
    """What the `.weights.json` holds."""
    shard_names: tuple[str, ...]

    def write(self, stream: Stream, record: Callable[[], StoredRecord], stage: Stage) -> None:
        base = stage.output.name.removesuffix(".json").removesuffix(".weights")
        # Keras opens the shard of this name first, whatever the map says.
        names = {shard: f"{base}_{index:05}.weights.h5" for index, shard in enumerate(self.shard_names)}
        with ThreadPoolExecutor(1) as beside:  # each shard is read back while the next is averaged
            checks = []
            for index, shard in enumerate(self.shard_names):
                file = stage.create(names[shard], self.shards[index].size)
                size, checksum = write_chunks(file, stream(index))
                checks.append(beside.submit(self._check, file, index, size, checksum))
            for check in checks:
                check.result()
        weight_map = {
            path: [names[shard] for shard in where] if isinstance(where, list) else names[where]
            for path, where in self.map["weight_map"].items()
        }
        # Created last, published last: a reader finds the whole set or none of it.
        text = json.dumps(with_record({**self.map, "weight_map": weight_map}, record()), indent=4)
        write_shard(stage.create(stage.output.name), [text.encode()])

    def _check(self, file: IO[bytes], index: int, size: int, checksum: int) -> None:
        """Check that a shard reads back as it was written, and that libhdf5 can read it."""
        from swa_avg.formats.hdf5.libhdf5 import check_readable

        check_written(file, 0, size, checksum)
        written = Region(LocalSource(self.path.with_name(self.shard_names[index]), file))
        check_readable(written, {n: t for n, t in self.tensors.items() if t.shard == index})

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        from swa_avg.formats.hdf5.rebuild import strip

        kept = {
            path: where
            for path, where in self.map["weight_map"].items()
            if not path.startswith("/optimizer/")
        }
        return replace(self, map={**self.map, "weight_map": kept}, **strip(self, ("optimizer",), scratch))

    def differences(self, template: Checkpoint, *, rebuilt: bool) -> Iterator[Finding]:
        assert isinstance(template, ShardedCheckpoint)
        yield from super().differences(template, rebuilt=rebuilt)
        own, theirs = (
            {key: value for key, value in one.map.items() if key not in (RECORD_NAME, "weight_map")}
            for one in (self, template)
        )
        if own != theirs:
            yield Finding(self.path, "map", "differs from the newest input's, the names of shards apart")


def _open(whole: Region, like: Checkpoint | None) -> ShardedCheckpoint:
    path = whole.path
    with closing(whole):
        if whole.size > MAX_JSON:
            raise UnreadableError(path, f"the shard map is larger than {MAX_JSON >> 20} MiB")
        shard_map = parse_json(whole.read(0, whole.size), path, "the shard map")
    weight_map = shard_map.get("weight_map")
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
            "map": shard_map,
            "shard_names": names,
            "record": record_in(shard_map, path),
        }
        if (
            isinstance(like, ShardedCheckpoint)
            and like.map["weight_map"] == weight_map
            and like.shares_layout(shards)
        ):
            return replace(like, **own)
        layouts = [read_layout(shard, index) for index, shard in enumerate(shards)]
        tensors = _join(path, layouts, weight_map, names)
        layers: dict[str, str] = {}
        empty_groups: set[str] = set()
        for shard, layout in zip(shards, layouts, strict=True):
            layers.update(layer_names(shard, layout))
            empty_groups |= check_store(shard.path, layout)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return ShardedCheckpoint(
        kind="sharded Keras weights",
        suffixes=_SUFFIXES,
        tensors=tensors,
        layer_names=layers,
        empty_groups=frozenset(empty_groups).difference(name.rpartition("/")[0] for name in tensors),
        **own,
    )


def _shard_names(path: Location, weight_map: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the shards' names in order of first mention; none may leave the folder of the map."""
    names: dict[str, None] = {}
    for where in weight_map.values():
        for name in where if isinstance(where, list) else [where]:
            if not isinstance(name, str) or not is_plain_name(name):
                raise UnreadableError(path, f"names a shard outside its folder: {escape(name)[:80]}")
            names[name] = None
    if not names or len(names) > _MAX_SHARDS:
        raise UnreadableError(path, f"names {len(names)} shards; expected 1 to {_MAX_SHARDS}")
    return tuple(names)


def _join(
    path: Location, layouts: Sequence[Layout], weight_map: Mapping[str, Any], shards: Sequence[str]
) -> dict[str, Tensor]:
    """Return the tensors of all shards, which must be those that the map lists.

    A variable lies in one shard; a group may span several.
    """
    tensors: dict[str, Tensor] = {}
    found: dict[str, set[str]] = {}
    for shard, layout in zip(shards, layouts, strict=True):
        for name, tensor in layout.tensors.items():
            if name in tensors:
                raise UnreadableError(path, "lies in two shards", tensor=name)
            tensors[name] = tensor
            group = "/" + name.rpartition("/")[0]
            while group not in weight_map and "/vars/" in group:  # the variable's own name holds a slash
                group = group.rpartition("/")[0]
            found.setdefault(group, set()).add(shard)
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
    """Raise UnreadableError if variables are numbered, and a number is missing.

    Keras numbers a layer's and an optimizer's variables from 0, across the shards. HDF5 has no checksum of
    names, and the map lists groups only: a damaged name would show nowhere else.
    """
    groups: dict[str, set[str]] = {}
    for name in tensors:
        group, _, own = name.rpartition("/")
        groups.setdefault(group, set()).add(own)
    for group, names in groups.items():
        numbered = group.endswith("/vars") and all(map(str.isdecimal, names))
        if numbered and names != set(map(str, range(len(names)))):
            missing = min(set(map(str, range(len(names)))) - names, key=int)
            raise UnreadableError(path, "is missing, or its name is damaged", tensor=f"{group}/{missing}")


FORMAT = Format(description="a .weights.json", suffixes=_SUFFIXES, signature=b"{", open=_open)
