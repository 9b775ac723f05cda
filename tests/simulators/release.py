"""The signed channel with an attacker in it: a mirror that may lie, a thief with some keys, and a device."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from edgeguard.release import roles
from edgeguard.release.client import CUSTOM, FetchRequest, FetchResult
from edgeguard.release.fetch import fetch
from edgeguard.release.keys import load
from firmware_bridge.slots import Slots

OLD, NEW, OTHER, GUARD = "0" * 64, "1" * 64, "2" * 64, "3" * 64
"""Model digests: what a device runs at first, what replaces it, another model; and a guard's."""
MODEL, REPAIRED, EVIL = b"the model" * 3000, b"repaired" * 3000, b"evil" * 6000

Answer = Callable[[BaseHTTPRequestHandler], None]


class Mirror:
    """A web server on loopback that serves a folder, and lies about the paths in ``instead``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.instead: dict[str, bytes | Answer | None] = {}
        """By path below the address: other content, a function that answers, or None for nothing there."""
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    mirror._answer(self)

            def log_message(self, *args: object) -> None:
                """Be quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.lstrip("/")
        if path in self.instead:
            content = self.instead[path]
        else:
            file = self.folder / path
            content = file.read_bytes() if file.is_file() else None
        if callable(content):
            content(handler)
            return
        handler.send_response(404 if content is None else 200)
        handler.send_header("Content-Length", str(len(content or b"")))
        handler.end_headers()
        handler.wfile.write(content or b"")


@dataclass(frozen=True)
class State:
    """What a device runs."""

    model_digest: str
    sequence: int
    content: bytes
    slot: str


class Device:
    """A device's side without inference: the real client, and the real slots.

    Args:
        folder: its disk.
        root: the trusted root, installed when it was enrolled.
        mirror: where it fetches.
    """

    def __init__(self, folder: Path, root: bytes, mirror: Mirror) -> None:
        folder.mkdir()
        self.folder, self.mirror = folder, mirror
        (folder / "root.json").write_bytes(root)
        self.slots = Slots.install(folder / "slots", MODEL, sequence=0)
        self._model_digest = OLD

    def request(self, target: str, sequence: int) -> FetchRequest:
        """What it asks the child for when a hint comes."""
        return FetchRequest(
            metadata_url=f"{self.mirror.url}/metadata/",
            targets_url=f"{self.mirror.url}/targets/",
            metadata_dir=str(self.folder / "metadata"),
            root=str(self.folder / "root.json"),
            target=target,
            sequence=sequence,
            running_model_digest=self._model_digest,
            running_sequence=self.state.sequence,
            staging_dir=str(self.folder / "staging"),
            highest_sequence=self.slots.highest,
            board="Raspberry Pi 5 Model B Rev 1.0",
            runtime="litert",
            timeout=60,
        )

    def follow(self, target: str, sequence: int) -> FetchResult:
        """Follow a hint, and run what comes of it."""
        result = fetch(self.request(target, sequence))
        if result.state == "fetched":
            assert result.path is not None
            assert result.file_digest is not None
            assert result.model_digest is not None
            slot = self.slots.stage(Path(result.path), sha256=result.file_digest, sequence=sequence)
            self.slots.activate(slot)
            self.slots.confirm()
            self._model_digest = result.model_digest
        return result

    @property
    def state(self) -> State:
        """What it would run after a restart."""
        slots = Slots(self.folder / "slots")
        active = slots.active()
        return State(self._model_digest, active.sequence, slots.load(), active.name)


class Thief:
    """Somebody with a copy of a repository, some of its keys, and a key of their own for all else.

    Args:
        served: the genuine repository.
        copy: where the copy goes.
        stolen: the keys.
    """

    def __init__(self, served: Path, copy: Path, stolen: Sequence[Signer] = ()) -> None:
        self.folder = Path(shutil.copytree(served, copy))
        self.roles = roles.load(self.folder / "metadata")
        self._stolen = {signer.public_key.keyid: signer for signer in stolen}
        self._own = CryptoSigner.generate_ed25519()

    def list(self, role: str, target: str, content: bytes = EVIL, **changes: Any) -> None:
        """Put a file among a role's targets."""
        info = {"sequence": 2, "model_digest": NEW, "guard_digest": GUARD, "replaces": OLD, **changes}
        file = TargetFile.from_data(target, content, ["sha256"])
        file.unrecognized_fields["custom"] = {CUSTOM: info}
        self.of(role).signed.targets[target] = file
        folder, slash, name = target.rpartition("/")
        path = self.folder / "targets" / f"{folder}{slash}{sha256(content).hexdigest()}.{name}"
        if path.resolve().is_relative_to(self.folder.resolve()):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    def of(self, role: str) -> Metadata[Any]:
        """The metadata of a role, to be changed."""
        found = self.roles.of(role)
        assert found is not None
        return found

    def publish(self, *changed: str, version: int | None = None) -> None:
        """Sign these roles, snapshot and timestamp as well as the stolen keys allow.

        Args:
            changed: of root, targets and repaired those that were changed.
            version: of snapshot and timestamp; the next one when None.
        """
        snapshot, timestamp = self.of("snapshot"), self.of("timestamp")
        for role in changed:
            one = self.of(role)
            one.signed.version += 1
            self._write(f"{one.signed.version}.{role}.json", role)
            if role != "root":
                snapshot.signed.meta[f"{role}.json"] = MetaFile(one.signed.version)
        for one in (snapshot, timestamp):
            one.signed.version = one.signed.version + 1 if version is None else version
        self._write(f"{snapshot.signed.version}.snapshot.json", "snapshot")
        timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
        self._write("timestamp.json", "timestamp")

    def _write(self, name: str, role: str) -> None:
        metadata = self.of(role)
        metadata.signatures.clear()
        held = [keyid for keyid in roles.keyids(self.roles.delegator(role), role) if keyid in self._stolen]
        for signer in [self._stolen[keyid] for keyid in held] or [*self._stolen.values(), self._own]:
            metadata.sign(signer, append=True)
        (self.folder / "metadata" / name).write_bytes(metadata.to_bytes())


def stolen(*folders: Path, roles: Sequence[str] = ("",)) -> list[Signer]:
    """The keys of these roles in these folders; all of them unless roles are named."""
    paths = [path for folder in folders for role in roles for path in sorted(folder.glob(f"{role}*.pem"))]
    return [signer for path in paths for signer in load(path)]


@contextlib.contextmanager
def unchanged(device: Device) -> Iterator[None]:
    """Whatever happens within, the device runs afterwards what it ran before, and would after a restart."""
    before = device.state
    yield
    assert device.state == before
