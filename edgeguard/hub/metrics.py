"""What a hub counts, for Prometheus.

Rules enforced here:

* every name begins with ``edgeguard_hub_``, and every series is there from the start, at zero;
* what the web server answers is counted here as it happens. When somebody asks, what came over MQTT is asked of those
  that take it, and what the fleet adds up to of the database. Where that does not answer, its lines are missing, and
  ``edgeguard_hub_database_up`` says why: unknown is not zero;
* a registry of its own: two hubs in one process do not add up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from edgeguard.hub.listener import Totals
from edgeguard.hub.store import reason

PREFIX = "edgeguard_hub"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Census:
    """What the database adds up to.

    Attributes:
        counts: as :meth:`edgeguard.hub.store.Store.counts` names them.
        devices: how many devices by state.
        cases: how many records by state.
        jobs: how many jobs by state.
    """

    counts: Mapping[str, int]
    devices: Mapping[str, int] = field(default_factory=dict)
    cases: Mapping[str, int] = field(default_factory=dict)
    jobs: Mapping[str, int] = field(default_factory=dict)


_COUNTED = {
    "reports": "Reports stored.",
    "inputs": "Inputs that the stored reports count.",
    "unchecked": "Inputs that no guard looked at.",
    "flagged": "Inputs that a guard flagged.",
    "alerts": "Alerts stored.",
    "dead_letters": "Messages that could not be accepted.",
}
_BY_STATE = {
    "devices": "Devices by what they last said of themselves.",
    "cases": "Suspicions and cases by state.",
    "jobs": "Inspections and repairs by state.",
}


class Metrics:
    """The counters of one hub. Every method may be called from any thread.

    Args:
        census: reads the database; raises SQLAlchemyError where it does not answer.
        ingested: what came, summed over the processes that take reports.
        connected: whether the broker is.
        waiting: deliveries that were received and not yet stored.
    """

    def __init__(
        self,
        census: Callable[[], Census],
        *,
        ingested: Callable[[], Totals] = Totals,
        connected: Callable[[], bool] = lambda: False,
        waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = _counter(registry, "requests", "Answers of the web server by status.", "status")
        self._denied = _counter(registry, "authentication_failures", "Requests with a wrong token, or without one.")
        self._streams = Gauge(f"{PREFIX}_streams", "Clients that follow the events.", registry=registry)
        connection = Gauge(f"{PREFIX}_connected", "1 while the broker is connected.", registry=registry)
        connection.set_function(lambda: float(connected()))
        queue = Gauge(f"{PREFIX}_queue", "Deliveries received and not yet stored.", registry=registry)
        queue.set_function(lambda: float(waiting()))
        registry.register(_Ingest(ingested))
        registry.register(_Database(census))

    def answered(self, status: int) -> None:
        """The web server answered."""
        self._requests.labels(str(status)).inc()

    def denied(self) -> None:
        """A request had a wrong token, or none where one was needed."""
        self._denied.inc()

    def streams(self, change: int) -> None:
        """So many clients more follow the events."""
        self._streams.inc(change)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _Ingest(Collector):
    """What the processes that take reports count."""

    def __init__(self, ingested: Callable[[], Totals]) -> None:
        self._ingested = ingested

    def collect(self) -> Iterable[Metric]:
        """The values now."""
        totals = self._ingested()
        messages = CounterMetricFamily(f"{PREFIX}_messages", "Messages by what became of them.", labels=["outcome"])
        messages.add_metric(["accepted"], totals.taken)
        messages.add_metric(["rejected"], totals.rejected)
        messages.add_metric(["rate_limited"], totals.limited)
        yield messages
        for name, text, value in (
            ("batch_seconds", "Time to store a batch.", totals.stored_s),
            ("commit_lag_seconds", "From the arrival of a batch's oldest message to its commit.", totals.lag_s),
        ):
            yield SummaryMetricFamily(f"{PREFIX}_{name}", text, count_value=totals.batches, sum_value=value)


class _Database(Collector):
    """What is read when somebody asks."""

    def __init__(self, census: Callable[[], Census]) -> None:
        self._census = census

    def describe(self) -> Iterable[Metric]:
        """The names, without asking the database."""
        return _families(Census(counts=dict.fromkeys(_COUNTED, 0)))

    def collect(self) -> Iterable[Metric]:
        """The values now."""
        try:
            census: Census | None = self._census()
        except SQLAlchemyError as error:
            log.warning("no figures from the database: %s", reason(error))
            census = None
        return _families(census)


def _families(census: Census | None) -> Iterator[Metric]:
    yield GaugeMetricFamily(f"{PREFIX}_database_up", "1 while the database answers.", value=float(census is not None))
    if census is None:
        return
    for name, text in _COUNTED.items():
        yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=census.counts[name])
    for name, text in _BY_STATE.items():
        family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["state"])
        by_state: Mapping[str, int] = getattr(census, name)
        for state, count in sorted(by_state.items()):
            family.add_metric([state], count)
        yield family


def _counter(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Counter:
    return Counter(f"{PREFIX}_{name}", text, labels, registry=registry)
