"""Unpacking what came from elsewhere: inside its target only, within limits, whole or not at all.

Nothing of the archive is trusted. Taken are plain files and folders under relative names; their bytes are written by
this module, with the process' own rights and owner. Links, devices, sparse files and names that lead elsewhere
are refused, and so is the archive that has one. An archive is unpacked beside its target and renamed when it is whole,
so a target that exists is complete.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

_BLOCK = 1 << 20
_END_OF_TAR = bytes(tarfile.BLOCKSIZE)
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the second: an empty one
_COMPRESSED = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\0": lzma.LZMAFile}
_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, struct.error, EOFError),
    *(ValueError, OverflowError),
)


class ArchiveError(ValueError):
    """An archive that is damaged, or that does what no data set does; the message names it."""


@dataclass(frozen=True)
class Limits:
    """What an archive may become. The ratio counts only beyond ``grace`` bytes: small files may be all zeros."""

    entries: int = 2_000_000  # files and folders; ImageNet has 1.4 million
    size: int = 256 << 30  # bytes unpacked
    ratio: float = 100.0  # bytes unpacked for one byte of the archive
    grace: int = 64 << 20  # bytes


class Entry(NamedTuple):
    """A file or a folder of an archive; ``name`` is relative and leads nowhere else."""

    name: str
    size: int  # bytes
    source: IO[bytes] | None  # None: a folder


def unpack(archive: Path, target: Path, *, top: str = "", limits: Limits = Limits()) -> int:
    """Unpack a tar file (plain, gz, bz2, xz) or a zip file into the new folder ``target``; return its files' number.

    target: must not exist, or be empty. It appears when everything is in it.
    top: the folder of the archive, at its top or one level below, that becomes the target, such as "jpg" of
        102flowers.tgz; what lies beside it is left out. Empty: everything.
    Raises :class:`ArchiveError`, or ``OSError`` where the disk is full; nothing is left behind then.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ArchiveError(f"{target} is there already; remove it or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with new_folder(target) as partial, archive.open("rb") as file:
        for entry in entries(file, str(archive), limits):
            inside = _below(top, entry.name)
            if inside is not None:
                count += write(entry, partial / inside, str(archive))
        if not count:
            where = f"in its folder {top!r}" if top else "in it"
            raise ArchiveError(f"{archive} has no files {where}; it is another archive than the one that is expected")
    return count


def _below(top: str, name: str) -> PurePosixPath | None:
    """The name of an entry seen from the folder ``top``; None where it lies elsewhere."""
    parts = name.split("/")
    if not top:
        return PurePosixPath(name)
    depth = next((depth for depth in (1, 2) if parts[depth - 1 : depth] == [top]), None)
    return None if depth is None else PurePosixPath(*parts[depth:])


def decompress(archive: Path, target: Path, *, limits: Limits = Limits()) -> int:
    """Write the one file that a .gz (or .bz2, .xz) holds to ``target``, whole or not at all; return its bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.unpacking")
    try:
        with archive.open("rb") as file, _errors_of(str(archive)), _decompressed(file) as source:
            meter, size = _Meter(file, str(archive), limits), 0
            with partial.open("wb") as out:
                while block := source.read(_BLOCK):
                    meter.add(len(block))
                    size += out.write(block)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return size


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write into; it becomes the target when the block ends well, else it goes away."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.unpacking")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(entry: Entry, path: Path, name: str) -> int:
    """Write an entry of the archive ``name`` to ``path``, which must be new; return 1 for a file, 0 for a folder."""
    try:
        if entry.source is None:
            path.mkdir(parents=True, exist_ok=True)
            return 0
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise _refused(name, entry.name, "comes twice, or is both a file and a folder") from error
    with file, _errors_of(name):
        shutil.copyfileobj(entry.source, file, _BLOCK)
        if file.tell() != entry.size:
            raise EOFError(f"{entry.name!r} ends after {file.tell()} of {entry.size} bytes")
    return 1


def entries(file: IO[bytes], name: str, limits: Limits = Limits()) -> Iterator[Entry]:
    """The files and folders of a tar or zip file, in order; ``name`` is what messages call it.

    An entry's ``source`` is to be read before the next entry is asked for; one that is not read is passed over.
    Raises :class:`ArchiveError` at the first entry that is no plain file or folder, or lies elsewhere.
    """
    file.seek(0)
    is_zip = file.read(4) in _ZIP
    file.seek(0)
    with _errors_of(name):
        yield from (_zip_entries if is_zip else _tar_entries)(file, name, _Meter(file, name, limits))


def _zip_entries(file: IO[bytes], name: str, meter: _Meter) -> Iterator[Entry]:
    with zipfile.ZipFile(file) as bundle:
        for entry in bundle.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(name, entry.filename, "is a link or a device")
            if entry.flag_bits & 1:
                raise _refused(name, entry.filename, "is encrypted")
            meter.add(entry.file_size)
            path = _safe(name, entry.filename)
            if entry.is_dir():
                yield Entry(path, 0, None)
            else:
                with bundle.open(entry) as source:
                    yield Entry(path, entry.file_size, source)


def _tar_entries(file: IO[bytes], name: str, meter: _Meter) -> Iterator[Entry]:
    with _decompressed(file) as stream:
        watched = _TarStream(stream)
        with tarfile.open(fileobj=watched, mode="r:", errorlevel=2) as bundle:
            while (member := bundle.next()) is not None:
                bundle.members.clear()  # type: ignore[attr-defined]  # a million headers would stay in memory
                if not (member.isdir() or (member.isreg() and not member.issparse())):
                    raise _refused(name, member.name, "is a link, a device or a sparse file")
                meter.add(member.size)
                yield Entry(
                    _safe(name, member.name), member.size, None if member.isdir() else bundle.extractfile(member)
                )
        # tarfile takes a file that ends between two members, or goes on with rubbish, for complete.
        if watched.last != _END_OF_TAR:
            raise EOFError("it has no end")
        while block := stream.read(_BLOCK):  # on to the checksum behind the end
            meter.add(len(block), entries=0)


class _Meter:
    """Adds up what an archive becomes and stops it at the limits."""

    def __init__(self, file: IO[bytes], name: str, limits: Limits) -> None:
        self._name, self._limits = name, limits
        self._packed = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._size = self._entries = 0

    def add(self, size: int, entries: int = 1) -> None:
        """Another entry of ``size`` bytes, as declared: neither tar nor zip hands out more than they declare."""
        self._size += size
        self._entries += entries
        limits = self._limits
        if self._entries > limits.entries:
            raise ArchiveError(f"{self._name} has more than {limits.entries} entries, as no data set has; remove it")
        if size < 0 or self._size > min(limits.size, max(limits.grace, limits.ratio * self._packed)):
            raise ArchiveError(
                f"{self._name} would become {self._size} bytes or more from {self._packed}; allowed are "
                f"{limits.size}, and {limits.ratio:g} for one. It is no ordinary archive; remove it"
            )


class _TarStream(io.RawIOBase):
    """A tar file of which at most a megabyte may be read at a time; remembers the last piece.

    tarfile reads the extended header of a file (its long name and such) as a whole, however large it says it is.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _BLOCK:
            raise EOFError(f"it has a header of {size} bytes")
        self.last = self._stream.read(size)
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


@contextmanager
def _decompressed(file: IO[bytes]) -> Iterator[IO[bytes]]:
    start = file.read(6)
    file.seek(0)
    opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        yield file
        return
    with opener(file, mode="rb") if opener is not gzip.GzipFile else gzip.GzipFile(fileobj=file) as stream:
        yield stream  # type: ignore[misc]


def _safe(archive: str, name: str) -> str:
    """The name of an entry without "." and doubled slashes; one that is absolute or leads upwards is refused."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or name[1:2] == ":":
        raise _refused(archive, name, "lies outside the archive's own folder")
    if any(len(os.fsencode(part)) > 255 for part in parts) or len(os.fsencode(name)) > 2048:
        raise _refused(archive, f"{name[:60]}...", "has a name that is too long")
    return "/".join(parts)


def _refused(archive: str, name: str, why: str) -> ArchiveError:
    return ArchiveError(
        f"{archive} is not unpacked: its entry {name!r} {why}; allowed are files and folders, each once, below the "
        "archive's own folder"
    )


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Whatever a damaged archive makes the standard library raise becomes an :class:`ArchiveError`."""
    try:
        yield
    except ArchiveError:
        raise
    except _DAMAGED as error:
        raise ArchiveError(
            f"{name} is damaged or no archive: {error or 'it ends too early'}; fetch it again"
        ) from error
    except RuntimeError as error:  # a method of compression that zipfile does not know; headers without end
        raise ArchiveError(f"{name} cannot be unpacked: {error}; unpack it by other means") from error
    except OSError as error:
        if error.errno is not None:
            raise  # the disk is full, say
        raise ArchiveError(f"{name} is damaged: {error}; fetch it again") from error
