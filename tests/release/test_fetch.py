"""Fetching a release as a device does: real repository, real HTTP, a real process; one test per attack."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from edgeguard.errors import ConfigError
from edgeguard.release.client import FetchRequest, FetchResult, read_outcome, spawn_fetch
from edgeguard.release.fetch import LOCK, STAGED, fetch
from edgeguard.release.keys import load
from edgeguard.release.repository import EXPIRES, Repository
from tests.simulators import needs
from tests.simulators.disk import crash_at

OLD, NEW, NEWER, GUARD = "0" * 64, "1" * 64, "2" * 64, "3" * 64
MODEL, NEXT_MODEL = b"model one" * 1000, b"model two" * 1000

Answer = Callable[[BaseHTTPRequestHandler], None]


def now() -> datetime:
    return datetime.now(timezone.utc)


class Site:
    """A real HTTP server on loopback that serves a folder, and lies about the paths in ``instead``.

    It gives parts of files where ``gives_parts``, of packed ones where ``gives_packed_parts``, packs where ``packs``,
    and breaks off within a target after so many bytes. With ``tls`` it speaks HTTPS.
    """

    def __init__(self, folder: Path, *, tls: ssl.SSLContext | None = None) -> None:
        self.folder = folder
        self.gives_parts, self.packs = True, False
        self.gives_packed_parts = True
        self.breaks_after: int | None = None
        self.instead: dict[str, bytes | Answer] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                with contextlib.suppress(ConnectionError):
                    site._answer(self)

            def log_message(self, *args: object) -> None:
                """Be quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        content = self.instead.get(handler.path)
        if callable(content):
            content(handler)
            return
        path = self.folder / handler.path.lstrip("/")
        if content is None and path.is_file():
            content = path.read_bytes()
        if content is None:
            handler.send_error(404)
            return
        packed = self.packs and "gzip" in handler.headers.get("Accept-Encoding", "")
        if packed:
            content = gzip.compress(content, mtime=0)
        gives_parts = self.gives_packed_parts if packed else self.gives_parts
        start = int(handler.headers.get("Range", "bytes=0-")[len("bytes=") : -1]) if gives_parts else 0
        if start >= len(content) > 0:
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if packed:
            handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        end = None if self.breaks_after is None or "/targets/" not in handler.path else start + self.breaks_after
        handler.wfile.write(content[start:end])


class World:
    """A hub's repository, the site that serves it, and one device."""

    def __init__(self, folder: Path, *, expires: dict[str, timedelta] | None = None, serve: Site | None = None) -> None:
        self.folder = folder
        self.served, self.keys, self.device = folder / "served", folder / "keys", folder / "device"
        life = {**EXPIRES, **(expires or {})}
        self.offline = folder / "offline"
        self.repository = Repository.create(self.served, self.keys, self.offline, clock=now, expires=life)
        self.first = self.repository.add(MODEL, name="digits", model_digest=NEW, guard_digest=GUARD, replaces=OLD)
        self.device.mkdir()
        (self.device / "root.json").write_bytes(self.repository.root())
        self.site = serve or Site(self.served)

    def release_next(self) -> None:
        """The second release, which replaces the first."""
        self.repository.add(NEXT_MODEL, name="digits", model_digest=NEWER, guard_digest=GUARD, replaces=NEW)

    def request(self, **changes: Any) -> FetchRequest:
        """The device's request for the first release, which it is offered while it runs the model OLD."""
        return msgspec.structs.replace(
            FetchRequest(
                metadata_url=f"{self.site.url}/metadata/",
                targets_url=f"{self.site.url}/targets/",
                metadata_dir=str(self.device / "metadata"),
                root=str(self.device / "root.json"),
                target="digits-1.tflite",
                sequence=1,
                running_model_digest=OLD,
                staging_dir=str(self.device / "staging"),
                timeout=60,
            ),
            **changes,
        )

    def next_request(self) -> FetchRequest:
        """The device's request for the second release, once it runs the first."""
        return self.request(target="digits-2.tflite", sequence=2, running_model_digest=NEW, running_sequence=1)

    def fetch(self, request: FetchRequest | None = None) -> FetchResult:
        """One fetch, in this process."""
        return fetch(request or self.request())

    def spawn(self, request: FetchRequest | None = None) -> FetchResult:
        """One fetch in a process of its own, as the agent does it."""
        process = spawn_fetch(request or self.request())
        process.wait(timeout=90)
        result = read_outcome(process)
        assert result is not None
        return result

    @property
    def staged(self) -> Path:
        return self.device / "staging" / STAGED

    def signer(self, role: str) -> Any:
        """What an attacker holds who stole the key of ``role``."""
        (path,) = (*self.keys.glob(f"{role}-*.pem"), *self.offline.glob(f"{role}-*.pem"))
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))

    def metadata(self, name: str) -> Path:
        return self.served / "metadata" / name

    def sign_as_hub(self, targets: Targets) -> None:
        """Publish other targets with the hub's own keys, as a hub would that was taken over."""
        signed: dict[str, bytes] = {}
        for role, payload in (
            ("targets", targets),
            ("snapshot", Snapshot(9, expires=now() + timedelta(days=1))),
            ("timestamp", Timestamp(9, expires=now() + timedelta(days=1))),
        ):
            if isinstance(payload, Snapshot):
                payload.meta = {"targets.json": MetaFile(targets.version), "repaired.json": MetaFile(1)}
            if isinstance(payload, Timestamp):
                payload.snapshot_meta = MetaFile(9)
            metadata: Metadata[Any] = Metadata(payload)
            metadata.sign(self.signer(role))
            signed[role] = metadata.to_bytes()
        self.metadata(f"{targets.version}.targets.json").write_bytes(signed["targets"])
        self.metadata("9.snapshot.json").write_bytes(signed["snapshot"])
        self.metadata("timestamp.json").write_bytes(signed["timestamp"])


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Makes worlds, each in a folder of its own, and stops their servers."""
    made: list[World] = []

    def make(**options: Any) -> World:
        made.append(World(tmp_path / f"world{len(made)}", **options))
        return made[-1]

    yield make
    for world in made:
        world.site.stop()


@pytest.fixture
def world(worlds: Callable[..., World]) -> World:
    return worlds()


@pytest.fixture(autouse=True)
def no_traceback(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever the attack, the child never ends with a traceback."""
    yield
    assert "Traceback" not in capfd.readouterr().err


def assert_refused(world: World, result: FetchResult, reason: str) -> None:
    assert (result.state, result.path) == ("refused", None)
    assert reason in result.reason
    assert "\n" not in result.reason
    assert not world.staged.exists()


# --- what works -------------------------------------------------------------------------------------------------


def test_a_genuine_release_is_fetched_and_verified(world: World) -> None:
    result = world.spawn()
    assert result == FetchResult(
        state="fetched",
        received=len(MODEL),
        path=str(world.staged),
        file_digest=sha256(MODEL).hexdigest(),
        sequence=1,
        model_digest=NEW,
        guard_digest=GUARD,
    )
    assert world.staged.read_bytes() == MODEL


def test_the_next_release_is_fetched_after_the_first(world: World) -> None:
    world.fetch()
    world.release_next()
    assert world.fetch(world.next_request()).model_digest == NEWER
    assert world.staged.read_bytes() == NEXT_MODEL


def test_a_fetch_can_be_repeated(world: World) -> None:
    first = world.fetch()
    assert world.fetch() == msgspec.structs.replace(first, received=0), "what lies there is not fetched again"


def test_a_device_without_a_model_fetches_a_first_release(world: World) -> None:
    world.repository.add(NEXT_MODEL, name="first", model_digest=NEWER, guard_digest=GUARD, replaces=None)
    result = world.fetch(world.request(target="first-2.tflite", sequence=2, running_model_digest=None))
    assert result.state == "fetched"


def test_a_device_that_slept_through_renewed_roots_still_updates(world: World) -> None:
    class Calendar:
        now = now() - timedelta(days=500)

    folder, keys = world.folder / "old", world.folder / "old-keys"
    repository = Repository.create(folder, keys, world.folder / "old-offline", clock=lambda: Calendar.now)
    root = repository.root()
    while Calendar.now + timedelta(days=30) < now():
        Calendar.now += timedelta(days=30)
        repository.renew()
    Calendar.now = now()
    repository.add(MODEL, name="digits", model_digest=NEW, guard_digest=GUARD, replaces=OLD)
    world.site.folder = folder
    (world.device / "root.json").write_bytes(root)
    assert (folder / "metadata" / "3.root.json").exists()
    assert world.fetch().state == "fetched"


def test_what_was_seen_last_and_the_model_are_safe_on_disk_when_a_fetch_is_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    assert fetch(world.request()).state == "fetched"
    memory = world.device / "metadata"
    paths = [memory / f"{role}.json" for role in ("root", "timestamp", "snapshot", "targets")]
    assert {path.stat().st_ino for path in (*paths, memory, world.staged)} <= synced


def test_a_device_that_is_given_another_root_follows_that_repository(worlds: Callable[..., World]) -> None:
    world, other = worlds(), worlds()
    world.fetch()
    (world.device / "root.json").write_bytes(other.repository.root())
    world.site.folder = other.served
    assert world.fetch().state == "fetched"


# --- attacks on the model file ----------------------------------------------------------------------------------


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(bytes(64 * 1024))


@pytest.mark.parametrize(
    "served",
    [MODEL[:-1] + b"x", MODEL + b"x", MODEL[:-1], b"", NEXT_MODEL, endless],
    ids=["one byte changed", "longer", "shorter", "empty", "another model", "endless"],
)
def test_a_tampered_model_is_refused(world: World, served: bytes | Answer) -> None:
    world.site.instead[f"/targets/{world.first.file_digest}.digits-1.tflite"] = served
    assert_refused(world, world.fetch(), "Mismatch")


def test_a_model_fetched_before_is_gone_when_the_next_fetch_is_refused(world: World) -> None:
    world.fetch()
    assert_refused(world, world.fetch(world.request(sequence=2)), "sequence")


def test_a_model_larger_than_the_device_takes_is_refused_before_it_is_fetched(world: World) -> None:
    result = world.fetch(world.request(max_bytes=len(MODEL) - 1))
    assert_refused(world, result, f"at most {len(MODEL) - 1}")
    assert not [path for path in world.site.asked if path.startswith("/targets/")]


# --- attacks on the metadata ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json"])
def test_metadata_signed_by_another_key_is_refused(worlds: Callable[..., World], name: str) -> None:
    world, evil = worlds(), worlds()
    world.site.instead[f"/metadata/{name}"] = evil.metadata(name).read_bytes()
    assert_refused(world, world.fetch(), "")


def test_a_whole_repository_of_somebody_else_is_refused(worlds: Callable[..., World]) -> None:
    world, evil = worlds(), worlds()
    world.site.folder = evil.served
    assert_refused(world, world.fetch(), "timestamp was signed by 0/1 keys")


def test_a_new_root_that_the_old_one_did_not_sign_is_refused(worlds: Callable[..., World]) -> None:
    world, evil = worlds(), worlds()
    root: Metadata[Any] = Metadata.from_bytes(evil.repository.root())
    root.signed.version = 2
    root.sign(evil.signer("root"))
    world.site.folder = evil.served
    world.site.instead["/metadata/2.root.json"] = root.to_bytes()
    assert_refused(world, world.fetch(), "root was signed by 0/1 keys")


def test_older_metadata_than_was_seen_is_refused(world: World) -> None:
    old = world.metadata("timestamp.json").read_bytes()
    world.release_next()
    assert world.fetch().state == "fetched"
    world.site.instead["/metadata/timestamp.json"] = old
    assert_refused(world, world.fetch(), "New timestamp version 2 must be >= 3")


def test_older_targets_are_refused_even_when_the_keys_of_snapshot_and_timestamp_were_stolen(world: World) -> None:
    old: Metadata[Targets] = Metadata.from_bytes(world.metadata("2.targets.json").read_bytes())
    world.release_next()
    assert world.fetch().state == "fetched"
    world.sign_as_hub(old.signed)
    assert_refused(world, world.fetch(), "Expected targets.json version 2, got 3")


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_expired_metadata_is_refused(worlds: Callable[..., World], role: str) -> None:
    world = worlds(expires={role: timedelta(seconds=-1)})
    assert_refused(world, world.fetch(), "expired")


def test_a_device_that_is_kept_on_old_metadata_refuses_the_hint_it_cannot_verify(world: World) -> None:
    frozen = world.metadata("timestamp.json").read_bytes()
    world.release_next()
    world.site.instead["/metadata/timestamp.json"] = frozen
    assert_refused(world, world.fetch(world.next_request()), "no such target in the signed metadata")


TRUNCATED = [
    (name, share) for name in ("timestamp.json", "2.snapshot.json", "2.targets.json") for share in (0, 0.5, 0.99)
]


@pytest.mark.parametrize(("name", "share"), TRUNCATED)
def test_truncated_metadata_is_refused(world: World, name: str, share: float) -> None:
    content = world.metadata(name).read_bytes()
    world.site.instead[f"/metadata/{name}"] = content[: int(len(content) * share)]
    assert_refused(world, world.fetch(), "")


HOSTILE = {
    "null": b"null",
    "list": b"[]",
    "empty object": b"{}",
    "deep": b"[" * 15_000,
    "deep object": b'{"a":' * 3_000,
    "not UTF-8": b"\xff\xfe\x00",
    "huge number": b'{"signed":{"_type":"timestamp","version":1' + b"0" * 9000 + b"}}",
    "not a number": b'{"signed":{"_type":"timestamp","version":NaN},"signatures":[]}',
    "lone surrogate": rb'{"signed":{"_type":"\ud800"},"signatures":[]}',
    "too long": b" " * 20_000,
    "signatures are text": b'{"signed":{"_type":"timestamp"},"signatures":"x"}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("name", ["timestamp.json", "2.root.json"])
def test_hostile_metadata_is_refused(world: World, name: str, content: bytes) -> None:
    world.site.instead[f"/metadata/{name}"] = content if name == "timestamp.json" else content * 30
    assert_refused(world, fetch(world.request()), "")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=300), keep=st.integers(0, 600), name=st.sampled_from(["timestamp.json", "2.root.json"])
)
def test_random_bytes_in_metadata_are_refused(world: World, name: str, content: bytes, keep: int) -> None:
    genuine = world.metadata(name if name == "timestamp.json" else "1.root.json").read_bytes()
    hostile = genuine[:keep] + content
    assume(hostile.strip() != genuine)
    world.site.instead = {f"/metadata/{name}": hostile}
    assert_refused(world, fetch(world.request()), "")


def test_what_the_hub_signed_itself_is_fetched_under_the_names_that_are_its_own(world: World) -> None:
    world.repository.add_repair(NEXT_MODEL, name="digits", model_digest=NEWER, guard_digest=GUARD, replaces=OLD)
    result = world.fetch(world.request(target="repaired/digits-2.tflite", sequence=2))
    assert (result.state, result.model_digest) == ("fetched", NEWER)
    assert world.staged.read_bytes() == NEXT_MODEL


# --- attacks with a hint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"target": "digits-7.tflite", "sequence": 7}, "no such target", id="unlisted target"),
        pytest.param({"sequence": 2}, "got sequence 2 in the hint; expected 1 as signed", id="wrong sequence"),
        pytest.param({"running_sequence": 1}, "expected more than 1, which runs", id="same sequence"),
        pytest.param({"running_sequence": 5}, "expected more than 5, which runs", id="downgrade"),
        pytest.param({"running_model_digest": NEWER}, f"replaces {OLD}", id="another running model"),
        pytest.param({"running_model_digest": None}, f"replaces {OLD}", id="no running model"),
        pytest.param({"target": "../../root.json"}, "no way out", id="path traversal"),
        pytest.param({"target": "/etc/passwd"}, "no way out", id="absolute path"),
    ],
)
def test_a_hint_that_the_signed_metadata_do_not_bear_out_is_refused(
    world: World, changes: dict[str, Any], reason: str
) -> None:
    assert_refused(world, world.fetch(world.request(**changes)), reason)
    assert not [path for path in world.site.asked if path.startswith("/targets/")]


def test_a_first_release_never_replaces_a_running_model(world: World) -> None:
    world.repository.add(NEXT_MODEL, name="first", model_digest=NEWER, guard_digest=GUARD, replaces=None)
    result = world.fetch(world.request(target="first-2.tflite", sequence=2))
    assert_refused(world, result, "replaces no model")


def signed_targets(world: World, name: str, custom: object) -> Targets:
    target = TargetFile.from_data(name, MODEL, ["sha256"])
    target.unrecognized_fields["custom"] = custom
    (world.served / "targets" / f"{sha256(MODEL).hexdigest()}.escape.tflite").write_bytes(MODEL)
    return Targets(version=9, expires=now() + timedelta(days=1), targets={name: target})


GENUINE = {"edgeguard": {"sequence": 1, "model_digest": NEW, "guard_digest": GUARD, "replaces": OLD}}


@pytest.mark.parametrize("name", ["../../escape.tflite", "../escape.tflite", "/escape.tflite", "a/../../escape.tflite"])
def test_a_path_out_of_the_folder_is_refused_even_when_the_hub_signed_it(world: World, name: str) -> None:
    world.sign_as_hub(signed_targets(world, name, GENUINE))
    assert_refused(world, world.fetch(world.request(target=name)), "no way out")
    assert not [path for path in world.folder.rglob("escape.tflite") if world.device in path.parents]


@pytest.mark.parametrize(
    "custom", [None, [], {"edgeguard": {}}, {"edgeguard": {**GENUINE["edgeguard"], "sequence": "1"}}]
)
def test_a_signed_target_that_describes_no_release_is_refused(world: World, custom: object) -> None:
    world.sign_as_hub(signed_targets(world, "escape.tflite", custom))
    assert_refused(world, world.fetch(world.request(target="escape.tflite")), "signed description of a release")


def test_a_target_signed_without_sha256_is_refused(world: World) -> None:
    targets = signed_targets(world, "escape.tflite", GENUINE)
    target = TargetFile.from_data("escape.tflite", MODEL, ["sha512"])
    target.unrecognized_fields["custom"] = GENUINE
    targets.targets["escape.tflite"] = target
    (world.served / "targets" / target.get_prefixed_paths()[0]).write_bytes(MODEL)
    world.sign_as_hub(targets)
    assert_refused(world, world.fetch(world.request(target="escape.tflite")), "no SHA-256 in the signed metadata")


# --- trouble that is no attack ----------------------------------------------------------------------------------


def test_a_server_that_is_down_has_failed_and_is_not_refused(world: World) -> None:
    world.site.stop()
    result = world.fetch()
    assert result.state == "failed"
    assert "refused" in result.reason  # the connection was


def unavailable(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(503)


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(MODEL)))
    handler.end_headers()
    handler.wfile.write(MODEL[:100])


@pytest.mark.parametrize("answer", [unavailable, cut_off])
@pytest.mark.parametrize("where", ["/metadata/timestamp.json", "target"])
def test_a_broken_download_has_failed_and_works_when_tried_again(world: World, where: str, answer: Answer) -> None:
    path = f"/targets/{world.first.file_digest}.digits-1.tflite" if where == "target" else where
    world.site.instead[path] = answer
    assert world.fetch().state == "failed"
    assert not world.staged.exists()
    world.site.instead.clear()
    assert world.fetch().state == "fetched"


def test_a_server_that_drips_has_failed_when_the_time_is_up(world: World) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(600):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    world.site.instead["/metadata/timestamp.json"] = drip
    assert world.spawn(world.request(timeout=1.0)) == FetchResult(state="failed", reason="not done after 1 s")


def test_a_trusted_root_that_is_missing_has_failed(world: World) -> None:
    (world.device / "root.json").unlink()
    result = world.fetch()
    assert result.state == "failed"
    assert "root.json" in result.reason


def test_a_trusted_root_that_is_none_trusts_nothing(world: World) -> None:
    (world.device / "root.json").write_bytes(b"{}")
    assert world.fetch().state == "refused"


def test_a_second_fetch_at_the_same_time_fails(world: World) -> None:
    world.fetch()
    with (world.device / "metadata" / LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert world.fetch() == FetchResult(state="failed", reason="another fetch is under way")
    assert world.fetch().state == "fetched"


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json"])
def test_damaged_memory_of_the_metadata_does_not_stop_updates(world: World, name: str) -> None:
    world.fetch()
    (world.device / "metadata" / name).write_bytes(b"\0" * 100)
    assert world.fetch().state == "fetched"


def test_a_folder_that_cannot_be_written_has_failed(world: World) -> None:
    (world.device / "metadata").write_text("a file")
    assert world.fetch().state == "failed"


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[" * 100_000, b'{"metadata_url":"file:///etc"}'])
def test_a_request_that_cannot_be_used_ends_with_code_2_and_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "request.json"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "edgeguard.release.fetch", "--request", str(path)], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert msgspec.json.decode(done.stdout, type=FetchResult).state == "failed"
    assert done.stderr.count(b"\n") == 1


# --- HTTPS ------------------------------------------------------------------------------------------------------


def test_over_https_a_release_comes_only_from_a_server_whose_certificate_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    names = ("-subj", "/CN=hub", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "hub.key", "-out", "hub.pem")
    subprocess.run([needs.program("openssl", "openssl"), *make, *names], cwd=tmp_path, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "hub.pem", tmp_path / "hub.key")
    world = World(tmp_path / "world", serve=Site(tmp_path / "world" / "served", tls=tls))
    try:
        assert world.fetch().state == "failed"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "hub.pem"))
        assert world.fetch().state == "fetched"
    finally:
        world.site.stop()


# --- a crash of the hub -----------------------------------------------------------------------------------------


def test_a_crash_between_any_two_writes_of_a_release_leaves_a_repository_that_serves_and_goes_on(
    worlds: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(40):
        world = worlds()
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                world.release_next()
                done = True
            except ConfigError:
                done = False
        assert fetch(world.request()).state == "fetched"  # the release before
        world.repository = Repository.open(world.served, (*load(world.keys), *load(world.offline)), clock=now)
        if len(world.repository.releases()) == 1:
            assert fetch(world.next_request()).state == "refused"
            world.release_next()
        assert fetch(world.next_request()).model_digest == NEWER
        world.site.stop()
        if done:
            assert step > 10
            return
    pytest.fail("a release takes too many steps")
