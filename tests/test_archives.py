"""Unpacking: what an honest archive becomes, and that nothing gets out of a hostile one."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls.data import archives
from imgcls.data.archives import ArchiveError, Limits, decompress, unpack

FILES = {"set/a.png": b"first", "set/deep/er/b.png": bytes(3_000_000), "set/empty.txt": b"", "beside.txt": b"left out"}


def tar(*members: tuple[str, Any], mode: str = "w", format: int = tarfile.PAX_FORMAT) -> bytes:
    """Members are (name, content) or (name, {attributes of TarInfo})."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as bundle:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                bundle.addfile(member, io.BytesIO(content))
            else:
                for key, value in content.items():
                    setattr(member, key, value)
                bundle.addfile(member)
    return out.getvalue()


def zipped(*members: tuple[str, bytes], **attributes: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            for key, value in attributes.items():
                setattr(entry, key, value)
            bundle.writestr(entry, content)
    return out.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() and not path.is_symlink() else b"?"
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


# --------------------------------------------------------------------------------------------------- honest archives


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_what_an_archive_becomes(kind: str, tmp_path: Path) -> None:
    members = tuple(FILES.items())
    (tmp_path / "archive").write_bytes(zipped(*members) if kind == "zip" else tar(*members, mode=kind))
    assert unpack(tmp_path / "archive", tmp_path / "new" / "all") == 4
    assert tree(tmp_path / "new" / "all") == FILES
    assert unpack(tmp_path / "archive", tmp_path / "part", top="set") == 3
    assert tree(tmp_path / "part") == {name[4:]: FILES[name] for name in FILES if name.startswith("set/")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "new", "part"]


def test_names_that_are_harmless(tmp_path: Path) -> None:
    """ "./", folders of their own, dots inside of names, other alphabets; the same folder may come twice."""
    folder = {"type": tarfile.DIRTYPE}
    members = [("./", folder), ("./x/", folder), ("x", folder), ("./x/..a", b"1"), ("x//b..", b"2"), ("x/ü…", b"3")]
    (tmp_path / "a.tar").write_bytes(tar(*members))
    assert unpack(tmp_path / "a.tar", tmp_path / "out") == 3
    assert tree(tmp_path / "out") == {"x/..a": b"1", "x/b..": b"2", "x/ü…": b"3"}


def test_the_top_folder_may_lie_one_level_below(tmp_path: Path) -> None:
    for name in ("amazon/images/bike/1.jpg", "some_images/amazon/images/bike/1.jpg"):
        (tmp_path / "a.tar").write_bytes(tar((name, b"1"), ("dslr/images/bike/1.jpg", b"2")))
        unpack(tmp_path / "a.tar", tmp_path / name.split("/")[0], top="amazon")
        assert tree(tmp_path / name.split("/")[0]) == {"images/bike/1.jpg": b"1"}


def test_rights_and_owners_are_the_process_own(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("s", {"mode": 0o7777, "uid": 4711}), ("t", {"mode": 0o000})))
    unpack(tmp_path / "a.tar", tmp_path / "out")
    plain = tmp_path / "plain"
    plain.touch()
    for name in ("s", "t"):
        found, usual = (tmp_path / "out" / name).stat(), plain.stat()
        assert (found.st_mode, found.st_uid) == (usual.st_mode, usual.st_uid)
    assert not stat.S_IMODE((tmp_path / "out" / "s").stat().st_mode) & (stat.S_ISUID | stat.S_ISGID)


def test_a_target_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("x", b"new")))
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "a.tar", tmp_path / "out")  # empty: taken
    (tmp_path / "out" / "x").write_bytes(b"mine")
    for target in (tmp_path / "out", tmp_path / "out" / "x"):
        with pytest.raises(ArchiveError, match=f"{target} is there already; remove it or choose another"):
            unpack(tmp_path / "a.tar", target)
    assert tree(tmp_path / "out") == {"x": b"mine"}


def test_another_archive_than_the_one_expected(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("other/x", b"")))
    with pytest.raises(ArchiveError, match=r"a\.tar has no files in its folder 'jpg'; it is another archive"):
        unpack(tmp_path / "a.tar", tmp_path / "out", top="jpg")
    assert os.listdir(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_one_compressed_file(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a.gz").write_bytes(compress(content))
    assert decompress(tmp_path / "a.gz", tmp_path / "sub" / "a") == len(content)
    assert (tmp_path / "sub" / "a").read_bytes() == content
    assert os.listdir(tmp_path / "sub") == ["a"]


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.99])
def test_one_compressed_file_that_is_cut_off(keep: float, tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(50_000))
    (tmp_path / "a.gz").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ArchiveError, match=r"a\.gz is damaged or no archive: .*; fetch it again"):
        decompress(tmp_path / "a.gz", tmp_path / "a")
    assert os.listdir(tmp_path) == ["a.gz"]


def test_one_compressed_file_that_explodes(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(5_000_000)))
    with pytest.raises(ArchiveError, match=r"a\.gz would become \d+ bytes or more from \d+; allowed are"):
        decompress(tmp_path / "a.gz", tmp_path / "a", limits=Limits(grace=1_000_000))
    assert os.listdir(tmp_path) == ["a.gz"]
    assert decompress(tmp_path / "a.gz", tmp_path / "a", limits=Limits(grace=5_000_000)) == 5_000_000


# -------------------------------------------------------------------------------------------------- hostile archives


def link(kind: bytes, target: str) -> dict[str, Any]:
    return {"type": kind, "linkname": target}


def damaged_in_the_middle(whole: bytes, at: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]


def gnu_sparse() -> bytes:
    """A header that claims a gigabyte of which nothing is stored."""
    member = tarfile.TarInfo("holes")
    member.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (1 << 30)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(1024)


def huge_header() -> bytes:
    """A long name of two megabytes in front of a file."""
    return tar(("x" * 2_000_000, b""), mode="w:gz", format=tarfile.GNU_FORMAT)


def encrypted() -> bytes:
    content = bytearray(zipped(("a", b"secret")))
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + place] |= 1
    return bytes(content)


def lying_size() -> bytes:
    """The directory of a zip says ten bytes, there are a hundred thousand."""
    content = bytearray(zipped(("a", bytes(100_000))))
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = struct.pack("<I", 10)
    return bytes(content)


def unknown_method() -> bytes:
    content = bytearray(zipped(("a", b"")))
    content[content.index(b"PK\x01\x02") + 10] = 99
    return bytes(content)


def declared_only() -> bytes:
    """A header of a terabyte, and nothing behind it."""
    member = tarfile.TarInfo("x")
    member.size = 1 << 40
    return tar(GOOD)[:1024] + member.tobuf(tarfile.GNU_FORMAT)


OUTSIDE, NO_FILE = "lies outside the archive's own folder", "is a link, a device or a sparse file"
GOOD = ("good", b"written before the evil is seen")
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "dots": (lambda: tar(GOOD, ("../evil", b"!")), OUTSIDE),
    "dots inside": (lambda: tar(GOOD, ("a/../../evil", b"!")), OUTSIDE),
    "absolute": (lambda: tar(GOOD, ("/tmp/imgcls_evil", b"!")), OUTSIDE),
    "backslashes": (lambda: tar(GOOD, ("..\\evil", b"!")), OUTSIDE),
    "a drive": (lambda: tar(GOOD, ("C:evil", b"!")), OUTSIDE),
    "folder outside": (lambda: tar(GOOD, ("../evil", {"type": tarfile.DIRTYPE})), OUTSIDE),
    "link outside": (lambda: tar(GOOD, ("l", link(tarfile.SYMTYPE, ".."))), NO_FILE),
    "link inside": (lambda: tar(GOOD, ("l", link(tarfile.SYMTYPE, "good"))), NO_FILE),
    "through a link": (lambda: tar(GOOD, ("l", link(tarfile.SYMTYPE, "..")), ("l/evil", b"!")), NO_FILE),
    "hard link": (lambda: tar(GOOD, ("l", link(tarfile.LNKTYPE, "/etc/passwd"))), NO_FILE),
    "device": (lambda: tar(GOOD, ("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})), NO_FILE),
    "block device": (lambda: tar(GOOD, ("sda", {"type": tarfile.BLKTYPE})), NO_FILE),
    "pipe": (lambda: tar(GOOD, ("pipe", {"type": tarfile.FIFOTYPE})), NO_FILE),
    "unknown type": (lambda: tar(GOOD, ("odd", {"type": b"Z"})), NO_FILE),
    "sparse": (gnu_sparse, NO_FILE),
    "twice": (lambda: tar(GOOD, ("good", b"another")), "comes twice, or is both a file and a folder"),
    "twice, spelt otherwise": (lambda: tar(GOOD, ("./good", b"another")), "comes twice, or is both"),
    "file then folder": (lambda: tar(GOOD, ("good/evil", b"!")), "comes twice, or is both a file and a folder"),
    "folder then file": (lambda: tar(("good/x", b""), GOOD), "comes twice, or is both a file and a folder"),
    "long name": (lambda: tar(GOOD, ("x" * 300, b"!")), "has a name that is too long"),
    "deep name": (lambda: tar(GOOD, ("x/" * 5000 + "y", b"!")), "has a name that is too long"),
    "huge header": (huge_header, r"it has a header of \d+ bytes"),
    "zeros": (lambda: tar(GOOD, ("zeros", bytes(9_000_000)), mode="w:gz"), "would become .* It is no ordinary archive"),
    "declared only": (declared_only, "would become .* It is no ordinary archive"),
    "many entries": (lambda: tar(*((f"{i}", b"") for i in range(200)), mode="w:gz"), "has more than 100 entries"),
    "empty file": (lambda: b"", "is damaged or no archive"),
    "text": (lambda: b"<html>404 Not Found</html>" * 100, "is damaged or no archive"),
    "zeros only": (lambda: bytes(10240), r"has no files in it"),
    "no end": (lambda: tar(GOOD)[:1024], "is damaged or no archive: it has no end"),
    "rubbish between": (lambda: tar(GOOD)[:1024] + b"rubbish " * 64 + tar(("later", b"")), "it has no end"),
    "cut in a file": (lambda: tar(GOOD, ("big", os.urandom(9000)))[:5000], "is damaged or no archive"),
    "cut gzip": (lambda: tar(GOOD, ("big", os.urandom(9000)), mode="w:gz")[:-200], "is damaged or no archive"),
    "gzip without its sum": (lambda: tar(GOOD, mode="w:gz")[:-8], "is damaged or no archive"),
    "gzip with a wrong sum": (lambda: damaged_in_the_middle(tar(GOOD, mode="w:gz"), -6), "is damaged or no archive"),
    "cut bz2": (lambda: tar(GOOD, ("big", os.urandom(9000)), mode="w:bz2")[:-200], "is damaged"),
    "cut xz": (lambda: tar(GOOD, ("big", os.urandom(9000)), mode="w:xz")[:-200], "is damaged"),
    "zip: dots": (lambda: zipped(GOOD, ("../evil", b"!")), OUTSIDE),
    "zip: absolute": (lambda: zipped(GOOD, ("/tmp/imgcls_evil", b"!")), OUTSIDE),
    "zip: link": (lambda: zipped(("l", b".."), external_attr=(stat.S_IFLNK | 0o777) << 16), "is a link or a device"),
    "zip: pipe": (lambda: zipped(("l", b""), external_attr=(stat.S_IFIFO | 0o777) << 16), "is a link or a device"),
    "zip: zeros": (lambda: zipped(GOOD, ("zeros", bytes(9_000_000))), "would become .* It is no ordinary archive"),
    "zip: another size than declared": (lying_size, "is damaged or no archive"),
    "zip: encrypted": (encrypted, "is encrypted"),
    "zip: cut off": (lambda: zipped(GOOD, ("big", os.urandom(9000)))[:-30], "is damaged or no archive"),
    "zip: a changed byte": (
        lambda: damaged_in_the_middle(zipped(GOOD, ("big", os.urandom(9000))), 3000),
        "is damaged or no archive",
    ),
    "zip: method": (unknown_method, "cannot be unpacked: .* unpack it by other means"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_leaves_nothing_anywhere(kind: str, tmp_path: Path) -> None:
    build, match = HOSTILE[kind]
    inner = tmp_path / "deep" / "inner"
    inner.mkdir(parents=True)
    archive = inner / "archive"
    archive.write_bytes(build())
    with pytest.raises(ArchiveError, match=match) as caught:
        unpack(archive, inner / "out", limits=Limits(entries=100, size=8_000_000, grace=4_000_000))
    assert str(archive) in str(caught.value)
    assert list(tree(tmp_path)) == ["deep/inner/archive"]
    assert [path.name for path in inner.iterdir()] == ["archive"]
    assert not os.path.lexists("/tmp/imgcls_evil")


def test_the_hostile_archives_would_be_unpacked_without_their_evil(tmp_path: Path) -> None:
    """The twin: the good entry alone, through the same limits."""
    for number, content in enumerate((tar(GOOD), tar(GOOD, mode="w:gz"), zipped(GOOD))):
        (tmp_path / "archive").write_bytes(content)
        assert unpack(tmp_path / "archive", tmp_path / str(number), limits=Limits(entries=100, size=8_000_000)) == 1
        assert tree(tmp_path / str(number)) == dict([GOOD])


def test_the_ratio_alone_stops_a_bomb(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    bomb.write_bytes(zipped(("zeros", bytes(3_000_000))))
    with pytest.raises(ArchiveError, match=r"allowed are 1000000000, and 100 for one"):
        unpack(bomb, tmp_path / "out", limits=Limits(size=1_000_000_000, grace=1000))
    assert unpack(bomb, tmp_path / "out", limits=Limits(ratio=2000, grace=1000)) == 1


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(tar(*FILES.items()))
    copy, calls = shutil.copyfileobj, 0

    def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        copy(*arguments)

    monkeypatch.setattr(archives.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left on device"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tar"]


def test_what_a_killed_process_left_is_not_the_target(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(*FILES.items()))
    left = tmp_path / f".out.{os.getpid()}.unpacking"
    left.mkdir()
    (left / "stale").touch()
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert tree(tmp_path / "out") == FILES
    assert not left.exists()
