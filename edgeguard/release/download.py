"""How the fetch child downloads: resumed where it broke off, packed where the server can, no faster than allowed.

Rules enforced here:

* what came of a file stays in a partial file, and the next attempt asks for the rest alone (RFC 9110, range requests).
  A server that cannot give a part gives the whole, of which the rest is kept: only that counts as progress. Where it
  cannot give a part of what it packs, the file is asked for unpacked from then on;
* a partial file vouches for nothing: TUF takes length and digest over the whole. One that does not fit is removed, so
  that the next attempt begins anew;
* never is more stored than was signed, and unpacking stops one byte behind that;
* files of other addresses than the one under way are removed: at most one unfinished file lies here.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import tuf
import urllib3
from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    LengthOrHashMismatchError,
    SlowRetrievalError,
)
from tuf.ngclient.fetcher import FetcherInterface

SOCKET_TIMEOUT_S = 20
CHUNK_BYTES = 16 * 1024
_PARTIAL = "partial-"
_PACKED = ".gz"
_GZIP = 16 + zlib.MAX_WBITS
_NOT_SATISFIABLE = 416


class Downloader(FetcherInterface):
    """TUF's way to the network.

    Args:
        targets_url: what begins with this is resumable; the rest is small metadata.
        folder: where partial files lie.
        bytes_per_s: bound on what is received, None: none.
        packed: ask for gzip (RFC 9110, content coding).
        tell: called with the number of bytes of a target that were just added to it.
        clock, sleep: of the bound, in seconds.
    """

    def __init__(
        self,
        *,
        targets_url: str,
        folder: Path,
        bytes_per_s: int | None = None,
        packed: bool = False,
        tell: Callable[[int], None] = lambda _count: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._targets_url = targets_url
        self._folder = folder
        self._rate = bytes_per_s
        self._packed = packed
        self._clock, self._sleep = clock, sleep
        self._due = clock()
        self._tell = tell
        self.resumed = False
        """True where the file that came last began with what an earlier attempt left."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._chunks(self._get(url, {"Accept-Encoding": "identity"}))

    @contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """As TUF asks for a file; a target is kept until it was used, or turned out to be wrong."""
        if not url.startswith(self._targets_url):
            with super().download_file(url, max_length) as file:
                yield file
            return
        path = self._received(url, max_length)
        try:
            with _opened(path, max_length) as file:
                yield file
        except (LengthOrHashMismatchError, DownloadLengthMismatchError):
            path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)

    def _received(self, url: str, max_length: int) -> Path:
        """Receive a target as the server sends it, packed or not, and return where it lies."""
        plain = self._folder / f"{_PARTIAL}{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        packed = plain.with_name(plain.name + _PACKED)
        for other in self._folder.glob(f"{_PARTIAL}*"):
            if other not in (plain, packed):
                other.unlink()
        path = packed if packed.exists() else plain
        have = path.stat().st_size if path.exists() else 0
        self.resumed = have > 0
        if path == plain and have == max_length:
            return path
        wanted = {"Accept-Encoding": "gzip" if path == packed or (self._packed and not have) else "identity"}
        try:
            response = self._get(url, {**wanted, "Range": f"bytes={have}-"} if have else wanted)
        except DownloadHTTPError as error:
            if not have or error.status_code != _NOT_SATISFIABLE:
                raise
            path.unlink()
            return self._received(url, max_length)
        coding = response.headers.get("Content-Encoding", "identity")
        if coding not in ("identity", wanted["Accept-Encoding"]):
            response.close()
            raise DownloadError(f"{url}: content coding {coding[:40]}, which was not asked for")
        into = packed if coding == "gzip" else plain
        goes_on = response.status == 206 and into == path
        if have and path == packed and not goes_on:
            # Packed anew it may be other bytes: nothing is gained by what lies here.
            response.close()
            path.unlink()
            self._packed = False
            return self._received(url, max_length)
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            response.close()
            raise DownloadError(f"{url}: another part than was asked for")
        if into != path:
            path.unlink(missing_ok=True)  # it is empty
        skip = 0 if goes_on else have
        # gzip makes what cannot be packed longer by less than a thousandth.
        room = max_length if into == plain else max_length + max_length // 1000 + 1024
        with into.open("ab") as file:
            for received in self._chunks(response):
                chunk = received[skip:]
                skip -= len(received) - len(chunk)
                have += len(chunk)
                self._tell(len(chunk))
                if have > room:
                    into.unlink()
                    response.close()
                    raise DownloadLengthMismatchError(f"more than the {max_length} bytes that were signed")
                file.write(chunk)
        return into

    def _get(self, url: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        try:
            response = _pool(url).request(
                "GET",
                url,
                headers={**headers, "User-Agent": f"edgeguard python-tuf/{tuf.__version__}"},
                preload_content=False,
                decode_content=False,
                redirect=False,
                timeout=urllib3.Timeout(SOCKET_TIMEOUT_S),
            )
        except urllib3.exceptions.MaxRetryError as error:
            if isinstance(error.reason, urllib3.exceptions.TimeoutError):
                raise SlowRetrievalError from error
            raise
        if response.status >= 300:  # a redirect too: only the configured addresses are asked
            response.close()
            raise DownloadHTTPError(f"HTTP status {response.status}", response.status)
        return response

    def _chunks(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            for chunk in response.stream(CHUNK_BYTES, decode_content=False):
                yield chunk
                self._pace(len(chunk))
        except urllib3.exceptions.TimeoutError as error:
            raise SlowRetrievalError from error
        finally:
            response.release_conn()

    def _pace(self, count: int) -> None:
        """Wait until so many bytes more were allowed to come."""
        if self._rate is None:
            return
        now = self._clock()
        # What was not used in a pause may be used within a second, no more.
        self._due = max(self._due, now - 1.0) + count / self._rate
        if self._due > now:
            self._sleep(self._due - now)


@contextmanager
def _opened(path: Path, max_length: int) -> Iterator[IO[bytes]]:
    """What a received file holds, unpacked beside it where it is packed."""
    if path.suffix != _PACKED:
        with path.open("rb") as file:
            yield file
        return
    unpacked = path.with_name(f"{_PARTIAL}unpacked")
    try:
        with path.open("rb") as source, unpacked.open("w+b") as target:
            _unpack(source, target, max_length)
            target.seek(0)
            yield target
    finally:
        unpacked.unlink(missing_ok=True)


def _unpack(source: IO[bytes], target: IO[bytes], max_length: int) -> None:
    """Unpack, but never more than was signed. What is no gzip gives a file that its digest refuses."""
    stream: Any = zlib.decompressobj(_GZIP)
    count = 0
    waiting = b""
    while count <= max_length and (waiting := waiting or source.read(CHUNK_BYTES)):
        try:
            content = stream.decompress(waiting, CHUNK_BYTES)
        except zlib.error:
            return
        waiting = stream.unconsumed_tail
        count += len(content)
        target.write(content)
    if count > max_length:
        raise DownloadLengthMismatchError(f"unpacks to more than the {max_length} bytes that were signed")


def _pool(url: str) -> urllib3.PoolManager:
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        return urllib3.ProxyManager(proxy)
    return urllib3.PoolManager()
