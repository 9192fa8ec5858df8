"""A folder on another machine: its files are fetched when they are needed, once, whole and checked, into a cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir

from imgcls.data.fetch import TIMEOUT, fetch, require_digest

CACHE = "imgcls_shards"  # below iopath's cache folder ($FVCORE_CACHE)
LARGEST_INDEX = 64 << 20  # bytes; what is read without a digest goes into memory


class RemoteFolder:
    """The folder at ``url``: https, any scheme that fsspec knows (s3, gs, hf, ...), or one that iopath knows.

    http is refused, as everywhere: nobody could tell what came.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.cache = Path(get_cache_dir()) / CACHE / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        with _opened(f"{self.url}/{name}") as stream:
            content = stream.read(LARGEST_INDEX + 1)
        if len(content) > LARGEST_INDEX:
            raise ValueError(f"{self.url}/{name} has more than {LARGEST_INDEX} bytes; it is no index of shards")
        return bytes(content)

    def local(self, name: str, digest: str) -> Path:
        """The file in the cache; fetched first when it is not there, by one process while the others wait for it."""
        # With the digest in its name, a file that has changed at its source is another file here.
        target = self.cache / f"{digest.rpartition(':')[2][:16]}-{name}"
        if target.exists():
            return target
        self.cache.mkdir(parents=True, exist_ok=True)
        with (self.cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
            if not target.exists():
                _fetch(f"{self.url}/{name}", target, digest)
        return target


def _fetch(url: str, target: Path, digest: str) -> None:
    if url.startswith("https://"):
        fetch(url, target, digest)
        return
    partial = target.with_name(f".{target.name}.partial")
    try:
        with _opened(url) as stream, partial.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        require_digest(partial, digest, called=f"what came from {url}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _opened(url: str) -> Iterator[IO[Any]]:
    import fsspec  # torch asks for it

    scheme = url.partition("://")[0]
    if scheme == "http":
        raise ValueError(f"{url} is not fetched: http is open to anybody's changes; use https, or copy it by hand")
    try:
        if scheme == "https":
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                if not response.url.startswith("https://"):
                    raise ValueError(f"{url} leads to {response.url}, which is not fetched: allowed is https:// only")
                yield response
        elif scheme in fsspec.available_protocols():
            with fsspec.open(url, "rb") as stream:
                yield stream
        else:
            with PathManager.open(url, "rb") as stream:
                yield stream
    except OSError as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot fetch {url}: {reason}; check the address and the network") from error
