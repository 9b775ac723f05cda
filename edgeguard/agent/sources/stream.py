"""Inputs in frames: from programs on this machine over a Unix socket, or from standard input.

Rules enforced here:

* a program that sends faster than the model runs is not read any further once ``WAITING`` of its frames wait: its own
  writes block, nothing is dropped. The same where it does not read its results;
* programs take turns, one frame each; what one of them sends cannot stop another, and a broken frame ends only its
  own connection;
* the socket has mode 0660 and, where there is one, the group ``edgeguard``. Who may write to it may show the model
  inputs and add scores to this device's reports, nothing else.

Results go back over the socket in the order of the inputs. Those of standard input stand in ``[results]`` only.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import selectors
import socket
import stat
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edgeguard.agent.sources.base import Answer, Item, Refused, Told, array_of, most_bytes
from edgeguard.contract import frames
from edgeguard.contract.guard import ModelInput
from edgeguard.errors import ConfigError, EdgeGuardError, LinkError, ModelError
from firmware_bridge.systemd import GROUP

WAITING = 32
"""Frames of one program that may wait; then it is not read for a while."""
UNREAD = 4 << 20
"""Bytes of results that a program may leave unread; then it is not read for a while."""
CONNECTIONS = 16
_piece = memoryview(bytearray(256 << 10))
"""What every read goes to, one at a time: a new piece of this size for each would cost its pages each time."""

log = logging.getLogger(__name__)


class _Peer:
    """One stream: frames in, frames out. Never waits."""

    def __init__(self, read_fd: int, max_body: int, connection: socket.socket | None = None) -> None:
        self.fd = read_fd
        self.connection = connection
        self.waiting: deque[tuple[frames.AnyFrame, bytes]] = deque()
        self.unsent = bytearray()
        self.ended = False
        self._reader = frames.Reader(max_body)

    @property
    def mask(self) -> int:
        """What to wait for; 0 for nothing."""
        full = len(self.waiting) >= WAITING or len(self.unsent) > UNREAD
        reading = 0 if full or self.ended else selectors.EVENT_READ
        return reading | (selectors.EVENT_WRITE if self.unsent else 0)

    def read(self) -> None:
        """Take what is there. Raises LinkError where it is not frames, or ends within one."""
        try:
            size = os.readv(self.fd, [_piece])
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkError("stream", got=error.strerror) from error
        if not size:
            self.ended = True
            if not self._reader.empty:
                raise LinkError("stream", got="an end within a frame", expected="whole frames")
            return
        self.waiting.extend(self._reader.feed(_piece[:size]))

    def send(self, content: bytes) -> None:
        """Send what goes at once, keep the rest."""
        if self.connection is None:
            return
        if not self.unsent:
            content = content[self._sent(content) :]
        if content:
            self.unsent += content

    def flush(self) -> None:
        """Send what is kept, as far as it goes."""
        if self.unsent:
            del self.unsent[: self._sent(self.unsent)]

    def _sent(self, content: bytes | bytearray) -> int:
        """How many bytes went."""
        assert self.connection is not None
        try:
            return self.connection.send(content)
        except BlockingIOError:
            return 0
        except OSError:
            # Nobody is there to read it; the next read says so too.
            return len(content)


class StreamSource:
    """Frames from any number of streams. Make one with :class:`SocketSource` or :class:`StdinSource`."""

    name = "stream"

    def __init__(self, expected: ModelInput) -> None:
        self.dropped = 0
        self.ended = False
        self._expected = expected
        self._peers: dict[int, _Peer] = {}
        self._turns: deque[_Peer] = deque()
        self._masks: dict[int, int] = {}
        self._selector: selectors.BaseSelector | None = None

    def open(self, selector: selectors.BaseSelector) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        self._selector = selector

    def ready(self, key: selectors.SelectorKey, mask: int) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        peer = self._peers.get(key.fd)
        if peer is None:
            return
        if mask & selectors.EVENT_WRITE:
            peer.flush()
        if mask & selectors.EVENT_READ:
            self._read(peer)
        self._watch(peer)

    def take(self) -> Item | Told | Refused | None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        for _ in range(len(self._turns)):
            peer = self._turns[0]
            self._turns.rotate(-1)
            if peer.waiting:
                frame, body = peer.waiting.popleft()
                taken = self._understood(peer, frame, body)
                if self._masks.get(peer.fd) != peer.mask:
                    self._watch(peer)
                return taken
            if peer.ended and not peer.unsent:
                self._drop(peer)
        return None

    def answer(self, answer: Answer) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        peer = answer.item.sender
        if isinstance(peer, _Peer) and peer.connection is not None:
            peer.send(frames.encode(answer.result, answer.body))
            if peer.unsent:
                self._watch(peer)

    def counted(self, names: Iterable[str]) -> None:
        """Nothing to let go of: a frame was taken off the stream when it was read."""

    def close(self) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        for peer in list(self._peers.values()):
            self._drop(peer)

    def add(self, peer: _Peer) -> None:
        """One more stream."""
        self._peers[peer.fd] = peer
        self._turns.append(peer)
        self._watch(peer)

    def _read(self, peer: _Peer) -> None:
        try:
            peer.read()
        except LinkError as error:
            log.warning("%s: a program is cut off: %s", self.name, error)
            self._drop(peer)

    def _understood(self, peer: _Peer, frame: frames.AnyFrame, body: bytes) -> Item | Told | Refused:
        """The work in a frame."""
        try:
            if isinstance(frame, frames.Input):
                x = array_of(frame, body, self._expected)
                return Item(source=self.name, name=frame.id, inputs=x[np.newaxis], sender=peer)
            if isinstance(frame, frames.Scored):
                if len(body) != 4 * frame.features or len(frame.scores) != len(frame.detectors):
                    raise ModelError("scores", got="features or names that do not fit", expected="one for each")
                return Told(scored=frame, features=np.frombuffer(body, "<f4"))
            raise LinkError("frame", got=f"kind {type(frame).__name__.lower()}", expected="input or scored")
        except EdgeGuardError as error:
            name = frame.id if isinstance(frame, frames.Input) else ""
            self.dropped += 1
            peer.send(frames.encode(frames.Refused(id=name, reason=str(error)[:500])))
            return Refused.NO_INPUT

    def _watch(self, peer: _Peer) -> None:
        """Wait for what this stream can do now."""
        if self._selector is None or self._peers.get(peer.fd) is not peer:
            return
        before, now = self._masks.get(peer.fd, 0), peer.mask
        if before == now:
            return
        if not before:
            self._selector.register(peer.fd, now, self)
        elif not now:
            self._selector.unregister(peer.fd)
        else:
            self._selector.modify(peer.fd, now, self)
        self._masks[peer.fd] = now

    def _drop(self, peer: _Peer) -> None:
        if self._peers.get(peer.fd) is not peer:
            return
        del self._peers[peer.fd]
        if self._masks.pop(peer.fd, 0) and self._selector is not None:
            self._selector.unregister(peer.fd)
        self._turns.remove(peer)
        self.dropped += len(peer.waiting)
        peer.waiting.clear()
        if peer.connection is not None:
            peer.connection.close()


class SocketSource(StreamSource):
    """Programs on this machine.

    Args:
        path: the socket; made at :meth:`open`, removed at :meth:`close`.
        expected: what the model takes.

    Raises:
        ConfigError: its folder is missing or not writable, or another agent listens there.
    """

    name = "socket"

    def __init__(self, path: Path, expected: ModelInput) -> None:
        super().__init__(expected)
        self._path = path
        self._listener = _listen(path)

    def open(self, selector: selectors.BaseSelector) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        super().open(selector)
        selector.register(self._listener, selectors.EVENT_READ, self)

    def ready(self, key: selectors.SelectorKey, mask: int) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        if key.fileobj is not self._listener:
            super().ready(key, mask)
            return
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._peers) >= CONNECTIONS:
            log.warning("socket: %d programs are connected, another one is turned away", CONNECTIONS)
            connection.close()
            return
        connection.setblocking(False)
        self.add(_Peer(connection.fileno(), most_bytes(self._expected), connection))

    def close(self) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        super().close()
        if self._selector is not None:
            self._selector.unregister(self._listener)
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


class StdinSource(StreamSource):
    """Frames on standard input, or another readable descriptor.

    Raises:
        ConfigError: it is closed.
    """

    name = "stdin"

    def __init__(self, expected: ModelInput, descriptor: int = 0) -> None:
        super().__init__(expected)
        self._peer = _Peer(descriptor, most_bytes(expected))
        try:
            mode = os.fstat(descriptor).st_mode
        except OSError as error:
            raise ConfigError(
                "[sources.stdin]", got=error.strerror, expected="standard input", do="start the agent with a pipe"
            ) from error
        # Files and devices like /dev/null are always ready, which a selector refuses to say.
        self._is_file = not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor))
        if not self._is_file:
            os.set_blocking(descriptor, False)

    def open(self, selector: selectors.BaseSelector) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        if self._is_file:
            self._peers[self._peer.fd] = self._peer
            self._turns.append(self._peer)
        else:
            super().open(selector)
            self.add(self._peer)

    def take(self) -> Item | Told | Refused | None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        while self._is_file and not self._peer.ended and not self._peer.waiting and self._peers:
            self._read(self._peer)
        taken = super().take()
        self.ended = not self._peers
        return taken


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        _clear(path)
        before = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(CONNECTIONS)
        with contextlib.suppress(KeyError, PermissionError):
            os.chown(path, -1, grp.getgrnam(GROUP).gr_gid)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"socket {path}",
            got=error.strerror or str(error),
            expected="a path in a folder that this agent may write to",
            do="check [sources.socket] path",
        ) from error
    return listener


def _clear(path: Path) -> None:
    """Remove the socket that an agent which was killed has left. Raises ConfigError where one still listens."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"socket {path}", got="another kind of file", expected="nothing, or an old socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise ConfigError(f"socket {path}", got="another agent that listens there", do="stop it or choose another path")
