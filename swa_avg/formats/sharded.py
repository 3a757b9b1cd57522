"""Sharded weights: a `.weights.json` that maps groups to `.weights.h5` shards beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from swa_avg.errors import UnreadableError, escape
from swa_avg.formats.base import (
    PROVENANCE,
    Checkpoint,
    Chunk,
    Provenance,
    Stage,
    Tensor,
    check_written,
    write_chunks,
    write_image,
)
from swa_avg.formats.hdf5 import check_store, layer_names
from swa_avg.formats.image import Image, open_file
from swa_avg.formats.layout import Layout, read_layout
from swa_avg.strict_json import MAX_JSON, parse_json

__all__ = ["ShardedCheckpoint", "open_sharded"]

_MAX_SHARDS = 10_000


@dataclass(frozen=True)
class ShardedCheckpoint(Checkpoint):
    """A `.weights.json` and its shards; the provenance is a key of the JSON."""

    map: Mapping[str, Any] | None = None
    shards: tuple[str, ...] = ()

    def write(
        self,
        image: Callable[[int, IO[bytes]], Iterator[Chunk]],
        provenance: Callable[[], Provenance],
        stage: Stage,
    ) -> None:
        assert self.map is not None
        base = stage.output.name.removesuffix(".json").removesuffix(".weights")
        # Keras opens the shard of this very name first, whatever the map says.
        names = {shard: f"{base}_{index:05}.weights.h5" for index, shard in enumerate(self.shards)}
        with ThreadPoolExecutor(1) as beside:  # each shard is read back while the next is averaged
            checks = []
            for index, shard in enumerate(self.shards):
                file = stage.create(names[shard], self.images[index].size)
                size, checksum = write_chunks(file, image(index, file))
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
        write_image(stage.create(stage.output.name), [text.encode()])

    def _check(self, file: IO[bytes], index: int, size: int, checksum: int) -> None:
        """See that a shard reads back as it was written, and that libhdf5 reads it."""
        from swa_avg.formats.libhdf5 import check_readable

        check_written(file, 0, size, checksum)
        written = Image(self.path.with_name(self.shards[index]), file, 0, size)
        check_readable(written, {n: t for n, t in self.tensors.items() if t.image == index})

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        from swa_avg.formats.rebuild import strip

        assert self.map is not None
        kept = {
            path: where
            for path, where in self.map["weight_map"].items()
            if not path.startswith("/optimizer/")
        }
        return replace(self, map={**self.map, "weight_map": kept}, **strip(self, ("optimizer",), scratch))


def open_sharded(path: Path, file: IO[bytes], like: Checkpoint | None = None) -> ShardedCheckpoint:
    """Open a `.weights.json` and all its shards; `file`, which is closed, and `like` as for `open_hdf5`.

    Raises:
        UnreadableError: the map or a shard is missing, damaged or unsafe, or they disagree.
    """
    with file:
        size = file.seek(0, 2)
        if size > MAX_JSON:
            raise UnreadableError(path, f"the shard map is larger than {MAX_JSON >> 20} MiB")
        record = parse_json(Image(path, file, 0, size).read(0, size), path, "the shard map")
    weight_map = record.get("weight_map")
    if not isinstance(weight_map, dict):
        raise UnreadableError(path, "not the map of a sharded checkpoint: no `weight_map`")
    shards = _shard_names(path, weight_map)
    images: list[Image] = []
    try:
        for shard in shards:
            part = open_file(path.with_name(shard), follow=False)
            images.append(Image(path.with_name(shard), part))
        own: dict[str, Any] = {
            "path": path,
            "images": tuple(images),
            "map": record,
            "shards": shards,
            "is_average": PROVENANCE in record,
        }
        if (
            isinstance(like, ShardedCheckpoint)
            and (like.map or {}).get("weight_map") == weight_map
            and like.shares_layout(images)
        ):
            return replace(like, **own)
        layouts = [read_layout(image, index) for index, image in enumerate(images)]
        tensors = _join(path, layouts, weight_map, shards)
        names: dict[str, str] = {}
        empty_groups: set[str] = set()
        for image, layout in zip(images, layouts, strict=True):
            names.update(layer_names(image, layout))
            empty_groups |= check_store(image.path, layout)
    except BaseException:
        for image in images:
            image.close()
        raise
    return ShardedCheckpoint(
        kind="sharded Keras weights",
        suffixes=(".weights.json",),
        tensors=tensors,
        layer_names=names,
        empty_groups=frozenset(empty_groups).difference(name.rpartition("/")[0] for name in tensors),
        **own,
    )


def _shard_names(path: Path, weight_map: Mapping[str, Any]) -> tuple[str, ...]:
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
    path: Path, layouts: Sequence[Layout], weight_map: Mapping[str, Any], shards: Sequence[str]
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
            group = "/" + name.rpartition("/")[0]
            while group not in weight_map and "/vars/" in group:  # a layer's own name for it holds a slash
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


def _check_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
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
