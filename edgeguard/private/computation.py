"""A thin shell over SPU: the link between the three parties, secret inputs, a program, and what it opens.

SPU's ABY3 in a ring of 64 bits: replicated secret sharing among three, honest majority, semi-honest. Between the
parties lies TLS in both directions; each trusts the two certificates in its file and no authority.

Rules enforced here:

* nothing is read from a peer but JSON: no pickle;
* what parties compare they send as a digest, as long whatever it says;
* all parties state the same round and the same program before any share is used, or the run ends;
* a party that stops ends the run for all with one error; there is no partial result.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
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


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A party's share of one secret, as it lies on its disk."""

    share: str
    shape: tuple[int, ...]
    dtype: Literal["int64", "float32", "float64", "bool"]


class _Kind(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    public: bool = False


class Prepared(NamedTuple):
    """A compiled program: call it as often as is needed. ``names`` are those of its outputs."""

    run: Callable[[], None]
    names: tuple[str, ...]

    def __call__(self) -> None:
        """Run it. Raises LinkError."""
        self.run()


class Computation:
    """One joint run; made by :func:`connect`."""

    def __init__(self, link: Any, index: int) -> None:
        import spu

        self._link = link
        self._index = index
        self._config = spu.libspu.RuntimeConfig(protocol=spu.ProtocolKind.ABY3, field=spu.FieldType.FM64)
        self._io = spu.Io(PARTIES, self._config)
        self._runtime = spu.Runtime(link, self._config)
        self._kinds: dict[str, _Kind] = {}

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
        said = self.exchange(hashlib.sha256(value.encode()).hexdigest())
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
        names = self._shared("in", mine)
        prepared = self.prepare(program, names, ("out0", "out1"))
        prepared()
        return [self.open(name) for name in prepared.names]

    def add_up(self, name: str, mine: npt.NDArray[np.int64]) -> None:
        """Make a secret of the sum, modulo 2^64, of what each of the three holds; see :meth:`run`."""
        names = self._shared(name, mine)
        self.prepare(lambda s0, s1, s2: (s0 + s1 + s2,), names, (name,))()
        self.forget(names)

    def tell(self, name: str, value: npt.NDArray[Any]) -> None:
        """Give a name to a public value that all three know."""
        import spu

        self._runtime.set_var(name, self._io.make_shares(value, spu.Visibility.VIS_PUBLIC)[self._index])
        self._kinds[name] = _Kind(value.shape, value.dtype, public=True)

    def prepare(self, program: Callable[..., Any], inputs: Sequence[str], outputs: Sequence[str]) -> Prepared:
        """Compile a program, and see that the others compiled the same.

        Args:
            program: JAX, of as many arguments as there are inputs; gives a tuple.
            inputs: names of secrets or public values.
            outputs: names of what it gives, all secret; may be those of inputs.

        Raises:
            LinkError: a party is gone.
            TrustError: another program.
        """
        import jax
        import spu
        from spu.utils import frontend

        kinds = [self._kinds[name] for name in inputs]
        with jax.experimental.enable_x64():
            executable, shapes = frontend.compile(
                frontend.Kind.JAX,
                _named(program),
                [np.zeros(kind.shape, kind.dtype) for kind in kinds],
                {},
                list(inputs),
                [spu.Visibility.VIS_PUBLIC if kind.public else spu.Visibility.VIS_SECRET for kind in kinds],
                lambda given: list(outputs)[: len(given)],
            )
        self.agree("program", hashlib.sha256(executable.code).hexdigest())
        names = tuple(executable.output_names)

        def run() -> None:
            self._call(self._runtime.run, executable)
            self._kinds.update({n: _Kind(s.shape, s.dtype) for n, s in zip(names, shapes, strict=True)})

        return Prepared(run, names)

    def forget(self, names: Sequence[str]) -> None:
        """Let go of secrets."""
        for name in names:
            self._runtime.del_var(name)
            del self._kinds[name]

    def open(self, name: str) -> npt.NDArray[Any]:
        """Show a secret to all three. Raises LinkError, TrustError."""
        packed = self._call(self._link.all_gather, _pack(self._runtime.get_var(name)))
        return np.asarray(self._io.reconstruct([_unpack(text) for text in packed]))

    def keep(self, names: Sequence[str]) -> dict[str, Kept]:
        """This party's shares of secrets, to go on with later. They are as secret as what it was given."""
        kept = {}
        for name in names:
            kind = self._kinds[name]
            dtype: Any = np.dtype(kind.dtype).name
            kept[name] = Kept(share=_pack(self._runtime.get_var(name)), shape=kind.shape, dtype=dtype)
        return kept

    def restore(self, kept: Mapping[str, Kept]) -> None:
        """Take up what all three have kept at the same moment. Raises TrustError."""
        for name, held in kept.items():
            self._runtime.set_var(name, _unpack(held.share))
            self._kinds[name] = _Kind(tuple(held.shape), np.dtype(held.dtype))

    def _shared(self, name: str, mine: npt.NDArray[np.int64]) -> list[str]:
        import spu

        names = [f"{name}_of_{i}" for i in range(PARTIES)]
        shares = [_pack(share) for share in self._io.make_shares(mine, spu.Visibility.VIS_SECRET)]
        for owner, one in enumerate(names):
            given = shares if owner == self._index else [""] * PARTIES
            self._runtime.set_var(one, _unpack(self._call(self._link.scatter, given, owner)))
            self._kinds[one] = _Kind(mine.shape, mine.dtype)
        return names

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
    yield Computation._call(Computation, context, own.index)
    # In order, with each waiting for the others' last word. Not after an error, where that would never come.
    context.stop_link()


def reconstruct(shares: Sequence[Kept]) -> npt.NDArray[np.float64]:
    """A secret from the shares that all three have kept of it, in their order: for measurements. Raises TrustError."""
    import spu

    config = spu.libspu.RuntimeConfig(protocol=spu.ProtocolKind.ABY3, field=spu.FieldType.FM64)
    return np.asarray(spu.Io(PARTIES, config).reconstruct([_unpack(held.share) for held in shares]))


def _named(program: Callable[..., Any]) -> Callable[..., Any]:
    """SPU's front end asks a program for its name, which a partial of a partial does not have."""

    def joint_program(*inputs: Any) -> Any:
        return program(*inputs)

    return joint_program


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
