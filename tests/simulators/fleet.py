"""Devices as the hub sees them: messages that hold together, and a publisher that keeps what is not acknowledged."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from typing import Any

import flatbuffers
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard.contract import topics
from edgeguard.contract.guard import (
    METADATA_NAME,
    Calibration,
    Detector,
    Environment,
    GuardMetadata,
    ModelInput,
    Tap,
    encode_metadata,
)
from edgeguard.contract.messages import (
    Ack,
    ActivationMean,
    Alert,
    Birth,
    Desired,
    LabelCount,
    LabelEvidence,
    Message,
    Report,
    Reported,
    Status,
    decode,
    encode,
)
from edgeguard.contract.scores import BINS
from edgeguard.hub.ingest import Accepted

MODEL, GUARD, OTHER = "a" * 64, "b" * 64, "c" * 64
BOOT = "00000000000000ab"
WIDTH = 4


def report(
    seq: int = 1,
    *,
    boot: str = BOOT,
    model: str = MODEL,
    guard: str = GUARD,
    counts: Sequence[tuple[int, int, int]] = ((0, 10, 1), (1, 20, 0)),
    unchecked: int = 0,
    shift: float = 3.0,
    width: int = WIDTH,
) -> Report:
    """A report that adds up. ``counts``: label, inputs, flagged; flagged inputs move the last channel by ``shift``."""
    flagged = sum(f for _, _, f in counts)
    clean = sum(n for _, n, _ in counts) - flagged
    usual = tuple(1.0 + i for i in range(width))
    evidence = tuple(
        LabelEvidence(
            label=label,
            flagged=f,
            unflagged=n - f,
            flagged_mean=(*usual[:-1], usual[-1] + shift),
            unflagged_mean=usual if n > f else (),
            unflagged_std=(0.5,) * width if n > f else (),
        )
        for label, n, f in counts
        if f
    )
    return Report(
        boot=boot,
        seq=seq,
        model_digest=model,
        guard_digest=guard,
        started_ms=1000 * seq,
        ended_ms=1000 * seq + 500,
        inputs=clean + flagged + unchecked,
        unchecked=unchecked,
        labels=tuple(LabelCount(label=label, inputs=n, flagged=f) for label, n, f in counts),
        histogram=(clean, *(0 for _ in range(BINS - 2)), flagged),
        evidence=evidence,
        activation=ActivationMean(inputs=clean, mean=usual) if clean else None,
    )


def alert(seq: int) -> Alert:
    """An alert of the first label."""
    return Alert(
        boot=BOOT, seq=seq, model_digest=MODEL, guard_digest=GUARD, at_ms=1, label=0, score=2.0, scores={},
    )  # fmt: skip


def accepted(message: Message, device: str = "d1") -> Accepted:
    """What ingest makes of a message of a device."""
    return Accepted(device=device, message=message, payload=encode(message))


def status(state: Any = "online", *, session: int = 1, boot: str = BOOT) -> Status:
    """A device's status."""
    return Status(state=state, session=session, boot=boot)


def birth(*, session: int = 1, model: str = MODEL, guard: str = GUARD, sequence: int = 0, boot: str = BOOT) -> Birth:
    """A device's birth."""
    return Birth(
        session=session,
        boot=boot,
        edgeguard="0",
        python="3",
        board="test",
        runtime="test",
        runtime_version="0",
        model_digest=model,
        guard_digest=guard,
        file_digest=OTHER,
        sequence=sequence,
        detectors=("linf",),
    )


def reported(
    state: Any,
    *,
    session: int = 1,
    model: str = MODEL,
    guard: str = GUARD,
    sequence: int = 0,
    desired: int | None = None,
) -> Reported:
    """What a device says of its model."""
    return Reported(
        session=session,
        boot=BOOT,
        state=state,
        model_digest=model,
        guard_digest=guard,
        file_digest=OTHER,
        sequence=sequence,
        desired_sequence=desired,
    )


def guard_metadata(
    *, model: str = MODEL, guard: str = GUARD, classes: int = 2, fpr_upper: float = 0.03
) -> GuardMetadata:
    """Metadata of a model with two tapped layers of two channels each."""
    return GuardMetadata(
        model_digest=model,
        guard_digest=guard,
        detectors=(Detector(name="linf", threshold=1.0),),
        taps=(
            Tap(tensor="early", source_layer="relu1", kind="linf", offset=0, channels=2),
            Tap(tensor="late", source_layer="relu2", kind="l1", offset=2, channels=2),
        ),
        class_output=0,
        classes=tuple(f"class {i}" for i in range(classes)),
        input=ModelInput(shape=(8, 8, 1), dtype="uint8", range=(0.0, 255.0)),
        fpr=0.01,
        fpr_upper=(fpr_upper,) * classes,
        score_to_p=(),
        calibration=Calibration(n_fit=100, n_threshold=100, digest=OTHER),
        environment=Environment(runtime="test", version="0", threads=1, cpu="test"),
    )


def guarded_file(metadata: GuardMetadata) -> bytes:
    """A TFLite flatbuffer that holds guard metadata and no graph: all that the hub reads of a model."""
    builder = flatbuffers.Builder(0)
    content = builder.CreateByteVector(encode_metadata(metadata))
    name = builder.CreateString(METADATA_NAME)
    buffers = []
    for data in (None, content):
        builder.StartObject(1)
        if data is not None:
            builder.PrependUOffsetTRelativeSlot(0, data, 0)
        buffers.append(builder.EndObject())
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependUint32Slot(1, 1, 0)
    entry = builder.EndObject()
    vectors = []
    for items in (buffers, [entry]):
        builder.StartVector(4, len(items), 4)
        for item in reversed(items):
            builder.PrependUOffsetTRelative(item)
        vectors.append(builder.EndVector())
    builder.StartObject(8)
    builder.PrependUint32Slot(0, 3, 0)
    builder.PrependUOffsetTRelativeSlot(4, vectors[0], 0)
    builder.PrependUOffsetTRelativeSlot(6, vectors[1], 0)
    builder.Finish(builder.EndObject(), file_identifier=b"TFL3")
    return bytes(builder.Output())


class Publisher:
    """A device that keeps each message until the hub acknowledges it, and sends what it keeps again and again.

    It connects anew whenever the connection is lost. Use as a context.
    """

    def __init__(self, port: int, device: str, *, fleet: str = "test", resend_s: float = 1.0) -> None:
        self.device = device
        self.acks: list[Ack] = []
        self.hints: list[Desired] = []
        self.withdrawn = 0
        """How often it was told that no hint stands."""
        self._port = port
        self._fleet = fleet
        self._resend_s = resend_s
        self._kept: dict[tuple[str, int], tuple[str, bytes]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"publisher-{device}", protocol=mqtt.MQTTv311)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._thread = threading.Thread(target=self._resend, daemon=True)

    def __enter__(self) -> Publisher:
        self._client.connect_async("127.0.0.1", self._port)
        self._client.loop_start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(5)
        self._client.disconnect()
        self._client.loop_stop()

    def keep(self, message: Report) -> None:
        """Send a report, and again until it is acknowledged."""
        self.keep_raw(message.boot, message.seq, encode(message))

    def keep_raw(self, boot: str, seq: int, payload: bytes) -> None:
        """The same for any payload."""
        with self._lock:
            self._kept[boot, seq] = (topics.REPORT, payload)
        self.send(topics.REPORT, payload)

    def send(self, channel: str, content: Message | bytes, *, retain: bool = False) -> None:
        """Send once."""
        payload = encode(content) if isinstance(content, Message) else content
        self._client.publish(topics.topic(self._fleet, self.device, channel), payload, qos=1, retain=retain)

    def connected(self) -> bool:
        """True while it is connected."""
        return bool(self._client.is_connected())

    @property
    def waiting(self) -> int:
        """How many messages are not acknowledged."""
        with self._lock:
            return len(self._kept)

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        for channel in (topics.ACK, topics.MODEL_DESIRED):
            client.subscribe(topics.topic(self._fleet, self.device, channel), qos=1)

    def _on_message(self, _client: Any, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        if message.topic.endswith(f"/{topics.MODEL_DESIRED}"):
            if message.payload:
                self.hints.append(decode(Desired, bytes(message.payload)))
            else:
                self.withdrawn += 1
            return
        ack = decode(Ack, bytes(message.payload))
        with self._lock:
            self.acks.append(ack)
            for boot, seq in list(self._kept):
                if boot == ack.boot and seq <= ack.through_seq and seq not in ack.gaps:
                    del self._kept[boot, seq]

    def _resend(self) -> None:
        while not self._stopping.wait(self._resend_s):
            if not self._client.is_connected():
                continue
            with self._lock:
                again = list(self._kept.values())[:64]
            for channel, payload in again:
                self.send(channel, payload)


def wait_until(condition: Callable[[], object], *, timeout_s: float = 30.0) -> None:
    """Wait for ``condition`` to come true; fail when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout_s:g} s"
        time.sleep(0.05)


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body of an HTTP GET from this machine; the path goes out as it stands."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
