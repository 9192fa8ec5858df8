"""Fetching: what is right arrives whole, what is wrong leaves nothing; over https, from a server of the test's own."""

from __future__ import annotations

import hashlib
import http.server
import os
import random
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imgcls.data import fetch as module
from imgcls.data.fetch import FetchError, digest_of, fetch, require_digest

# For localhost and 127.0.0.1, 2020 to 2120, of no use anywhere else.
CERTIFICATE = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIMqdrQiRJhXggd0DjTMjW60JWr2vJUzI3FcTQSe5xWfnoAoGCCqGSM49
AwEHoUQDQgAE1BAAwmdedRSqVEUo59Y/3ZsqNx+O6UBU1yr9oE2hURX9JsBnDQOV
QGdUK59pwRwBhXLv4CMspSVhhgcwMsj67A==
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBaDCCAQ2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNQQAMJnXnUUqlRF
KOfWP92bKjcfjulAVNcq/aBNoVEV/SbAZw0DlUBnVCufacEcAYVy7+AjLKUlYYYH
MDLI+uyjTjBMMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBRJNpk/9djBLXLEf4b9n0kjsd6CVzAKBggqhkjOPQQD
AgNJADBGAiEAk28zfUo/09fJpZ5LrxTL7y3SLwTgMl0Bpv6N1bN/BhICIQCNptbU
U6n9QW6U56BN+zcfeMDr9OmHlgQsuR89fZDYNA==
-----END CERTIFICATE-----
"""
CONTENT = random.Random(0).randbytes(300_000)
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()}"
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Site:
    """An https server; ``answers[path]`` says what comes, ``requests`` what was asked for."""

    def __init__(self, folder: Path) -> None:
        (folder / "pair.pem").write_text(CERTIFICATE)
        self.answers: dict[str, Answer] = {"/file.bin": body(CONTENT)}
        self.requests: list[tuple[str, str | None]] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append((self.path, self.headers.get("Range")))
                site.answers.get(self.path, not_found)(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # clients that go away, or refuse the certificate
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "pair.pem")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.trusting.load_verify_locations(folder / "pair.pem")
        self.base = f"https://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=lambda: self.server.serve_forever(0.01), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.close()


def body(
    content: bytes, kind: str = "application/octet-stream", length: int | None = None, status: int = 200
) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        if length != -1:
            handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def not_found(handler: http.server.BaseHTTPRequestHandler) -> None:
    body(b"<html>Not Found</html>", "text/html", status=404)(handler)


def to(url: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def in_pieces(size: int, *, ranges: bool = True) -> Answer:
    """Breaks off after ``size`` bytes each time; ``ranges``: goes on where it is asked to."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and ranges else 0
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        handler.send_header("Content-Length", str(len(CONTENT) - start))
        handler.end_headers()
        handler.wfile.write(CONTENT[start : start + size])

    return answer


def get(site: Site, target: Path, digest: str = SHA256, path: str = "/file.bin", **options: Any) -> bool:
    return fetch(site.base + path, target, digest, context=site.trusting, **options)


def assert_refused(site: Site, tmp_path: Path, match: str, path: str = "/file.bin", digest: str = SHA256) -> None:
    """The error has these words, and nothing is left where the file should have come."""
    with pytest.raises(FetchError, match=match):
        get(site, tmp_path / "sub" / "file.bin", digest, path)
    assert os.listdir(tmp_path / "sub") == []


# -------------------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize("digest", [SHA256, MD5, SHA256.upper().replace("SHA256", "sha256")])
def test_a_file_arrives(digest: str, site: Site, tmp_path: Path) -> None:
    steps: list[tuple[int, int | None]] = []
    target = tmp_path / "new" / "file.bin"
    assert get(site, target, digest, progress=lambda done, total: steps.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["file.bin"]
    assert steps[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_a_file_that_is_there_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert not get(site, tmp_path / "file.bin")
    assert site.requests == []


def test_a_file_of_somebodys_that_is_there_is_left_alone(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(
        FetchError, match=r"file\.bin is not the file that it should be: 4 bytes .*; remove or replace it"
    ):
        get(site, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert site.requests == []


def test_without_a_length_the_digest_decides(site: Site, tmp_path: Path) -> None:
    site.answers["/file.bin"] = body(CONTENT, length=-1)
    assert get(site, tmp_path / "file.bin")
    site.answers["/file.bin"] = body(CONTENT[:-1], length=-1)
    assert_refused(site, tmp_path, "is not the file that it should be: 299999 bytes")


def test_redirects_within_https(site: Site, tmp_path: Path) -> None:
    site.answers["/old"] = to(f"{site.base}/older")
    site.answers["/older"] = to("/file.bin")
    assert get(site, tmp_path / "file.bin", path="/old")
    assert [path for path, _ in site.requests] == ["/old", "/older", "/file.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_off_is_taken_up_again(ranges: bool, site: Site, tmp_path: Path) -> None:
    pieces = iter([in_pieces(150_000), in_pieces(90_000, ranges=ranges), in_pieces(300_000, ranges=ranges)])
    site.answers["/file.bin"] = lambda handler: next(pieces)(handler)
    assert get(site, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    third = "bytes=240000-" if ranges else "bytes=90000-"  # without ranges it began anew
    assert [asked for _, asked in site.requests] == [None, "bytes=150000-", third]


# -------------------------------------------------------------------------------------------------------- what is wrong


def test_only_https(site: Site, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    for url in (site.base.replace("https", "http") + "/file.bin", f"file://{secret}", "ftp://localhost/x", "data:,x"):
        with pytest.raises(FetchError, match="is not fetched: allowed is https:// only"):
            fetch(url, tmp_path / "x", SHA256, context=site.trusting)
    assert os.listdir(tmp_path) == ["secret"]
    assert site.requests == []


@pytest.mark.parametrize("scheme", ["http", "file", "ftp"])
def test_a_redirect_away_from_https(scheme: str, site: Site, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    place = f"file://{tmp_path}/x" if scheme == "file" else f"{scheme}://127.0.0.1:{site.server.server_port}/file.bin"
    site.answers["/old"] = to(place)
    assert_refused(site, tmp_path, rf"{scheme}://.* is not (fetched: allowed is https:// only|allowed)", "/old")
    assert [path for path, _ in site.requests] == ["/old"]


def test_redirects_without_end(site: Site, tmp_path: Path) -> None:
    site.answers["/loop"] = to("/loop")
    assert_refused(site, tmp_path, "/loop: the server answers 302", "/loop")
    assert 1 < len(site.requests) < 20 and {path for path, _ in site.requests} == {"/loop"}


def test_a_certificate_that_nobody_vouches_for(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"cannot be reached: .*CERTIFICATE_VERIFY_FAILED.*; check the network, or"):
        fetch(f"{site.base}/file.bin", tmp_path / "x", SHA256)
    assert os.listdir(tmp_path) == [] and site.requests == []


def test_wrong_bytes_of_the_right_length(site: Site, tmp_path: Path) -> None:
    site.answers["/file.bin"] = body(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    for digest in (SHA256, MD5):
        assert_refused(
            site, tmp_path, rf"what {site.base}/file\.bin sent is not the file that .* expected {digest}", digest=digest
        )
    assert [asked for _, asked in site.requests] == [None, None]  # once each: the same bytes would come again


def test_a_body_that_is_too_short_each_time(site: Site, tmp_path: Path) -> None:
    site.answers["/file.bin"] = body(CONTENT[:1000], length=len(CONTENT))
    assert_refused(site, tmp_path, r"broke off 3 times \(.*1000 of 300000 bytes came\); try again later")
    assert len(site.requests) == 3


def test_another_part_than_was_asked_for(site: Site, tmp_path: Path) -> None:
    pieces = iter([in_pieces(1000), body(CONTENT, status=206)])
    site.answers["/file.bin"] = lambda handler: next(pieces)(handler)
    assert_refused(site, tmp_path, "sends another part of the file than was asked for")
    assert [asked for _, asked in site.requests] == [None, "bytes=1000-"]


def test_a_missing_file(site: Site, tmp_path: Path) -> None:
    assert_refused(
        site,
        tmp_path,
        r"/gone: the server answers 404 Not Found; fetch it by other means and give it with --from",
        "/gone",
    )
    assert site.requests == [("/gone", None)]


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_instead_of_the_file(kind: str, site: Site, tmp_path: Path) -> None:
    site.answers["/file.bin"] = body(b"\n<!DOCTYPE html><html>please log in</html>", kind)
    assert_refused(site, tmp_path, "the server sends a web page .*instead of the file; fetch it by other means")
    assert site.requests == [("/file.bin", None)]


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(FetchError, match=r"cannot be reached: .*refused; check the network"):
            fetch(f"https://127.0.0.1:{port}/x", tmp_path / "x", SHA256)
    assert os.listdir(tmp_path) == []


def test_a_server_that_says_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    site.answers["/file.bin"] = lambda handler: [None, over.wait(5)][0]
    assert_refused(site, tmp_path, "cannot be reached: .*timed out")
    over.set()


def test_a_server_that_trickles(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then would keep any time-out from coming."""

    def trickle(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        for place in range(200):
            handler.wfile.write(CONTENT[place : place + 1])
            time.sleep(0.02)

    monkeypatch.setattr(module, "WINDOW", 0.2)
    site.answers["/file.bin"] = trickle
    assert_refused(site, tmp_path, r"sends \d+ bytes a second; try again later")
    assert site.requests == [("/file.bin", None)]


def test_more_than_any_data_set(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 200_000)
    site.answers["/file.bin"] = body(CONTENT, length=-1)
    assert_refused(site, tmp_path, "sends more than 200000 bytes")
    monkeypatch.setattr(module, "LARGEST", len(CONTENT))
    assert get(site, tmp_path / "file.bin")


def test_a_disk_without_room(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 299_999))
    assert_refused(site, tmp_path, "has 300000 bytes, .* lies on a disk with 299999 bytes left; make room")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 300_000))
    assert get(site, tmp_path / "file.bin")


def test_an_interruption_leaves_nothing(site: Site, tmp_path: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(site, tmp_path / "file.bin", progress=stop)
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------------------------------- digests


def test_digests(tmp_path: Path) -> None:
    """RFC 1321 and FIPS 180 give these for "abc"."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest_of(tmp_path / "abc", "md5") == "md5:900150983cd24fb0d6963f7d28e17f72"
    known = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_of(tmp_path / "abc") == known
    require_digest(tmp_path / "abc", known)
    with pytest.raises(
        FetchError, match=f"abc is not the file that it should be: 3 bytes with {known}, expected sha256:ab"
    ):
        require_digest(tmp_path / "abc", "sha256:ab")


@pytest.mark.parametrize("digest", ["", "sha256:", "crc32:00000000", "ba7816bf"])
def test_a_digest_that_cannot_be_checked_is_no_digest(digest: str, site: Site, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    assert_refused(site, tmp_path, "cannot be checked; allowed: sha256:HEX or md5:HEX", digest=digest)
    assert site.requests == []
