"""The short-lived child that fetches one signed model: ``python -m edgeguard.release.fetch --request FILE``.

It is the only part of a device that imports TUF. It reads a ``FetchRequest``, writes one ``FetchResult`` as
JSON to standard output, and ends with code 0, or with 2 when the request cannot be used. Rules enforced here:

* the trusted root comes from the operator's file at each start, never from what an earlier fetch kept;
* signatures, expiry, rollback and mixed versions are TUF's to check; no delegated role is followed;
* the rules of ``edgeguard.release.client`` hold before a target is fetched, its digest is taken again after;
* ``refused``: somebody vouched wrongly, or nobody did; ``failed``: network, disk or time; never a traceback;
* the file is put under a fixed name, so that no name from outside becomes a path here.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import logging
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Literal

import msgspec

from edgeguard.errors import EXIT_CLEAN, EXIT_USAGE, TrustError
from edgeguard.release.client import MAX_REASON, FetchRequest, FetchResult, check_name, check_target

STAGED = "incoming.tflite"
LOCK = ".lock"
SOCKET_TIMEOUT_S = 20
CHUNK_BYTES = 64 * 1024
LOG = logging.getLogger(__name__)


def fetch(request: FetchRequest) -> FetchResult:
    """Fetch and verify the hinted target. Whatever goes wrong is in the result; nothing is raised."""
    try:
        from tuf.api.exceptions import DownloadLengthMismatchError, RepositoryError  # the child only
    except ImportError as error:
        return _unsuccessful("failed", f"{error}; install the extra: pip install 'edgeguard[update]'")
    try:
        return _fetch(request)
    except TrustError as error:
        return _unsuccessful("refused", str(error))
    except (RepositoryError, DownloadLengthMismatchError) as error:
        # More bytes than signed is counted as an attack, unlike any other trouble with a download.
        return _unsuccessful("refused", _describe(error))
    except Exception as error:  # whatever a hostile peer found: the agent must learn of it, and go on
        return _unsuccessful("failed", _describe(error))


def _fetch(request: FetchRequest) -> FetchResult:
    from tuf.ngclient.config import UpdaterConfig
    from tuf.ngclient.updater import Updater
    from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

    check_name(request.target)
    root = Path(request.root).read_bytes()
    metadata, staged = Path(request.metadata_dir), Path(request.staging_dir) / STAGED
    for folder in (metadata, staged.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with (metadata / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _unsuccessful("failed", "another fetch is under way")
        staged.unlink(missing_ok=True)  # what lies there afterwards was verified by this fetch
        updater = Updater(
            metadata_dir=str(metadata),
            metadata_base_url=request.metadata_url,
            target_base_url=request.targets_url,
            fetcher=Urllib3Fetcher(SOCKET_TIMEOUT_S, CHUNK_BYTES, app_user_agent="edgeguard"),
            config=UpdaterConfig(max_delegations=0),
            bootstrap=root,
        )
        try:
            updater.refresh()
        finally:
            _flush(metadata)
        target = updater.get_targetinfo(request.target)
        if target is None:
            raise TrustError(f"target {request.target}", got="no such target in the signed metadata")
        signed = check_target(target.custom, request.hint, request.running)
        what = f"target {request.target}"
        if target.length > request.max_bytes:
            raise TrustError(what, got=f"{target.length} bytes", expected=f"at most {request.max_bytes}")
        expected = target.hashes.get("sha256")
        if expected is None:
            raise TrustError(what, got="no SHA-256 in the signed metadata")
        updater.download_target(target, str(staged))
        digest = _digest(staged)
        if digest != expected:
            staged.unlink()
            raise TrustError(what, got=f"SHA-256 {digest} on disk", expected=expected)
    return FetchResult(
        state="fetched",
        path=str(staged),
        file_digest=digest,
        sequence=signed.sequence,
        model_digest=signed.model_digest,
        guard_digest=signed.guard_digest,
    )


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
    for path in [*folder.glob("*.json"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    timeout = threading.Timer(
        request.timeout, lambda: _finish(_unsuccessful("failed", f"not done after {request.timeout:g} s"))
    )
    timeout.daemon = True
    timeout.start()
    tempfile.tempdir = request.staging_dir  # TUF's own temporary copy belongs on the same disk, not in a /tmp in memory
    _finish(fetch(request))


if __name__ == "__main__":
    main()
