"""A thin shell over SPU: the link between the three parties, secret inputs, a program, and what it opens.

SPU's ABY3 in a ring of 64 bits: replicated secret sharing among three, honest majority, semi-honest. Between the
parties lies TLS in both directions; each trusts the two certificates in its file and no authority.

Rules enforced here:

* nothing is read from a peer but JSON and lengths that were agreed on before: no pickle;
* all parties state the same round and the same program before any share is used, or the run ends;
* a party that stops ends the run for all with one error; there is no partial result.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeguard.contract.private import PARTIES
from edgeguard.errors import LinkError, TrustError
from edgeguard.private.parties import OWN, PEERS, TLS_KEY, Own

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT_S = 120


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where this party reaches each of the three, ``host:port``; its own is where it listens."""

    hosts: tuple[str, ...]

    @classmethod
    def of(cls, own: Own) -> Addresses:
        """Those of the public descriptions."""
        return cls(hosts=tuple(f"{party.host}:{party.port}" for party in own.parties.parties))


class Computation:
    """One joint run; made by :func:`connect`."""

    def __init__(self, link: Any, index: int) -> None:
        import spu

        self._link = link
        self._index = index
        self._config = spu.libspu.RuntimeConfig(protocol=spu.ProtocolKind.ABY3, field=spu.FieldType.FM64)
        self._io = spu.Io(PARTIES, self._config)
        self._runtime = spu.Runtime(link, self._config)

    def exchange(self, value: Any) -> list[Any]:
        """What each party says, in their order; JSON.

        Raises:
            LinkError: a party is gone.
            TrustError: one says something that is not JSON.
        """
        try:
            return [json.loads(text) for text in self._call(self._link.all_gather, json.dumps(value))]
        except ValueError as error:
            raise TrustError("message of a party", got="no JSON") from error

    def agree(self, what: str, value: str) -> None:
        """End the run unless all three say the same. Raises TrustError."""
        said = self.exchange(value)
        if len(set(map(str, said))) != 1:
            raise TrustError(what, got="not the same at all three parties", do="compare it with the others")

    def run(self, program: Callable[..., Any], mine: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        """Run a program on the three parties' inputs, one of each, all of the shape of ``mine``; open its outputs.

        Args:
            program: JAX, of three arguments.
            mine: this party's input; the others learn its shape and nothing else.

        Raises:
            LinkError: a party is gone.
            TrustError: another program, or a share that cannot be read.
        """
        import jax
        import spu
        from spu.utils import frontend

        names = [f"in{i}" for i in range(PARTIES)]
        with jax.experimental.enable_x64():
            executable, _ = frontend.compile(
                frontend.Kind.JAX,
                _named(program),
                [mine] * PARTIES,
                {},
                names,
                [spu.Visibility.VIS_SECRET] * PARTIES,
                lambda outputs: [f"out{i}" for i in range(len(outputs))],
            )
        self.agree("program", hashlib.sha256(executable.code).hexdigest())
        shares = [_pack(share) for share in self._io.make_shares(mine, spu.Visibility.VIS_SECRET)]
        for owner, name in enumerate(names):
            given = shares if owner == self._index else [""] * PARTIES
            self._runtime.set_var(name, _unpack(self._call(self._link.scatter, given, owner)))
        self._call(self._runtime.run, executable)
        opened = []
        for name in executable.output_names:
            packed = self._call(self._link.all_gather, _pack(self._runtime.get_var(name)))
            opened.append(np.asarray(self._io.reconstruct([_unpack(text) for text in packed])))
        return opened

    @staticmethod
    def _call(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            raise LinkError(
                "joint computation", got=reason[0][:200] if reason else "no answer", do="start all three parties again"
            ) from error


@contextmanager
def connect(
    own: Own, addresses: Addresses, run_id: str, *, connect_s: int = TIMEOUT_S, timeout_s: int = TIMEOUT_S
) -> Iterator[Computation]:
    """Meet the two others.

    Args:
        own: this party.
        addresses: see there.
        run_id: names the run; parties of another do not meet.
        connect_s: about how long to wait for the others to be there.
        timeout_s: silence of a party after which the run ends.

    Raises:
        LinkError: the others are not there, or are not who they should be.
    """
    import spu

    link = spu.libspu.link
    description = link.Desc()
    description.id = run_id
    for party, address in zip(own.parties.parties, addresses.hosts, strict=True):
        description.add_party(party.name, address)
    description.connect_retry_interval_ms = 1000
    description.connect_retry_times = max(1, connect_s // 2)  # a failed handshake takes a second more
    description.recv_timeout_ms = 1000 * timeout_s
    description.http_timeout_ms = 1000 * timeout_s
    description.enable_ssl = True
    for options in (description.server_ssl_opts, description.client_ssl_opts):
        options.cert.certificate_path = str(own.folder / OWN)
        options.cert.private_key_path = str(own.folder / TLS_KEY)
        options.verify.ca_file_path = str(own.folder / PEERS)
        options.verify.verify_depth = 1
    context = Computation._call(link.create_brpc, description, own.index)
    yield Computation(context, own.index)
    # In order, with each waiting for the others' last word. Not after an error, where that would never come.
    context.stop_link()


def _named(program: Callable[..., Any]) -> Callable[..., Any]:
    """SPU's front end asks a program for its name, which a partial of a partial does not have."""

    def round_program(s0: Any, s1: Any, s2: Any) -> Any:
        return program(s0, s1, s2)

    return round_program


def _pack(share: Any) -> str:
    parts: Sequence[bytes] = (share.meta, *share.share_chunks)
    return json.dumps([base64.b64encode(part).decode() for part in parts])


def _unpack(text: str) -> Any:
    import spu

    try:
        meta, *chunks = (base64.b64decode(part, validate=True) for part in json.loads(text))
    except (ValueError, TypeError) as error:
        raise TrustError("share of a party", got="something else") from error
    share = spu.libspu.Share()
    share.meta, share.share_chunks = meta, chunks
    return share
