"""The short-lived child that fetches one signed model: ``python -m edgeguard.release.fetch --request FILE``.

It is the only part of a device that imports TUF. It reads a ``FetchRequest``, writes one ``FetchResult`` as
JSON to standard output, and ends with code 0, or with 2 when the request cannot be used. Rules enforced here:

* the trusted root comes from the operator's file at each start, never from what an earlier fetch kept;
* signatures, expiry, rollback and mixed versions are TUF's to check; of delegated roles one is followed: the hub's;
* the rules of ``edgeguard.release.client`` hold before a target is fetched, its digest is taken again after;
* once TUF found the metadata valid, the clock's time becomes the floor that it may not fall below any more;
* nothing is fetched that the disk has no room for; what came of a model stays until the next attempt;
* ``refused``: somebody vouched wrongly, or nobody did; ``failed``: network, disk or time; never a traceback;
* the file is put under a fixed name, so that no name from outside becomes a path here.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edgeguard import disk
from edgeguard.errors import EXIT_CLEAN, EXIT_USAGE, TrustError
from edgeguard.release.client import (
    FLOOR,
    MAX_REASON,
    FetchRequest,
    FetchResult,
    TargetInfo,
    check_clock,
    check_name,
    check_target,
    time_floor,
)

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile
    from tuf.ngclient.updater import Updater

    from edgeguard.release.download import Downloader

STAGED = "incoming.tflite"
STAGED_SIDECAR = "incoming.guard.npz"
LOCK = ".lock"
COPIES = 3
"""A model lies three times on the disk before it runs: partial, staged and in its slot."""
LOG = logging.getLogger(__name__)


class Meter:
    """How many bytes of a target came that were not there; asked by another thread when time is up."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, count: int) -> None:
        """So many more."""
        self.count += count


def fetch(request: FetchRequest, meter: Meter | None = None) -> FetchResult:
    """Fetch and verify the hinted target. Whatever goes wrong is in the result; nothing is raised."""
    meter = meter or Meter()
    return msgspec.structs.replace(_fetched(request, meter), received=meter.count)


def _fetched(request: FetchRequest, meter: Meter) -> FetchResult:
    try:
        from tuf.api.exceptions import DownloadLengthMismatchError, RepositoryError  # the child only

        from edgeguard.release.download import Downloader
    except ImportError as error:
        return _unsuccessful("failed", f"{error}; install the extra: pip install 'edgeguard[update]'")
    staging = Path(request.staging_dir)
    downloader = Downloader(
        targets_url=request.targets_url,
        folder=staging,
        bytes_per_s=request.bytes_per_s,
        packed=request.compress,
        tell=meter.add,
    )
    try:
        return _fetch(request, downloader)
    except (TrustError, RepositoryError, DownloadLengthMismatchError) as error:
        # More bytes than signed is counted as an attack, unlike any other trouble with a download.
        for name in (STAGED, STAGED_SIDECAR):
            with contextlib.suppress(OSError):
                (staging / name).unlink()
        return _unsuccessful("refused", str(error) if isinstance(error, TrustError) else _describe(error))
    except Exception as error:  # whatever a hostile peer found: the agent must learn of it, and go on
        return _unsuccessful("failed", _describe(error))


def _fetch(request: FetchRequest, downloader: Downloader) -> FetchResult:
    from tuf.ngclient.config import UpdaterConfig
    from tuf.ngclient.updater import Updater

    check_name(request.target)
    root = Path(request.root).read_bytes()
    metadata, staging = Path(request.metadata_dir), Path(request.staging_dir)
    for folder in (metadata, staging):
        folder.mkdir(parents=True, exist_ok=True)
    with (metadata / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _unsuccessful("failed", "another fetch is under way")
        now_s = time.time()
        check_clock(now_s, time_floor(metadata))
        updater = Updater(
            metadata_dir=str(metadata),
            metadata_base_url=request.metadata_url,
            target_base_url=request.targets_url,
            fetcher=downloader,
            config=UpdaterConfig(max_delegations=1),
            bootstrap=root,
        )
        try:
            updater.refresh()
            target = updater.get_targetinfo(request.target)
        finally:
            _flush(metadata)
        disk.write(metadata / FLOOR, str(int(now_s)).encode())
        if target is None:
            raise TrustError(f"target {request.target}", got="no such target in the signed metadata")
        signed = check_target(
            target.custom, request.hint, request.running, board=request.board, runtime=request.runtime
        )
        digest = _check_file(request, target, signed)
        _download(updater, downloader, target, staging / STAGED, digest)
        if signed.sidecar is not None:
            _download_sidecar(updater, downloader, request.target, signed, staging / STAGED_SIDECAR)
    return FetchResult(
        state="fetched",
        path=str(staging / STAGED),
        file_digest=digest,
        sequence=signed.sequence,
        model_digest=signed.model_digest,
        guard_digest=signed.guard_digest,
        sidecar_path=str(staging / STAGED_SIDECAR) if signed.sidecar else None,
        sidecar_digest=signed.sidecar.sha256 if signed.sidecar else None,
    )


def _check_file(request: FetchRequest, target: TargetFile, signed: TargetInfo) -> str:
    """Refuse for what is signed of the file, before a byte of it is fetched; its SHA-256."""
    what = f"target {request.target}"
    if target.length > request.max_bytes:
        raise TrustError(what, got=f"{target.length} bytes", expected=f"at most {request.max_bytes}")
    digest = target.hashes.get("sha256")
    if digest is None:
        raise TrustError(what, got="no SHA-256 in the signed metadata")
    if digest in request.failed:
        raise TrustError(what, got="one that was on trial here and failed", do="release a repaired one")
    needed = COPIES * (target.length + (signed.sidecar.length if signed.sidecar else 0))
    free = shutil.disk_usage(request.staging_dir).free
    if free < needed:
        raise OSError(f"{free >> 20} MiB free, {(needed >> 20) + 1} MiB needed in {request.staging_dir}")
    return digest


def _download_sidecar(updater: Updater, downloader: Downloader, target: str, signed: TargetInfo, path: Path) -> None:
    from tuf.api.metadata import TargetFile

    assert signed.sidecar is not None
    name = target.removesuffix(".tflite") + ".guard.npz"
    companion = TargetFile(signed.sidecar.length, {"sha256": signed.sidecar.sha256}, name)
    _download(updater, downloader, companion, path, signed.sidecar.sha256)


def _download(updater: Updater, downloader: Downloader, target: TargetFile, path: Path, digest: str) -> None:
    """Put a target under ``path``, safe on disk; one that lies there already is not fetched again."""
    from tuf.api.exceptions import LengthOrHashMismatchError

    if updater.find_cached_target(target, str(path)) is None:
        try:
            updater.download_target(target, str(path))
        except LengthOrHashMismatchError:
            # What an earlier attempt left may have been damaged by a power cut: that is nobody's attack.
            if not downloader.resumed:
                raise
            updater.download_target(target, str(path))
    found = _digest(path)
    if found != digest:
        raise TrustError(f"target {target.path}", got=f"SHA-256 {found} on disk", expected=digest)
    disk.sync(path.parent)


def _digest(path: Path) -> str:
    """SHA-256 of a file, once it is safe on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(folder: Path) -> None:
    """TUF renames without fsync; its memory against rollback must outlive a power cut."""
    history = folder / "root_history"
    for path in [*folder.glob("*.json"), *history.glob("*.json"), *([history] if history.exists() else []), folder]:
        disk.sync(path)


_MEANINGS = {
    "LengthOrHashMismatchError": "the file is not the one that was signed",
    "UnsignedMetadataError": "the metadata is not signed by the keys that this device trusts",
    "ExpiredMetadataError": "the signed metadata has expired",
    "BadVersionNumberError": "the signed metadata is older than what this device has seen",
    "DownloadLengthMismatchError": "the server sent more than was signed",
}
"""What an operator reads first; the library's own words follow."""


def _describe(error: BaseException) -> str:
    """One line: what it means, the error, and what caused it, which is where urllib3 and TUF keep the reason."""
    meaning = _MEANINGS.get(type(error).__name__)
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 3:
        parts.append(f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__)
        cause = cause.__cause__
    told = ", from ".join(parts)
    return f"{meaning} ({told})" if meaning else told


def _unsuccessful(state: Literal["refused", "failed"], reason: str) -> FetchResult:
    line = " ".join(reason.split())[:MAX_REASON]
    LOG.warning("%s: %s", state, line)
    return FetchResult(state=state, reason=line)


_ENDING = threading.Lock()


def _finish(result: FetchResult, code: int = EXIT_CLEAN) -> None:
    """Write the result and end at once. The first caller wins; the lock is never given back."""
    _ENDING.acquire()
    os.write(sys.stdout.fileno(), msgspec.json.encode(result))
    os._exit(code)


def main() -> None:
    """Run one fetch and end the process, at the latest after the request's timeout."""
    parser = argparse.ArgumentParser(prog="edgeguard.release.fetch", description="Fetch one signed model.")
    parser.add_argument("--request", type=Path, required=True, metavar="REQ.json")
    path = parser.parse_args().request
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(levelname)s %(message)s")
    try:
        request = msgspec.json.decode(path.read_bytes(), type=FetchRequest)
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        _finish(_unsuccessful("failed", f"request {path}; got {error}"), EXIT_USAGE)
        return
    meter = Meter()

    def give_up() -> None:
        result = _unsuccessful("failed", f"not done after {request.timeout:g} s")
        _finish(msgspec.structs.replace(result, received=meter.count))

    timeout = threading.Timer(request.timeout, give_up)
    timeout.daemon = True
    timeout.start()
    tempfile.tempdir = request.staging_dir  # TUF's own temporary copy belongs on the same disk, not in a /tmp in memory
    _finish(fetch(request, meter))


if __name__ == "__main__":
    main()
