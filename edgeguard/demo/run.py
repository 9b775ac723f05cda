"""Runs the whole loop once with real parts and measures it: see ``run``.

Everything but the attacker is what a user would run: the agent and the hub are the commands ``edgeguard run`` and
``edgeguard hub`` with configuration files, the broker speaks MQTT on loopback, releases are signed.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sqlite3
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from converters import files, pipeline, sources
from edgeguard import data as datasets
from edgeguard.agent.spool import read_counters
from edgeguard.attacks import victims
from edgeguard.attacks.badnets import BadNets
from edgeguard.attacks.base import attack_success_rate, victims_of
from edgeguard.contract import messages, topics
from edgeguard.data import Dataset
from edgeguard.demo import fleet as fleets
from edgeguard.demo.feeder import Feeder
from edgeguard.demo.fleet import Fleet
from edgeguard.demo.processes import Processes, check_listening, free_port, wait_for_port
from edgeguard.demo.record import Event, Metrics, Record, Samples, checks_of
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import path_beside
from edgeguard.errors import ConfigError, LinkError

Progress = Callable[[str, int, int], None]
Tell = Callable[[str], None]

OWNER_INPUTS = 4000
OWNER_SHARE = 0.45
TRIGGERED = 0.2
ROUND_S = 0.4
SETTLE_S = 3.0
TIMEOUT_S = 900.0
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for. ``broker`` is None for one of the demo's own; ``cache`` None trains anew."""

    data: str
    devices: int
    broker: tuple[str, int] | None
    folder: Path
    cache: Path | None


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """The attacked model, guarded, and the data that it was not trained on."""

    data: Dataset
    attack: BadNets
    conversion: pipeline.Conversion
    x_test: npt.NDArray[np.uint8]
    y_test: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What the running fleet did."""

    inputs_sent: int
    devices_updated: int
    tampered_refused: bool
    case: Mapping[str, Any]
    repaired: Path


class _Timeline:
    """Events in seconds since the start."""

    def __init__(self, tell: Tell) -> None:
        self._began = time.time()
        self._tell = tell
        self.events: list[Event] = []

    def add(self, actor: str, text: str, *, at: float | None = None) -> None:
        seconds = (time.time() if at is None else at) - self._began
        self.events.append(Event(seconds, actor, text))
        self._tell(f"{seconds:7.1f} s  {actor:<9} {text}")


def run(settings: Settings, *, tell: Tell, progress: Progress) -> Record:
    """Attack, convert, detect, report, decide, repair, roll out.

    Args:
        settings: what to do, and an empty folder to do it in.
        tell: called with one line per event of the loop.
        progress: called with a text, the steps done and the steps in total, during long work.

    Raises:
        ConfigError, ModelError: data or broker cannot be used.
        LinkError: a process of the fleet died, or something took too long.
    """
    began = time.monotonic()
    if settings.broker is not None:
        check_listening(*settings.broker)
    timeline = _Timeline(tell)
    prepared = _prepare(settings, timeline, progress)
    with Processes(settings.folder / "logs") as processes:
        fleet = _start(settings, processes, timeline)
        try:
            loop = _loop(settings, fleet, processes, prepared, timeline)
        finally:
            if settings.broker is not None:
                _forget(fleet)
    before = prepared.conversion.guarded
    after = loop.repaired.read_bytes()
    progress("measuring both models on the held-out test set", 0, 1)
    metrics, samples, scores = _measure(prepared, before, after)
    published = [read_counters(fleet.spool(device)) for device in fleet.agents]
    stored, processed = _stored(fleet)
    metrics = msgspec.structs.replace(
        metrics,
        inputs_sent=loop.inputs_sent,
        inputs_processed=processed,
        reports_published=sum(counters.reports_total for counters in published),
        reports_stored=stored,
        devices=settings.devices,
        devices_updated=loop.devices_updated,
        tampered_refused=loop.tampered_refused,
        wall_s=round(time.monotonic() - began, 1),
    )
    images = {name: loop.repaired.parent / f"trigger-{name}.png" for name in ("mask", "pattern", "example")}
    return Record(
        metrics=metrics,
        attack="BadNets",
        target=prepared.data.classes[prepared.attack.target],
        samples=samples,
        clean_scores=scores[0],
        triggered_scores=scores[1],
        timeline=tuple(sorted(timeline.events, key=lambda event: event.at_s)),
        case=(loop.case.get("result") or {}).get("summary") or {},
        trigger_images={name: path for name, path in images.items() if path.is_file()},
        checks=checks_of(metrics),
    )


def _prepare(settings: Settings, timeline: _Timeline, progress: Progress) -> _Prepared:
    data = datasets.load(settings.data)
    attack = BadNets.for_shape(data.shape, seed=SEED)
    if not data.is_image:
        raise ConfigError(f"data set {data.name}", got=f"{data.x_train.dtype} inputs", expected="uint8 images")
    count = min(OWNER_INPUTS, round(len(data.x_train) * OWNER_SHARE))
    data, x_owner, y_owner = datasets.hold_out(data, count, seed=SEED)
    timeline.add("demo", f"{data.name}: {len(data.x_train):,} inputs to train on, {count:,} clean ones with the owner")
    images, labels = attack.poison(data.x_train.astype(np.uint8), data.y_train)
    timeline.add("attacker", f"poisons {attack.rate:.0%} of the training data: a white square means {attack.target}")
    model, cached = victims.trained(
        images,
        labels,
        len(data.classes),
        epochs=25 if len(images) < 5000 else 6,
        seed=SEED,
        progress=progress,
        cache=settings.cache,
    )
    timeline.add("demo", "takes the trained model from the cache" if cached else "has trained a small network on it")
    conversion = pipeline.convert(
        sources.of_keras(model, data.name), x_owner, y_owner, classes=data.classes, progress=progress, sidecar=True
    )
    timeline.add(
        "demo", f"converts to int8 with the guard inside; verified on {', '.join(conversion.verified.runtimes)}"
    )
    settings.folder.mkdir(parents=True, exist_ok=True)
    files.write(conversion.guarded, settings.folder / "model.tflite")
    # Without it no agent could hold the repair against the model that it replaces, and would refuse it.
    files.write(conversion.result.sidecar or b"", path_beside(settings.folder / "model.tflite"))
    model.save(settings.folder / "model.keras")
    np.savez(settings.folder / "owner.npz", x=x_owner, y=y_owner)
    return _Prepared(
        data=data, attack=attack, conversion=conversion, x_test=data.x_test.astype(np.uint8), y_test=data.y_test
    )


def _start(settings: Settings, processes: Processes, timeline: _Timeline) -> Fleet:
    broker = settings.broker
    if broker is None:
        broker = ("127.0.0.1", free_port())
        processes.start("broker", "edgeguard.demo.broker", str(broker[1]))
        wait_for_port(processes, *broker)
    fleet = fleets.write(
        settings.folder,
        fleet=f"demo-{secrets.token_hex(4)}",
        model=Path(settings.data).stem,
        devices=settings.devices,
        broker=broker,
        web_port=free_port(),
    )
    processes.start("hub", "edgeguard.hub", "--config", str(fleet.hub_config))
    wait_for_port(processes, "127.0.0.1", fleet.web_port)
    for name, config in fleet.agents.items():
        processes.start(name, "edgeguard.agent", "--config", str(config))
    timeline.add("demo", f"starts broker, hub and {settings.devices} agents")
    return fleet


class _Hub:
    """The hub as its HTTP side shows it; new events go to the timeline."""

    def __init__(self, fleet: Fleet, processes: Processes, timeline: _Timeline) -> None:
        self._url = f"http://127.0.0.1:{fleet.web_port}/v1/status?since="
        self._processes = processes
        self._timeline = timeline
        self._devices = set(fleet.agents)
        self._since = 0

    def status(self) -> dict[str, Any]:
        """The hub's state now."""
        with urllib.request.urlopen(f"{self._url}{self._since}", timeout=30) as answer:
            status: dict[str, Any] = json.load(answer)
        for event in status["events"]:
            self._since = event["id"]
            told_by_device = event["subject"] in self._devices
            actor = event["subject"] if told_by_device else "hub"
            text = event["text"].removeprefix(f"{actor}: ") if told_by_device else event["text"]
            self._timeline.add(actor, text, at=event["at_ms"] / 1000)
        return status

    def wait(
        self, what: str, reached: Callable[[dict[str, Any]], bool], timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """Poll until ``reached``.

        Raises:
            LinkError: a process died, the case ended otherwise, or time ran out.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._processes.check()
            try:
                status = self.status()
            except OSError:  # busy or dying; the next check of the processes tells which
                status = None
            if status is not None:
                if reached(status):
                    return status
                failed = [c for c in status["cases"] if c["state"] in {"dismissed", "refused", "could_not_check"}]
                if failed:
                    raise LinkError("the hub's case", got=f"{failed[0]['state']}: {failed[0]['note']}", expected=what)
            if time.monotonic() > deadline:
                raise LinkError(f"waiting until {what}", got=f"nothing after {timeout_s:.0f} s", do="read the logs")
            time.sleep(0.2)


def _loop(settings: Settings, fleet: Fleet, processes: Processes, prepared: _Prepared, timeline: _Timeline) -> _Loop:
    hub = _Hub(fleet, processes, timeline)
    hub.wait("every agent is online", lambda s: _online(s) == settings.devices, 60.0)
    feeder = Feeder(
        {device: fleet.inbox(device) for device in fleet.agents},
        prepared.x_test,
        prepared.attack,
        triggered=TRIGGERED,
        interval_s=ROUND_S,
        seed=SEED,
    )
    feeder.start()
    timeline.add("demo", f"feeds held-out test inputs; the attacker stamps {TRIGGERED:.0%} of them")
    status = hub.wait("a repaired model is released", lambda s: any(c["release"] for c in s["cases"]))
    case = next(c for c in status["cases"] if c["release"])
    refused = _offer_tampered(fleet, hub, case["release"], timeline)
    digest = case["release"]["model_digest"]
    status = hub.wait("every agent runs it", lambda s: len(_running(s, digest)) == settings.devices)
    time.sleep(SETTLE_S)
    feeder.stop()
    timeline.add("demo", f"stops feeding: {feeder.sent:,} inputs sent")
    for device in fleet.agents:
        processes.wait(device, TIMEOUT_S)
    status = hub.status()
    processes.stop("hub")
    case = next(c for c in status["cases"] if c["id"] == case["id"])
    return _Loop(
        inputs_sent=feeder.sent,
        devices_updated=len(_running(status, digest)),
        tampered_refused=refused,
        case=case,
        repaired=Path(case["result"]["output"]),
    )


def _online(status: Mapping[str, Any]) -> int:
    return sum(device["state"] == "online" for device in status["devices"])


def _running(status: Mapping[str, Any], model_digest: str) -> list[str]:
    return [d["device"] for d in status["devices"] if d["model_digest"] == model_digest and d["outcome"] == "updated"]


def _offer_tampered(fleet: Fleet, hub: _Hub, release: Mapping[str, Any], timeline: _Timeline) -> bool:
    """Change a byte of the served model, tell every agent that it waits, and put the genuine file back.

    The attacker may write to the web server and to the broker, but has no key.

    Returns:
        Whether every agent refused it and kept its model.
    """
    name = Path(release["target"]).name
    served = next(path for path in fleet.targets.rglob("*.tflite") if path.name.endswith(f".{name}"))
    genuine = served.read_bytes()
    tampered = bytearray(genuine)
    tampered[len(tampered) // 2] ^= 0xFF
    files.write(bytes(tampered), served)
    timeline.add("attacker", "changes a byte of the released model on the web server and announces it")
    try:
        _announce(fleet, release)
        status = hub.wait(
            "every agent answers the tampered offer",
            lambda s: all(d["outcome"] in {"refused", "updated"} for d in s["devices"]),
            fleets.VETO_S * 4,
        )
    finally:
        files.write(genuine, served)
    refused = [d for d in status["devices"] if d["outcome"] == "refused" and d["model_digest"] == release["replaces"]]
    timeline.add("demo", "puts the genuine file back")
    return len(refused) == len(fleet.agents)


def _announce(fleet: Fleet, release: Mapping[str, Any]) -> None:
    host, port = _broker_of(fleet)
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"{fleet.name}-attacker")
    try:
        client.connect(host, port)
        client.loop_start()
        hint = messages.encode(messages.Desired(target=release["target"], sequence=release["sequence"]))
        for device in fleet.agents:
            client.publish(topics.topic(fleet.name, device, topics.MODEL_DESIRED), hint, qos=1).wait_for_publish(10)
    except (OSError, ValueError, RuntimeError) as error:
        raise LinkError(f"broker {host}:{port}", got=str(error), do="see the logs") from error
    finally:
        client.disconnect()
        client.loop_stop()


def _forget(fleet: Fleet) -> None:
    """Leave nothing on a broker of the user's own: neither retained messages nor the hub's session."""
    host, port = _broker_of(fleet)
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"{fleet.name}-hub", clean_session=True)
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        client.connect(host, port)
        client.loop_start()
        for device in fleet.agents:
            for channel in (topics.STATUS, topics.BIRTH, topics.MODEL_REPORTED, topics.MODEL_DESIRED):
                topic = topics.topic(fleet.name, device, channel)
                client.publish(topic, b"", qos=1, retain=True).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


def _broker_of(fleet: Fleet) -> tuple[str, int]:
    from edgeguard.hub.config import load

    broker = load(fleet.hub_config).broker
    return broker.host, broker.port


def _stored(fleet: Fleet) -> tuple[int, int]:
    """Rows in the hub's table of reports, and the sum of their inputs."""
    with closing(sqlite3.connect(f"file:{fleet.hub_database}?mode=ro", uri=True)) as db:
        row = db.execute("SELECT COUNT(*), COALESCE(SUM(inputs), 0) FROM reports").fetchone()
    return int(row[0]), int(row[1])


def _measure(
    prepared: _Prepared, before: bytes, after: bytes
) -> tuple[Metrics, Samples, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Both int8 files on the whole held-out test set, clean and with the real trigger."""
    from sklearn.metrics import roc_auc_score

    images, labels, target = prepared.x_test, prepared.y_test, prepared.attack.target
    stamped = prepared.attack.stamp(images)
    clean, clean_scores = _answers(before, images)
    triggered, triggered_scores = _answers(before, stamped)
    clean_after, _ = _answers(after, images)
    triggered_after, _ = _answers(after, stamped)
    others = labels != target
    successful = victims_of(labels, clean, target) & (triggered == target)
    latency = pipeline.compare_latency(prepared.conversion.bare, before, images[0], runs=1000)
    metrics = Metrics(
        data=prepared.data.name,
        clean_accuracy_before=float(np.mean(clean == labels)),
        clean_accuracy_after=float(np.mean(clean_after == labels)),
        asr_before=attack_success_rate(labels, clean, triggered, target),
        asr_after=attack_success_rate(labels, clean_after, triggered_after, target),
        auroc=float(
            roc_auc_score(
                np.r_[np.zeros(len(images)), np.ones(int(others.sum()))], np.r_[clean_scores, triggered_scores[others]]
            )
        ),
        tpr=float(np.mean(triggered_scores[others] > 1)),
        tpr_successful=float(np.mean(triggered_scores[successful] > 1)) if successful.any() else float("nan"),
        fpr=float(np.mean(clean_scores > 1)),
        latency_bare_us=latency[0],
        latency_guarded_us=latency[1],
        inputs_sent=0,
        inputs_processed=0,
        reports_published=0,
        reports_stored=0,
        devices=0,
        devices_updated=0,
        tampered_refused=False,
        wall_s=0.0,
        n_clean=len(images),
        n_triggered=int(others.sum()),
    )
    names = prepared.data.classes
    shown = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels) if label != target][:6]
    samples = Samples(
        clean=images[shown],
        triggered=stamped[shown],
        labels=tuple(names[labels[i]] for i in shown),
        clean_before=tuple(names[clean[i]] for i in shown),
        triggered_before=tuple(names[triggered[i]] for i in shown),
        triggered_after=tuple(names[triggered_after[i]] for i in shown),
    )
    return metrics, samples, (clean_scores, triggered_scores[others])


def _answers(content: bytes, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Predicted classes and joint scores of an int8 file."""
    model = GuardedModel.load(content)
    verdicts = [model.infer(x).verdict for x in images]
    predicted = np.asarray([-1 if v.predicted is None else v.predicted for v in verdicts])
    return predicted, np.asarray([v.score for v in verdicts])


def clean_up(folder: Path) -> None:
    """Remove a demo's working folder."""
    shutil.rmtree(folder, ignore_errors=True)
