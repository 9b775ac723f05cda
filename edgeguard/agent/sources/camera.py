"""Inputs from a camera, through OpenCV: a device, a video file or a stream.

Rules enforced here:

* frames are taken in a thread of their own: a camera that hangs does not stop the other sources;
* of a live camera only the newest frame counts, older ones are dropped and counted; of a file every frame is taken;
* a camera that fails is opened again after ``RETRY_S``; a file that ends, ends the source.

OpenCV is imported when a camera is configured, not before: ``pip install 'edgeguard[camera]'``.
"""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.agent.sources.base import Answer, Item, Refused
from edgeguard.agent.sources.handover import Handover
from edgeguard.contract.guard import ModelInput
from edgeguard.detection import images
from edgeguard.errors import ConfigError

NAME = "camera"
RETRY_S = 5.0

log = logging.getLogger(__name__)


class CameraSource:
    """One camera.

    Args:
        device: a number (``0`` is ``/dev/video0``), a path or a URL, as OpenCV takes it.
        expected: what the model takes: an image.
        per_second: at most so many frames of a live camera are run; None for all that come.

    Raises:
        ConfigError: OpenCV is not installed, or the camera or file cannot be opened.
        ModelError: the model does not take images.
    """

    name = NAME

    def __init__(self, device: int | str, expected: ModelInput, *, per_second: float | None = None) -> None:
        try:
            import cv2
        except ImportError as error:
            raise ConfigError(
                "[sources.camera]", got="no OpenCV", expected="cv2", do="pip install 'edgeguard[camera]'"
            ) from error
        images.check(expected)
        self._cv2: Any = cv2
        self._device = device
        self._live = not (isinstance(device, str) and Path(device).is_file())
        self._expected = expected
        self._wait_s = 0.0 if per_second is None else 1.0 / per_second
        self._handover: Handover[npt.NDArray[np.uint8]] = Handover(1 if self._live else 4)
        self._frames = self._bad = 0
        self._last = threading.Event()
        self._selector: selectors.BaseSelector | None = None
        self._capture = self._opened()
        if self._capture is None:
            raise ConfigError(
                f"camera {device}", got="no picture", expected="a camera or video", do="check [sources.camera] device"
            )
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)

    @property
    def dropped(self) -> int:
        """Frames that were overtaken by newer ones, or are no pictures."""
        return self._bad + self._handover.dropped

    @property
    def ended(self) -> bool:
        """True once a file's last frame was taken."""
        return self._last.is_set()

    def open(self, selector: selectors.BaseSelector) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        self._selector = selector
        selector.register(self._handover.descriptor, selectors.EVENT_READ, self)
        self._thread.start()

    def ready(self, key: selectors.SelectorKey, mask: int) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        self._handover.drain()

    def take(self) -> Item | Refused | None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        finished = not self._thread.is_alive()
        pixels = self._handover.take()
        if pixels is None:
            if finished and self._thread.ident is not None:
                self._last.set()
            return None
        self._frames += 1
        try:
            x = images.fit(pixels, self._expected)
        except (ValueError, TypeError) as error:
            self._bad += 1
            log.warning("camera %s: a frame of shape %s is dropped: %s", self._device, pixels.shape, error)
            return Refused.NO_INPUT
        return Item(source=NAME, name=str(self._frames), inputs=x[np.newaxis])

    def answer(self, answer: Answer) -> None:
        """Nobody waits: results stand in ``[results]``."""

    def counted(self, names: Iterable[str]) -> None:
        """Nothing to let go of."""

    def close(self) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`. A camera that hangs is left to the process's end."""
        if self._selector is not None:
            self._selector.unregister(self._handover.descriptor)
        self._handover.close()
        if self._thread.ident is not None:
            self._thread.join(1.0)

    def _opened(self) -> Any:
        capture = self._cv2.VideoCapture(self._device)
        return capture if capture.isOpened() else None

    def _read(self) -> Any:
        """The next picture, or None. Whatever OpenCV raises is no picture."""
        try:
            return self._capture.read()[1] if self._capture is not None else None
        except Exception as error:
            log.warning("camera %s: %s", self._device, error)
            return None

    def _run(self) -> None:
        while True:
            started = time.monotonic()
            picture = self._read()
            if picture is not None:
                # OpenCV gives blue, green, red.
                pixels = np.ascontiguousarray(picture[..., ::-1]) if picture.ndim == 3 else picture
                if not self._handover.put(pixels, wait=not self._live):
                    break
            elif not self._live:
                break
            else:
                log.warning("camera %s gives no picture; trying again in %g s", self._device, RETRY_S)
                time.sleep(RETRY_S)
                self._capture = self._opened()
            rest = self._wait_s - (time.monotonic() - started)
            if rest > 0 and self._live:
                time.sleep(rest)
        if self._capture is not None:
            self._capture.release()
