"""How much one device may bring: token buckets, one for each key, in bounded memory. Pure.

Rules enforced here:

* a bucket fills at a steady rate up to its burst; what costs more than it holds does not pass and takes nothing, so
  that one large message does not shut out the small ones behind it;
* a message passes only when both its count and its bytes do;
* a bucket that is full again is forgotten: it is as good as a new one. Where too many are in use all the same, the
  one that was used longest ago goes, which lets its device have a burst more;
* there is no thread and no timer: a bucket fills when it is asked. A clock that jumps back adds nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

KEYS = 65_536
KNOWN = 1 << 18
"""Buckets at most: about 15 MiB."""


class Limiter:
    """Token buckets by key.

    Args:
        rate: messages a second that may pass for ever.
        burst: messages that may pass at once, at least 1.
        bytes_rate: bytes a second, None for any number.
        bytes_burst: bytes at once.
        keys: the most buckets that are kept.

    Example:
        >>> limiter = Limiter(rate=1.0, burst=2)
        >>> [limiter.passes("d1", now_s=0.0) for _ in range(3)]
        [True, True, False]
    """

    def __init__(
        self,
        *,
        rate: float,
        burst: float,
        bytes_rate: float | None = None,
        bytes_burst: float = 0.0,
        keys: int = KEYS,
    ) -> None:
        self._rate, self._burst = rate, burst
        self._bytes_rate, self._bytes_burst = bytes_rate or 0.0, bytes_burst
        self._counts_bytes = bytes_rate is not None
        self._keys = keys
        self._buckets: OrderedDict[Hashable, tuple[float, float, float]] = OrderedDict()
        """Messages left, bytes left, and when that was, the bucket that was used last at the end."""

    def passes(self, key: Hashable, *, now_s: float, size: int = 0) -> bool:
        """Whether a message of ``size`` bytes may pass now, and if so, take it out of the bucket of ``key``.

        ``now_s`` is a clock of any origin.
        """
        found = self._buckets.get(key)
        if found is None:
            messages, content = self._burst, self._bytes_burst
            self._make_room(now_s)
        else:
            messages, content, at_s = found
            passed_s = max(now_s - at_s, 0.0)
            messages = min(messages + passed_s * self._rate, self._burst)
            content = min(content + passed_s * self._bytes_rate, self._bytes_burst)
        passes = messages >= 1.0 and (not self._counts_bytes or content >= size)
        if passes:
            messages, content = messages - 1.0, content - size
        self._buckets[key] = (messages, content, now_s)
        self._buckets.move_to_end(key)
        return passes

    def __len__(self) -> int:
        return len(self._buckets)

    def _make_room(self, now_s: float) -> None:
        """Forget from the longest unused on: one that is full again, and one in any case where there is no room."""
        while self._buckets:
            key, (messages, content, at_s) = next(iter(self._buckets.items()))
            passed_s = now_s - at_s
            full = messages + passed_s * self._rate >= self._burst and (
                content + passed_s * self._bytes_rate >= self._bytes_burst
            )
            if not full and len(self._buckets) < self._keys:
                return
            del self._buckets[key]


class Novelties:
    """How often what one device says may be something that it never said before: each costs rows that stay.

    Args:
        rate: new things a second of one device, for ever.
        burst: new things at once.
        known: so many are remembered, whoever said them; the longest unused are forgotten first.

    Example:
        >>> boots = Novelties(rate=0.0, burst=1)
        >>> [boots.passes("d1", boot, now_s=0.0) for boot in ("a", "a", "b")]
        [True, True, False]
    """

    def __init__(self, *, rate: float, burst: float, known: int = KNOWN) -> None:
        self._new = Limiter(rate=rate, burst=burst)
        self._known: OrderedDict[int, None] = OrderedDict()
        self._most = known

    def passes(self, device: str, thing: Hashable, *, now_s: float) -> bool:
        """Whether it is known of this device, or may be new."""
        key = hash((device, thing))  # salted for each process: nobody can choose what collides
        if key in self._known:
            self._known.move_to_end(key)
            return True
        if not self._new.passes(device, now_s=now_s):
            return False
        self._known[key] = None
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        return True
