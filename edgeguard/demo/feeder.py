"""Feeds each device its own stream of held-out test inputs, a share of them triggered, and counts what it sent.

Batches are handed over by renaming a finished file into the agent's folder, so that an agent never sees half of one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgeguard.attacks.base import EMPTY, Attack, Images

BATCH = 32
MAX_WAITING = 4


class Feeder:
    """A thread that keeps the devices busy until it is stopped.

    Args:
        folders: the source folder of each device.
        inputs: test inputs; each device gets its own part of them, again and again in a new order.
        attack: stamps the trigger.
        triggered: the share of inputs that carry it.
        interval_s: pause between two rounds.
        seed: of order and choice.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        inputs: Images,
        attack: Attack,
        *,
        triggered: float,
        interval_s: float,
        seed: int,
    ) -> None:
        self._folders = dict(folders)
        self._attack = attack
        self._triggered = triggered
        self._interval_s = interval_s
        self._rng = np.random.default_rng(seed)
        order = self._rng.permutation(len(inputs))
        parts: Sequence[np.ndarray[tuple[int], np.dtype[np.intp]]] = np.array_split(order, len(self._folders))
        self._parts = {name: inputs[part] for name, part in zip(self._folders, parts, strict=True)}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._number = 0
        self._error: Exception | None = None
        self.sent = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current round and mark the end of each stream.

        Raises:
            OSError: a batch could not be written, for example because the disk is full.
        """
        self._stopping.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        for folder in self._folders.values():
            (folder / "end").touch()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                for name, folder in self._folders.items():
                    if len(list(folder.glob("*.npy"))) < MAX_WAITING:
                        self._send(folder, self._batch(self._parts[name]))
                self._stopping.wait(self._interval_s)
        except OSError as error:
            self._error = error

    def _batch(self, images: Images) -> Images:
        chosen = images[self._rng.choice(len(images), size=min(BATCH, len(images)), replace=False)]
        stamped = self._rng.random(len(chosen)) < self._triggered
        batch = chosen.copy()
        if stamped.any():
            batch[stamped] = self._attack.stamp(chosen[stamped], EMPTY)
        return batch

    def _send(self, folder: Path, batch: Images) -> None:
        self._number += 1
        partial = folder / f".{self._number:08d}.tmp"
        with partial.open("wb") as file:
            np.save(file, batch)
        partial.replace(folder / f"{self._number:08d}.npy")
        self.sent += len(batch)
