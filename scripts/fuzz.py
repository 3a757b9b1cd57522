"""Average damaged checkpoints: python scripts/fuzz.py [--cases 20000] [--seed 0] [--workers 2]

Each case takes three checkpoints of one format, damages one of their files where it hurts (a bit, a
word, a zeroed block, bytes moved from elsewhere, a truncation, in the metadata or in the values) and runs
swa-avg on them in a process of its own, with limits on time and memory. Every other damaged archive gets
checksums that fit, so that the damage reaches what reads its members. How a run ends is one of:

    same      the output holds what it does without the damage
    refused   exit code 3 or 4, one line on standard error, no output, no temporary
    carried   the damage lies in what an average takes from the newest checkpoint as it is (values of
              attributes, compile settings), and the output differs in nothing else
    value     the damage lies in values that have no checksum (everything but .keras), or one that fits, and
              the output differs in those values of that tensor alone
    WRONG     anything else: another output, a traceback, a signal, over 10 s, over 500 MB, something left
              behind

A seed reproduces a run. Exits with 1 if any case is WRONG, and keeps the files of those in --keep.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import select
import shutil
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "hostile")]

import h5py  # noqa: E402
import numpy as np  # noqa: E402
from isolated import MEMORY_LIMIT, TIME_LIMIT, Ended, Isolated  # noqa: E402

import makers  # noqa: E402

OUTCOMES = ("same", "refused", "carried", "value", "WRONG")
_CORPUS = _TESTS / "corpus"
_WORDS = (0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 24, 96, 512)


@dataclass(frozen=True)
class Kind:
    """One format: the files of three checkpoints, and what an undamaged run gives."""

    name: str
    suffix: str
    options: tuple[str, ...]
    files: Mapping[str, bytes]
    """Name -> bytes; the names of the checkpoints themselves sort in training order."""
    inputs: tuple[str, ...]
    has_checksum: bool
    expected: Mapping[str, bytes]
    """What `describe` makes of an undamaged run's output."""
    payloads: Mapping[str, Mapping[str, tuple[int, int]]]
    """File -> tensor -> its extent."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        table, wrong, slowest, largest = fuzz(
            arguments.cases, arguments.seed, arguments.workers, Path(folder), arguments.keep
        )
    kinds = sorted({kind for kind, _ in table})
    print(f"{'':24}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for kind in kinds:
        print(f"{kind:24}" + "".join(f"{table[kind, outcome]:9}" for outcome in OUTCOMES))
    print(f"{'all':24}" + "".join(f"{sum(table[k, o] for k in kinds):9}" for o in OUTCOMES))
    seconds = time.monotonic() - start
    print(
        f"{arguments.cases} cases, seed {arguments.seed}, {seconds:.0f} s, "
        f"{arguments.cases / seconds:.0f} a second; slowest {slowest:.2f} s, "
        f"largest {largest / 2**20:.0f} MiB"
    )
    for line in wrong:
        print(line)
    sys.exit(bool(wrong))


def fuzz(
    cases: int, seed: int, workers: int, folder: Path, keep: Path | None = None
) -> tuple[Counter[tuple[str, str]], list[str], float, int]:
    """Run this many cases; return the counts, what went wrong, the longest run and the most memory."""
    table: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    slowest, largest = 0.0, 0
    servers = [Isolated() for _ in range(workers)]
    try:
        kinds = make_kinds(folder / "originals", servers[0])
        pending = iter(range(cases))
        busy: dict[Isolated, tuple[int, _Case]] = {}

        def begin(server: Isolated) -> None:
            number = next(pending, None)
            if number is not None:
                case = _Case(kinds, seed, number, folder / f"worker{servers.index(server)}")
                case.write()
                server.submit(case.command, case.folder)
                busy[server] = number, case

        for server in servers:
            begin(server)
        while busy:
            for server in select.select(list(busy), [], [])[0]:
                ended = server.result()
                number, case = busy.pop(server)
                outcome, reason = case.judge(ended)
                table[case.kind.name, outcome] += 1
                slowest, largest = max(slowest, ended.seconds), max(largest, ended.peak)
                if outcome == "WRONG":
                    wrong.append(f"case {number} ({case.kind.name}): {case.damage}: {reason}")
                    if keep is not None:
                        shutil.copytree(case.folder, keep / str(number), dirs_exist_ok=True)
                begin(server)
    finally:
        for server in servers:
            server.__exit__(None, None, None)
    return table, wrong, slowest, largest


class _Case:
    """One damaged set of files."""

    def __init__(self, kinds: list[Kind], seed: int, number: int, folder: Path) -> None:
        self.rng = random.Random(f"{seed} {number}")
        self.kind = kinds[number % len(kinds)]
        self.folder = folder
        self.victim = self.rng.choice(
            [name for name in self.kind.files if not name.endswith("json")] * 4 + list(self.kind.files)
        )
        original = self.kind.files[self.victim]
        self.data = bytearray(original)
        self.damage = self._damage()
        self.has_checksum = self.kind.has_checksum
        if self.has_checksum and len(self.data) == len(original) and self.rng.random() < 1 / 2:
            _fit_checksums(original, self.data)
            self.has_checksum = False
            self.damage += ", with checksums that fit"
        self.command = [*self.kind.inputs, "-q", "-o", f"swa{self.kind.suffix}", *self.kind.options]
        self.touched = _differences(original, bytes(self.data))

    def write(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name, data in self.kind.files.items():
            (self.folder / name).write_bytes(self.data if name == self.victim else data)

    def _damage(self) -> str:
        """Damage the data; return in words how."""
        rng, data = self.rng, self.data
        how = rng.choice(["bit", "bit", "word", "word", "block", "splice", "truncate", "insert"])
        position = self._position()
        if how == "bit":
            bit = rng.randrange(8)
            data[position] ^= 1 << bit
            return f"{self.victim}: bit {bit} of byte {position}"
        if how == "word":
            size = rng.choice([1, 2, 4, 8])
            old = int.from_bytes(data[position : position + size], "little")
            value = rng.choice([*_WORDS, rng.getrandbits(64), old + rng.choice([-8, -1, 1, 8]), len(data)])
            data[position : position + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
            del data[len(self.kind.files[self.victim]) :]
            return f"{self.victim}: {size} bytes at {position} become {value % 2 ** (8 * size)}"
        if how == "block":
            size = rng.choice([16, 64, 512, 4096])
            position = position // size * size if rng.random() < 0.5 else position
            data[position : position + size] = bytes(len(data[position : position + size]))
            return f"{self.victim}: {size} bytes at {position} become zeros"
        if how == "splice":
            size, source = rng.choice([8, 16, 64, 512]), self._position()
            data[position : position + size] = data[source : source + size][
                : len(data[position : position + size])
            ]
            return f"{self.victim}: {size} bytes at {position} become those at {source}"
        if how == "truncate":
            position = rng.choice([position, len(data) - 1 - position % 512])
            del data[max(0, position) :]
            return f"{self.victim}: cut to {len(data)} bytes"
        size = rng.choice([1, 8, 512])
        data[position:position] = bytes(size)
        return f"{self.victim}: {size} zeros put in at {position}"

    def _position(self) -> int:
        """Choose a byte: of three, one in the values, one anywhere else, one where something is written."""
        extents = list(self.kind.payloads[self.victim].values())
        where = self.rng.choice(["values", "anywhere", "written"])
        for _ in range(1000):
            position = self.rng.randrange(len(self.data))
            inside = any(start <= position < start + size for start, size in extents)
            if inside == (where == "values") and (where != "written" or self.data[position]):
                break
        return position

    def judge(self, ended: Ended) -> tuple[str, str]:
        """Return the outcome, and for WRONG the reason."""
        left = {path.name for path in self.folder.iterdir()} - set(self.kind.files)
        lines = ended.err.splitlines()
        wrong = {
            f"over {TIME_LIMIT} s": ended.timed_out,
            f"signal {-ended.code}": ended.code < 0,
            f"traceback: {ended.err[-300:]}": "Traceback" in ended.err,
            f"{ended.peak >> 20} MiB": ended.peak > MEMORY_LIMIT,
            "an input was written to": any(
                (self.folder / name).read_bytes() != (self.data if name == self.victim else data)
                for name, data in self.kind.files.items()
            ),
            f"exit code {ended.code}": ended.code not in (0, 3, 4),
            f"exit code {ended.code}, and left {sorted(left)}": ended.code > 0 and bool(left),
            f"left {sorted(left)}": any(name.startswith(".") for name in left),
            f"printed {ended.err[:300]}": not all(line.startswith("swa-avg: error: ") for line in lines)
            or (ended.code == 3 and len(lines) != 1)
            or bool(lines) != bool(ended.code),
        }
        for reason, is_so in wrong.items():
            if is_so:
                return "WRONG", reason
        return (
            ("refused", "") if ended.code else self._compare(describe(self.folder / f"swa{self.kind.suffix}"))
        )

    def _compare(self, found: Mapping[str, bytes]) -> tuple[str, str]:
        expected = self.kind.expected
        differing = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        if not differing:
            return "same", ""
        if self.has_checksum:
            return "WRONG", f"differs in {differing[:3]}"
        outcome = "carried"
        for name in differing:
            kind, _, tensor = name.partition(" ")
            if name not in found or name not in expected:
                return "WRONG", f"{name!r} is new or gone"
            if kind == "type":
                return "WRONG", f"{tensor} is {found[name]!r} instead of {expected[name]!r}"
            if kind == "tensor":
                if not self._explains(tensor, found[name], expected[name]):
                    return "WRONG", f"{tensor} has other values"
                outcome = "value"
        return outcome, ""

    def _explains(self, tensor: str, found: bytes, expected: bytes) -> bool:
        """Tell whether the values of a tensor that differ are those whose bytes were damaged."""
        if tensor not in self.kind.payloads[self.victim] or len(found) != len(expected):
            return False
        start, size = self.kind.payloads[self.victim][tensor]
        values = _differences(expected, found)
        itemsize = 8
        places = {
            (position - start) // itemsize for position in self.touched if start <= position < start + size
        }
        return {position // itemsize for position in values} <= places


def _fit_checksums(original: bytes, data: bytearray) -> None:
    """Give the members of an archive the CRC-32 of what they hold now."""
    with zipfile.ZipFile(io.BytesIO(original)) as archive:
        entry = archive.start_dir
        for info in archive.infolist():
            name, extra = struct.unpack_from("<2H", original, info.header_offset + 26)
            start = info.header_offset + 30 + name + extra
            checksum = zlib.crc32(data[start : start + info.file_size])
            for place in (info.header_offset + 14, entry + 16):
                struct.pack_into("<I", data, place, checksum)
            entry += 46 + sum(struct.unpack_from("<3H", original, entry + 28))


def _differences(one: bytes, other: bytes) -> list[int]:
    size = min(len(one), len(other))
    differing = np.flatnonzero(np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size))
    return [*differing.tolist(), *range(size, max(len(one), len(other)))]


def describe(path: Path) -> dict[str, bytes]:
    """Return everything in an output that has a meaning; what the tool says of itself apart."""
    if path.name.endswith(".json"):
        record = json.loads(path.read_bytes())
        record.pop("swa_avg")
        found = {"map": json.dumps(record).encode()}
        for name in sorted({name for where in record["weight_map"].values() for name in where}):
            found |= _describe_hdf5((path.parent / name).read_bytes())
        return found
    data = path.read_bytes()
    if not data.startswith(b"PK"):
        return _describe_hdf5(data)
    found = {}
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            return {"damaged": b""}
        for name in archive.namelist():
            found[f"member {name}"] = archive.read(name)
    metadata = json.loads(found.pop("member metadata.json"))
    metadata.pop("swa_avg")
    return found | {"metadata": json.dumps(metadata).encode()}


def _describe_hdf5(data: bytes) -> dict[str, bytes]:
    """Return tensors by name with their types, groups, and attributes without their values.

    The values are carried as they are, and libhdf5 does not survive every one.
    """
    found: dict[str, bytes] = {}
    with h5py.File(io.BytesIO(data), "r") as file:

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                found[f"tensor {name}"] = np.asarray(item[()]).tobytes()
                found[f"type {name}"] = f"{item.dtype} {item.shape}".encode()
            else:
                found[f"group {name}"] = b""
            found.update((f"attribute {name}@{key}", b"") for key in item.attrs if key != "swa_avg")

        visit("", file)
        file.visititems(visit)
    return found


def _extents(data: bytes) -> dict[str, tuple[int, int]]:
    """Return tensor -> extent of a bare HDF5 file, or of the one in an archive."""
    if data.startswith(b"{"):
        return {}
    shift = 0
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inner = archive.read("model.weights.h5")
        shift, data = data.index(inner), inner
    found = {}
    with h5py.File(io.BytesIO(data), "r") as file:
        file.visititems(
            lambda name, item: (
                found.__setitem__(name, (item.id.get_offset() + shift, item.nbytes))
                if isinstance(item, h5py.Dataset) and item.nbytes
                else None
            )
        )
    return found


def make_kinds(folder: Path, server: Isolated) -> list[Kind]:
    """Make the originals of every format, and their undamaged averages."""
    return [_kind(*entry, server) for entry in _sources(folder)]


def _sources(folder: Path) -> Iterator[tuple[str, str, tuple[str, ...], Path]]:
    """Yield (name, suffix, options, folder of three checkpoints a_1, a_2, a_3)."""
    legacy = {f"dense/dense/{n.rpartition('/')[2]}": None for n in ("x/0", "x/1")}
    for name, suffix, write in (
        (".keras", ".keras", makers.write_archive),
        (".weights.h5", ".weights.h5", makers.write_weights),
        ("sharded", ".weights.json", makers.write_sharded),
        ("legacy", ".h5", makers.write_legacy),
        ("legacy weights", ".h5", lambda path, arrays: makers.write_legacy(path, arrays, full=False)),
    ):
        target = folder / name
        target.mkdir(parents=True)
        for number in (1, 2, 3):
            arrays = makers.weights(number)
            if suffix == ".h5":
                kernel, bias = arrays["layers/dense/vars/0"], arrays["layers/dense/vars/1"]
                arrays = dict(zip(legacy, (kernel, bias), strict=True))
            write(target / f"a_{number}{suffix}", arrays)
        yield name, suffix, (), target
        yield f"{name} (drop)", suffix, ("--optimizer", "drop"), target
    for corpus, suffix in (
        ("keras-3.3.3-tf/cnn_bn", ".keras"),
        ("keras-3.3.3-tf/cnn_bn", ".h5"),
        ("tf-2.12.1/cnn_bn", ".weights.h5"),
        ("tf-2.12.1/cnn_bn", ".hdf5"),
        ("tf_keras-2.21.0/policy_bfloat16", ".h5"),
    ):
        target = folder / corpus / suffix
        target.mkdir(parents=True)
        for number in (1, 2, 3):
            shutil.copy(_CORPUS / corpus / f"ck{number}{suffix}", target / f"a_{number}{suffix}")
        version = corpus.split("/")[0].removesuffix("-tf")
        yield f"{version} {suffix}", suffix, (), target
        if suffix == ".h5":
            yield f"{version} {suffix} (drop)", suffix, ("--optimizer", "drop"), target


def _kind(name: str, suffix: str, options: tuple[str, ...], folder: Path, server: Isolated) -> Kind:
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    inputs = tuple(f"a_{number}{suffix}" for number in (1, 2, 3))
    output = folder / f"swa{suffix}"
    ended = server.run([*inputs, "-q", "-o", output, *options], folder)
    if ended.code:
        raise RuntimeError(f"{name}: {ended.err}")
    expected = describe(output)
    for path in folder.glob("swa*"):
        path.unlink()
    payloads = {file: _extents(data) for file, data in files.items()}
    return Kind(name, suffix, options, files, inputs, suffix == ".keras", expected, payloads)


if __name__ == "__main__":
    main()
