"""`.keras` archives: a zip whose member `model.weights.h5` is an HDF5 file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

from swa_avg.errors import Finding, SwaAvgError, UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.region import Region, RegionFile
from swa_avg.files.untrusted_json import MAX_JSON, parse_json
from swa_avg.files.zip_members import ENCRYPTED, ZIP_ERRORS, data_offset
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
    different_parts,
    record_in,
    with_record,
)
from swa_avg.formats.hdf5.layout import read_layout
from swa_avg.formats.hdf5_file import Hdf5Checkpoint, check_store, is_keras_store, layer_names
from swa_avg.formats.stored_zip import StoredZip

__all__ = ["FORMAT", "ArchiveCheckpoint"]

_SUFFIXES = (".keras",)
_WEIGHTS, _CONFIG, _METADATA = "model.weights.h5", "config.json", "metadata.json"
_DATE = "date_saved"
_MAX_MEMBERS = 20_000
_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class ArchiveCheckpoint(Checkpoint):
    """A `.keras` archive; the record is a key of its metadata.json."""

    archive: zipfile.ZipFile
    config_bytes: bytes
    """Its config.json."""
    metadata: Mapping[str, Any]

    def write(self, stream: Stream, record: Callable[[], StoredRecord], stage: Stage) -> None:
        file = stage.create(stage.output.name, self.shards[0].size)
        output = StoredZip(file)
        # Names, times and attributes are the template's, so that equal inputs give equal bytes.
        for member in self.archive.infolist():
            if member.filename == _WEIGHTS:
                output.add(member, self.shards[0].size, stream(0))
            elif member.filename == _METADATA:
                metadata = json.dumps(with_record(self.metadata, record())).encode()
                output.add(member, len(metadata), [metadata])
            elif member.filename == _CONFIG:
                output.add(member, len(self.config_bytes), [self.config_bytes])
            else:
                output.add(member, member.file_size, _contents(self.path, self.archive, member))
        output.finish()

    def write_again(self, value: Callable[[Tensor], Buffer], settings: Settings | None, stage: Stage) -> None:
        assert settings is not None
        metadata = json.loads(settings.metadata)
        anew = replace(self, config_bytes=settings.config, metadata=metadata)
        anew.write(self.refilled(value), lambda: None, stage)

    def holds(self, settings: Settings | None) -> bool:
        if settings is None or len(self.archive.namelist()) > 3:
            return False
        own, other = ({**one, _DATE: None} for one in (self.metadata, json.loads(settings.metadata)))
        return self.config_bytes == settings.config and own == other

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        from swa_avg.formats.hdf5.rebuild import strip

        return replace(self, **strip(self, ("optimizer",), scratch))

    def as_weights(self) -> Checkpoint | None:
        return Hdf5Checkpoint(
            self.path, shards=self.shards, tensors=self.tensors, layer_names=self.layer_names
        )

    def differences(self, template: Checkpoint, *, rebuilt: bool) -> Iterator[Finding]:
        assert isinstance(template, ArchiveCheckpoint)
        found, stored = self.shards[0].checksum(), self.shards[0].crc32
        if found != stored:
            problem = f"damaged: its CRC-32 is {found:08x}, the archive says {stored:08x}"
            yield Finding(self.path, _WEIGHTS, problem)
        yield from super().differences(template, rebuilt=rebuilt)
        yield from different_parts(self.path, self._others(), template._others())

    def _others(self) -> dict[str, Any]:
        """Return what stands for each member but the weights; of an asset, its CRC-32.

        Raises:
            UnreadableError: one is damaged.
        """
        metadata = {key: value for key, value in self.metadata.items() if key != RECORD_NAME}
        found: dict[str, Any] = {_CONFIG: self.config_bytes, _METADATA: metadata}
        for member in self.archive.infolist():
            if member.filename not in (_WEIGHTS, _CONFIG, _METADATA):
                for _ in _contents(self.path, self.archive, member):
                    pass  # zipfile compares the CRC-32 once all has been read
                found[member.filename] = member.CRC
        return found

    def close(self) -> None:
        self.archive.close()
        super().close()


def _open(whole: Region, like: Checkpoint | None) -> ArchiveCheckpoint:
    path = whole.path
    try:
        archive = zipfile.ZipFile(RegionFile(whole))
        region = _weights(whole, archive)
        metadata, config_bytes = (_small(whole, archive, name) for name in (_METADATA, _CONFIG))
    except ZIP_ERRORS as error:
        if isinstance(error, SwaAvgError):
            raise
        if isinstance(error.__context__, SwaAvgError):  # zipfile reported it as damage
            raise error.__context__ from None
        raise UnreadableError(path, f"damaged .keras archive ({error})") from error
    return _checkpoint(path, region, archive, config_bytes, parse_json(metadata, path, _METADATA), like)


def _small(whole: Region, archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > MAX_JSON:
        raise UnreadableError(whole.path, f"is larger than {MAX_JSON >> 20} MiB", tensor=name)
    return archive.read(name)


def _checkpoint(
    path: Location,
    region: Region,
    archive: zipfile.ZipFile,
    config_bytes: bytes,
    metadata: Mapping[str, Any],
    like: Checkpoint | None,
) -> ArchiveCheckpoint:
    if isinstance(like, ArchiveCheckpoint) and like.config_bytes == config_bytes:
        config, optimizer = like.config, like.optimizer_config
    else:
        settings = parse_json(config_bytes, path, _CONFIG)
        config = {k: v for k, v in settings.items() if k != "compile_config"}
        compiled = settings.get("compile_config")
        optimizer = compiled.get("optimizer") if isinstance(compiled, dict) else None
    version = metadata.get("keras_version")
    own: dict[str, Any] = {
        "path": path,
        "shards": (region,),
        "archive": archive,
        "config_bytes": config_bytes,
        "config": config,
        "optimizer_config": optimizer,
        "metadata": metadata,
        "record": record_in(metadata, path),
        "writer": f"Keras {version}" if isinstance(version, str) else None,
    }
    if isinstance(like, ArchiveCheckpoint) and like.shares_layout((region,)):
        return replace(like, **own)
    layout = read_layout(region)
    if not is_keras_store(layout.groups):
        raise UnreadableError(path, f"{_WEIGHTS} does not hold what Keras writes: no `vars` groups")
    return ArchiveCheckpoint(
        kind=".keras archive",
        suffixes=_SUFFIXES,
        tensors=layout.tensors,
        layer_names=layer_names(region, layout),
        empty_groups=check_store(path, layout),
        **own,
    )


def _contents(path: Location, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(member) as source:
            yield from iter(lambda: source.read(_CHUNK), b"")
    except zipfile.BadZipFile as error:
        raise UnreadableError(path, f"is damaged ({error})", tensor=member.filename) from error


def _weights(whole: Region, archive: zipfile.ZipFile) -> Region:
    """Return the weights of an archive, after checking that no member is one that Keras never writes.

    The central directory and the local headers can be made to disagree, and declared sizes can lie. Only what
    both say, and what lies inside the file without overlap, is read.
    """
    starts: dict[str, int] = {}
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise UnreadableError(whole.path, f"holds more than {_MAX_MEMBERS} members")
    position = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.filename
        if name in starts:
            raise UnreadableError(whole.path, "appears twice in the archive", tensor=name)
        if info.flag_bits & ENCRYPTED:
            raise UnreadableError(whole.path, "is encrypted", tensor=name)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            hint = "save it again with Keras, or zip it with: zip -0"
            raise UnreadableError(whole.path, "is compressed; Keras stores it plain", tensor=name, hint=hint)
        if name.startswith("/") or "\\" in name or "\0" in info.orig_filename or ".." in name.split("/"):
            raise UnreadableError(whole.path, "has a name that leaves the archive", tensor=name)
        if info.create_system == 3 and (info.external_attr >> 16) & 0o170000 == 0o120000:
            raise UnreadableError(whole.path, "is a symbolic link", tensor=name)
        start = data_offset(whole, info)
        if info.header_offset < position or start + info.file_size > archive.start_dir:
            raise UnreadableError(whole.path, "overlaps another part of the archive", tensor=name)
        position = start + info.file_size
        starts[name] = start
    missing = [name for name in (_WEIGHTS, _CONFIG, _METADATA) if name not in starts]
    if missing:
        raise UnreadableError(whole.path, f"not a .keras archive with HDF5 weights: no {', '.join(missing)}")
    info = archive.getinfo(_WEIGHTS)
    return Region(whole.source, starts[_WEIGHTS], info.file_size, info.CRC)


FORMAT = Format(description="a .keras archive", suffixes=_SUFFIXES, signature=b"PK", open=_open)
