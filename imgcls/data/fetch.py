"""Fetching a file from the web: over https only, checked by its digest, and never half of it."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import IO, Any, BinaryIO

ALGORITHMS = ("sha256", "md5")
TIMEOUT = 60.0  # seconds without any byte before a connection counts as dead
WINDOW = 60.0  # seconds over which the speed is looked at
SLOWEST = 1024  # bytes a second; below it the server keeps the connection open and sends nothing of use
ATTEMPTS = 3  # connections that may break off; each goes on where the one before it ended
LARGEST = 16 << 30  # bytes; no set that is fetched comes near it
BY_HAND = "fetch it by other means and give it with --from"
_BLOCK = 1 << 20

Progress = Callable[[int, "int | None"], None]  # bytes that have come, bytes in all if the server said so


class FetchError(ValueError):
    """A file that could not be had as it should be; the message names it and says what to do."""


def fetch(
    url: str,
    target: Path,
    digest: str,
    *,
    context: ssl.SSLContext | None = None,
    progress: Progress = lambda done, total: None,
) -> bool:
    """Have the file of ``url`` at ``target``, with the digest that it must have; return whether it had to be fetched.

    url: https only; a redirect to anything else is refused.
    target: the file to write; its folder is made. A file that is there already is kept if its digest is right, and an
        error otherwise: it is somebody's.
    digest: "sha256:HEX" or "md5:HEX".
    context: how certificates are checked; None: by the system's authorities.

    It is written under a name of this process' own and renamed when it is whole and right, so nobody sees a part of
    it. In a run of several processes the first rank alone should call this. Raises :class:`FetchError`.
    """
    _require_https(url)
    _require_checkable(digest)
    if target.exists():
        require_digest(target, digest)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            _receive(url, file, _opener(context), progress)
            file.flush()
            os.fsync(file.fileno())
        _refuse_web_page(partial, url)
        require_digest(partial, digest, called=f"what {url} sent")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return True


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """``sha256:HEX`` (or ``md5:HEX``) of the file's bytes."""
    # md5 guards against accidents and mix-ups here, for which it is as good as any.
    hasher = hashlib.sha256() if algorithm == "sha256" else hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return f"{algorithm}:{hasher.hexdigest()}"


def require_digest(path: Path, digest: str, *, called: str = "") -> None:
    """Raise :class:`FetchError` unless the file has the digest; ``called`` names it in the message."""
    found = digest_of(path, _require_checkable(digest))
    if found != digest.lower():
        remedy = f"try again later, or {BY_HAND}" if called else "remove or replace it"
        raise FetchError(
            f"{called or path} is not the file that it should be: {path.stat().st_size} bytes with {found}, "
            f"expected {digest}; {remedy}"
        )


def _require_checkable(digest: str) -> str:
    """The algorithm of ``digest``."""
    algorithm, _, value = digest.partition(":")
    if algorithm not in ALGORITHMS or not value:
        raise FetchError(f"the digest {digest!r} cannot be checked; allowed: sha256:HEX or md5:HEX")
    return algorithm


class _BrokenOffError(Exception):
    """The connection ended before the body did."""


def _require_https(url: str) -> None:
    if not url.startswith("https://"):
        raise FetchError(f"{url} is not fetched: allowed is https:// only; {BY_HAND}")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _opener(context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    """urllib's own opener less the handlers of http, ftp, file and data."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(context=context or ssl.create_default_context()),
        _HttpsRedirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", "imgcls")]
    return opener


def _receive(url: str, file: BinaryIO, opener: urllib.request.OpenerDirector, progress: Progress) -> None:
    """Write the body into ``file``; a connection that breaks off is taken up again where it ended."""
    reason = ""
    for _ in range(ATTEMPTS):
        with _ask(url, file.tell(), opener) as response:
            total = _prepare(url, response, file)
            try:
                _copy(url, response, file, total, progress)
                reason = ""
            except _BrokenOffError as error:
                reason = f"{error}; "
            if not reason and total in (None, file.tell()):
                return
        reason += f"{file.tell()} of {total or 'unknown'} bytes came"
    raise FetchError(f"{url} broke off {ATTEMPTS} times ({reason}); try again later, or {BY_HAND}")


def _ask(url: str, start: int, opener: urllib.request.OpenerDirector) -> Any:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchError(f"{url}: the server answers {error.code} {error.reason}; {BY_HAND}") from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise FetchError(f"{url} cannot be reached: {reason}; check the network, or {BY_HAND}") from error


def _prepare(url: str, response: Any, file: BinaryIO) -> int | None:
    """Bytes that the whole file has (None: the server does not say); ``file`` stands where the body belongs."""
    if response.headers.get_content_type() == "text/html":
        raise FetchError(f"{url}: the server sends a web page (text/html) instead of the file; {BY_HAND}")
    start = file.tell()
    resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    if not resumed:
        start = 0
        file.seek(0)
        file.truncate()
    if response.status == 206 and not resumed:
        raise FetchError(f"{url}: the server sends another part of the file than was asked for; {BY_HAND}")
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    free = shutil.disk_usage(os.path.dirname(file.name)).free
    if total is not None and total - start > free:
        raise FetchError(f"{url} has {total} bytes, {file.name} lies on a disk with {free} bytes left; make room")
    return total


def _copy(url: str, response: Any, file: BinaryIO, total: int | None, progress: Progress) -> None:
    since, before = time.monotonic(), file.tell()
    while block := _next_block(response):
        file.write(block)
        progress(file.tell(), total)
        if file.tell() > LARGEST:
            raise FetchError(f"{url} sends more than {LARGEST} bytes; {BY_HAND}")
        seconds = time.monotonic() - since
        if seconds >= WINDOW:
            if file.tell() - before < SLOWEST * seconds:
                raise FetchError(f"{url} sends {(file.tell() - before) / seconds:.0f} bytes a second; try again later")
            since, before = time.monotonic(), file.tell()


def _next_block(response: Any) -> bytes:
    try:
        return response.read1(_BLOCK)  # read() would wait for the whole block, however slowly it comes
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOffError(str(error) or type(error).__name__) from error


def _refuse_web_page(path: Path, url: str) -> None:
    # Some servers call their error pages application/octet-stream.
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise FetchError(f"{url}: the server sends a web page instead of the file; {BY_HAND}")
