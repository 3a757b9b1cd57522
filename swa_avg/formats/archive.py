"""`.keras` archives: a zip whose member `model.weights.h5` is an HDF5 image."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from swa_avg.errors import SwaAvgError, UnreadableError
from swa_avg.formats.base import PROVENANCE, Checkpoint, Chunk, Provenance, Stage
from swa_avg.formats.hdf5 import WEIGHTS, Hdf5Checkpoint, check_store, is_keras_store, layer_names
from swa_avg.formats.image import Image, ImageFile
from swa_avg.formats.layout import read_layout
from swa_avg.formats.stored_zip import StoredZip
from swa_avg.strict_json import MAX_JSON, parse_json

__all__ = ["SIGNATURE", "ArchiveCheckpoint", "data_offset", "open_archive"]

SIGNATURE = b"PK"
_WEIGHTS, _CONFIG, _METADATA = "model.weights.h5", "config.json", "metadata.json"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_MEMBERS = 20_000
_ENCRYPTED = 0x1
_CHUNK = 2**20


@dataclass(frozen=True)
class ArchiveCheckpoint(Checkpoint):
    """A `.keras` archive; the provenance is a key of its metadata.json."""

    archive: zipfile.ZipFile | None = None
    config_bytes: bytes = b""
    metadata: Mapping[str, Any] | None = None

    def write(
        self,
        image: Callable[[int, IO[bytes]], Iterator[Chunk]],
        provenance: Callable[[], Provenance],
        stage: Stage,
    ) -> None:
        assert self.archive is not None
        file = stage.create(stage.output.name, self.images[0].size)
        output = StoredZip(file)
        # Names, times and attributes are the template's, so that equal inputs give equal bytes.
        for member in self.archive.infolist():
            if member.filename == _WEIGHTS:
                output.add(member, self.images[0].size, image(0, file))
            elif member.filename == _METADATA:
                record = provenance()
                own = {} if record is None else {PROVENANCE: record}
                metadata = json.dumps({**(self.metadata or {}), **own}).encode()
                output.add(member, len(metadata), [metadata])
            else:
                output.add(member, member.file_size, _contents(self.path, self.archive, member))
        output.finish()

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        from swa_avg.formats.rebuild import strip

        return replace(self, **strip(self, ("optimizer",), scratch))

    def as_weights(self) -> Hdf5Checkpoint:
        """Return the model's weights alone, as the `.weights.h5` that the archive holds."""
        return Hdf5Checkpoint(
            self.path,
            WEIGHTS,
            (".weights.h5",),
            self.images,
            self.tensors,
            self.config,
            self.layer_names,
        )

    def others(self) -> dict[str, int]:
        """Return the members besides weights and JSON, the assets, each with its CRC-32.

        Raises:
            UnreadableError: one is damaged.
        """
        assert self.archive is not None
        found = {}
        for member in self.archive.infolist():
            if member.filename not in (_WEIGHTS, _CONFIG, _METADATA):
                for _ in _contents(self.path, self.archive, member):
                    pass  # the end of reading is where zipfile holds the CRC-32 against the data
                found[member.filename] = member.CRC
        return found

    def close(self) -> None:
        if self.archive is not None:
            self.archive.close()
        super().close()


def open_archive(path: Path, file: IO[bytes], like: Checkpoint | None = None) -> ArchiveCheckpoint:
    """Open a `.keras` archive; `file` and `like` as for `open_hdf5`.

    Raises:
        UnreadableError: the archive is damaged, unsafe or not what Keras writes.
    """
    whole = Image(path, file)
    try:
        archive = zipfile.ZipFile(ImageFile(whole))
        members = _members(whole, archive)
        image = _weights_image(whole, members)
        metadata, config_bytes = (_small(whole, archive, name) for name in (_METADATA, _CONFIG))
    except (
        zipfile.BadZipFile,
        struct.error,
        ValueError,
        NotImplementedError,
        OverflowError,
        EOFError,
        RuntimeError,
    ) as error:
        if isinstance(error, SwaAvgError):
            raise
        if isinstance(error.__context__, SwaAvgError):  # zipfile takes it for damage
            raise error.__context__ from None
        raise UnreadableError(path, f"damaged .keras archive ({error})") from error
    return _checkpoint(path, image, archive, config_bytes, parse_json(metadata, path, _METADATA), like)


def _small(whole: Image, archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > MAX_JSON:
        raise UnreadableError(whole.path, f"is larger than {MAX_JSON >> 20} MiB", tensor=name)
    return archive.read(name)


def _checkpoint(
    path: Path,
    image: Image,
    archive: zipfile.ZipFile,
    config_bytes: bytes,
    metadata: Mapping[str, Any],
    like: Checkpoint | None,
) -> ArchiveCheckpoint:
    same = isinstance(like, ArchiveCheckpoint) and like.config_bytes == config_bytes
    config = (
        like.config if like is not None and same else _model_config(parse_json(config_bytes, path, _CONFIG))
    )
    own: dict[str, Any] = {
        "path": path,
        "images": (image,),
        "archive": archive,
        "config_bytes": config_bytes,
        "config": config,
        "metadata": metadata,
        "is_average": PROVENANCE in metadata,
        "writer": _writer(metadata.get("keras_version")),
    }
    if isinstance(like, ArchiveCheckpoint) and like.shares_layout((image,)):
        return replace(like, **own)
    layout = read_layout(image)
    if not is_keras_store(layout.groups):
        raise UnreadableError(path, f"{_WEIGHTS} does not hold what Keras writes: no `vars` groups")
    return ArchiveCheckpoint(
        kind=".keras archive",
        suffixes=(".keras",),
        tensors=layout.tensors,
        layer_names=layer_names(image, layout),
        empty_groups=check_store(path, layout),
        **own,
    )


def _writer(version: Any) -> str | None:
    return f"Keras {version}" if isinstance(version, str) else None


def _contents(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(member) as source:
            yield from iter(lambda: source.read(_CHUNK), b"")
    except zipfile.BadZipFile as error:
        raise UnreadableError(path, f"is damaged ({error})", tensor=member.filename) from error


def _model_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "compile_config"}


def _members(whole: Image, archive: zipfile.ZipFile) -> dict[str, tuple[zipfile.ZipInfo, int]]:
    """Return name -> (entry, offset of its data), refusing what Keras never writes.

    The central directory and the local headers can be made to disagree, and declared sizes can lie; what
    is read is what both say and what lies inside the file without overlap.
    """
    members: dict[str, tuple[zipfile.ZipInfo, int]] = {}
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise UnreadableError(whole.path, f"holds more than {_MAX_MEMBERS} members")
    position = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.filename
        if name in members:
            raise UnreadableError(whole.path, "stands twice in the archive", tensor=name)
        if info.flag_bits & _ENCRYPTED:
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
        members[name] = info, start
    missing = [name for name in (_WEIGHTS, _CONFIG, _METADATA) if name not in members]
    if missing:
        raise UnreadableError(whole.path, f"not a .keras archive with HDF5 weights: no {', '.join(missing)}")
    return members


def data_offset(whole: Image, info: zipfile.ZipInfo) -> int:
    """Return where a member's data start, once its local header agrees with the directory.

    Raises:
        UnreadableError: the two disagree.
    """
    header = whole.read(info.header_offset, _LOCAL_HEADER.size)
    signature, _, flags, method, _, _, _, packed, size, name_length, extra_length = _LOCAL_HEADER.unpack(
        header
    )
    name = whole.read(info.header_offset + _LOCAL_HEADER.size, name_length)
    sizes_agree = {packed, size} <= {info.file_size, 0xFFFFFFFF} or flags & 0x8
    if signature != b"PK\x03\x04" or method != info.compress_type or flags & _ENCRYPTED or not sizes_agree:
        raise UnreadableError(
            whole.path, "has a local header that differs from the directory", tensor=info.filename
        )
    if name.decode("utf-8" if flags & 0x800 else "cp437") != info.orig_filename:
        raise UnreadableError(whole.path, "is named differently in its local header", tensor=info.filename)
    return int(info.header_offset + _LOCAL_HEADER.size + name_length + extra_length)


def _weights_image(whole: Image, members: Mapping[str, tuple[zipfile.ZipInfo, int]]) -> Image:
    info, start = members[_WEIGHTS]
    image = Image(whole.path, whole.file, start, info.file_size)
    image.crc32 = info.CRC
    return image
