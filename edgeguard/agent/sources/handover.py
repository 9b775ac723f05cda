"""A bounded place between a thread that receives inputs and the agent's loop, which it wakes.

Rules enforced here:

* what is full drops the oldest, or makes the thread wait: whoever makes it chooses, nothing is unbounded;
* the loop is woken through a descriptor, so that it never polls.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Handover(Generic[T]):
    """Holds at most ``size`` things. ``dropped`` counts what was overtaken."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._things: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.dropped = 0
        self.descriptor, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def put(self, thing: T, *, wait: bool) -> bool:
        """Hand over one thing; where it is full, wait for room or drop the oldest. False once it is closed."""
        with self._changed:
            while wait and len(self._things) >= self._size and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            if len(self._things) >= self._size:
                self._things.popleft()
                self.dropped += 1
            self._things.append(thing)
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake, b"\0")
            return True

    def take(self) -> T | None:
        """The oldest thing, or None."""
        with self._changed:
            if not self._things:
                return None
            self._changed.notify()
            return self._things.popleft()

    def drain(self) -> None:
        """The loop was woken."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.descriptor, 4096):
                pass

    def close(self) -> None:
        """Nothing is taken over any more; a thread that waits goes on."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            os.close(self._wake)
            os.close(self.descriptor)
