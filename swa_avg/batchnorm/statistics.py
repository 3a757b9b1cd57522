"""Re-estimated BatchNorm statistics, as values that are laid over the bytes of an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isal.isal_zlib import crc32

from swa_avg.batchnorm.report import RefreshReport
from swa_avg.formats import Tensor
from swa_avg.formats.base import Buffer, Stream

__all__ = ["RefreshedStatistics", "overlaid"]


@dataclass(frozen=True)
class RefreshedStatistics:
    """What a refresh changed in a checkpoint."""

    values: Mapping[str, bytes]
    """Tensor name -> its new bytes."""
    report: RefreshReport

    def over(self, stream: Stream, tensors: Mapping[str, Tensor]) -> Stream:
        """Return a stream of the same bytes with these values in the places of their tensors."""
        return overlaid(stream, tensors, self.values)

    def record(self) -> dict[str, Any]:
        """Return what the output says of its refresh.

        The statistics cannot be derived again without the data; their CRC-32 tells whether they are still
        those.
        """
        digests = {name: f"{crc32(value):08x}" for name, value in sorted(self.values.items())}
        return {**self.report.record(), "values": digests}


def overlaid(stream: Stream, tensors: Mapping[str, Tensor], values: Mapping[str, bytes]) -> Stream:
    """Return a stream of the same bytes with other values of some tensors."""
    places = sorted((tensors[name].shard, tensors[name].offset, value) for name, value in values.items())

    def overlaid(index: int) -> Iterator[Buffer]:
        position = 0
        for chunk in stream(index):
            data = None
            for shard, offset, value in places:
                first, last = max(position, offset), min(position + len(chunk), offset + len(value))
                if shard == index and first < last:
                    data = bytearray(chunk) if data is None else data
                    data[first - position : last - position] = value[first - offset : last - offset]
            yield chunk if data is None else data
            position += len(chunk)

    return overlaid
