"""All of an output, or nothing of it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from swa_avg.errors import SystemRefusalError, UsageError
from swa_avg.files import publication as publish
from swa_avg.files.publication import Publication
from swa_avg.interrupts import Interrupted, interrupts


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_together_and_readable(tmp_path: Path) -> None:
    with Publication(tmp_path / "swa.json", overwrite=False) as publication:
        for name in ("swa_0.h5", "swa.json"):
            publication.create(name).write(name.encode())
        assert not {"swa_0.h5", "swa.json"} & set(_names(tmp_path))
        publication.publish()
    assert _names(tmp_path) == ["swa.json", "swa_0.h5"]
    assert (tmp_path / "swa.json").read_bytes() == b"swa.json"
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "swa.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with Publication(tmp_path / "swa.h5", overwrite=True) as publication:
            publication.create("swa.h5").write(b"half")
            publication.scratch().write(b"scratch")
            raise RuntimeError("bug")

    (tmp_path / "swa.h5").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="bug"):
        fail()
    assert _names(tmp_path) == ["swa.h5"]
    assert (tmp_path / "swa.h5").read_bytes() == b"old"


def test_a_file_that_appears_during_the_run_is_not_replaced(tmp_path: Path) -> None:
    def run() -> None:
        with Publication(tmp_path / "swa.h5", overwrite=False) as publication:
            publication.create("swa.h5").write(b"ours")
            (tmp_path / "swa.h5").write_bytes(b"theirs")
            publication.publish()

    with pytest.raises(UsageError, match="exists; name another one, or overwrite it"):
        run()
    assert _names(tmp_path) == ["swa.h5"]
    assert (tmp_path / "swa.h5").read_bytes() == b"theirs"


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_runs_on_one_output_one_is_complete(overwrite: bool, tmp_path: Path) -> None:
    """The second one began before the first had given its files their names."""

    def second() -> None:
        with Publication(tmp_path / "swa.h5", overwrite=overwrite) as publication:
            publication.create("swa.h5").write(b"second")
            with Publication(tmp_path / "swa.h5", overwrite=overwrite) as first:
                first.create("swa.h5").write(b"first")
                first.publish()
            publication.publish()

    if overwrite:
        second()
    else:
        with pytest.raises(UsageError, match="exists; name another one, or overwrite it"):
            second()
    assert _names(tmp_path) == ["swa.h5"]
    assert (tmp_path / "swa.h5").read_bytes() == (b"second" if overwrite else b"first")


def test_of_two_sets_on_one_output_one_is_complete(tmp_path: Path) -> None:
    def second() -> None:
        with Publication(tmp_path / "swa.json", overwrite=False) as publication:
            for name in ("swa_0.h5", "swa_1.h5", "swa.json"):
                publication.create(name).write(b"second")
            with Publication(tmp_path / "swa.json", overwrite=False) as first:
                for name in ("swa_1.h5", "swa.json"):  # of fewer shards
                    first.create(name).write(b"first")
                first.publish()
            publication.publish()

    with pytest.raises(UsageError, match=r"swa_1\.h5 exists; name another one"):
        second()
    assert _names(tmp_path) == ["swa.json", "swa_1.h5"]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"first"}


def test_a_run_that_fails_does_not_remove_what_another_one_has_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(folder: Path) -> None:
        (tmp_path / "theirs").write_bytes(b"theirs")
        (tmp_path / "theirs").replace(tmp_path / "swa.h5")
        raise OSError(errno.EIO, "Input/output error")

    def run() -> None:
        with Publication(tmp_path / "swa.h5", overwrite=False) as publication:
            publication.create("swa.h5").write(b"ours")
            publication.publish()

    monkeypatch.setattr(publish, "sync_folder", overtaken)
    with pytest.raises(SystemRefusalError, match="cannot write: Input/output error"):
        run()
    assert _names(tmp_path) == ["swa.h5"]
    assert (tmp_path / "swa.h5").read_bytes() == b"theirs"


@pytest.mark.parametrize("links", [True, False])
def test_an_interrupt_while_files_get_their_names_undoes_that(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes twice, and on a file system without hard links."""

    def interrupted(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def run() -> None:
        with Publication(tmp_path / "swa.json", overwrite=False) as publication:
            for name in ("swa_0.h5", "swa.json"):
                publication.create(name).write(b"ours")
            publication.publish()

    monkeypatch.setattr(publish, "sync_folder", interrupted)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert _names(tmp_path) == []


def test_a_system_error_is_named_with_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run() -> None:
        with Publication(tmp_path / "swa.h5", overwrite=False) as publication:
            publication.create("swa.h5").write(b"ours")
            publication.publish()

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemRefusalError, match=r"cannot write: No space left on device") as caught:
        run()
    assert caught.value.filename == str(tmp_path / "swa.h5")
    assert _names(tmp_path) == []


def test_the_file_is_durable_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def traced_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync file")  # noqa: PTH112
        fsync(descriptor)

    def traced_link(source: Path, target: Path) -> None:
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "link", traced_link)
    with Publication(tmp_path / "swa.h5", overwrite=False) as publication:
        publication.create("swa.h5").write(b"data")
        publication.publish()
    assert calls == ["fsync file", "link", "fsync folder"]


def test_an_interrupt_that_a_library_drops_is_raised_before_the_output_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the handler replaces it
    interrupts.begin()
    try:
        with contextlib.suppress(Interrupted):  # as TensorFlow does while it traces
            interrupts(signal.SIGTERM, None)
        with Publication(tmp_path / "a", overwrite=False) as publication:
            publication.create("a").write(b"complete")
            with pytest.raises(Interrupted) as raised:
                publication.publish()
        assert raised.value.number == signal.SIGTERM
        assert list(tmp_path.iterdir()) == []
    finally:
        interrupts.begin()
