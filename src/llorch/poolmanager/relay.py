"""A byte relay in front of one engine, so that an engine on loopback is reached from another host.

Owns the connections of both sides and nothing that they say. What one side sends, ends or breaks off, the other side
sees as if the two were one connection: in order, at the pace of the slower one, half-closes and resets included. A
segment that arrives costs one call: no task, no timer, no copy.

It is also the fence of a node: `cut` resets every connection at once, and engines abort what nobody hears any more.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from ssl import SSLContext
from typing import Final, cast

CONNECTIONS_MAX: Final = 1024
"""Connections that a relay carries at once; one more is reset."""

CONNECT_S: Final = 5.0
"""That an engine may take to accept a connection."""

HANDSHAKE_S: Final = 10.0
"""That a client may take for its TLS handshake."""

HALF_CLOSED_S: Final = 60.0
"""That one side may go on after the other has ended; an engine that never closes would keep its place for ever."""

_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that makes closing a reset, so that the other side cannot take a break for an end."""


class Relay:
    """Listens on an address of the host and forwards every connection to the engine of one replica.

    `tls` is what its listener speaks; to the engine it speaks plainly. Connections are reset at once while no engine is
    told, while it is cut, and while `connections_max` others stand.
    """

    def __init__(self, *, tls: SSLContext | None = None, connections_max: int = CONNECTIONS_MAX) -> None:
        self._tls = tls
        self._connections_max = connections_max
        self._engine: tuple[str, int] | None = None
        self._is_cut = False
        self._is_closed = False
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._gone = asyncio.Event()
        self._gone.set()

    async def listen(self, host: str, port: int = 0) -> None:
        """Begin to listen; port 0 takes a free one. Raises OSError when the address cannot be had."""
        handshake_s = HANDSHAKE_S if self._tls is not None else None
        self._server = await asyncio.get_running_loop().create_server(
            self._accept, host, port, ssl=self._tls, ssl_handshake_timeout=handshake_s
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None, "listen first"
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def scheme(self) -> str:
        """What its clients speak: `http` or `https`."""
        return "http" if self._tls is None else "https"

    @property
    def connections(self) -> int:
        """Connections that stand now."""
        return len(self._links)

    @property
    def is_cut(self) -> bool:
        """Whether it refuses everything until it is mended."""
        return self._is_cut

    def point_at(self, host: str | None, port: int = 0) -> None:
        """Where the engine is from now on; None while there is none. Connections that stand stay as they are."""
        self._engine = None if host is None else (host, port)

    def cut(self) -> None:
        """Reset every connection on both sides, and refuse new ones until `mend`. Idempotent."""
        self._is_cut = True
        for link in list(self._links):
            link.abort()

    def mend(self) -> None:
        """Accept connections again."""
        self._is_cut = False

    async def aclose(self) -> None:
        """Stop listening, reset every connection, and return when they are gone. Idempotent."""
        self._is_closed = True
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        await self._gone.wait()

    # What links ask for.

    def admit(self, link: "_Link") -> None:
        """A client has connected: connect it with the engine, or reset it."""
        refuses = self._is_cut or self._is_closed or self._engine is None
        if refuses or len(self._links) >= self._connections_max:
            link.abort()
            return
        self._links.add(link)
        self._gone.clear()
        task = link.connecting = asyncio.get_running_loop().create_task(self._connect(link))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def forget(self, link: "_Link") -> None:
        """Nothing of it stands any more."""
        self._links.discard(link)
        if not self._links:
            self._gone.set()

    def _accept(self) -> asyncio.Protocol:
        return _Link(self).client

    async def _connect(self, link: "_Link") -> None:
        assert self._engine is not None, "admitted without an engine"
        host, port = self._engine
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().create_connection(lambda: link.engine, host, port)
        except (OSError, TimeoutError):
            link.connecting = None
            link.abort()
        finally:
            link.connecting = None


class _Link:
    """One connection from a client to the engine: its two ends, and what holds for both of them."""

    __slots__ = ("_is_broken", "_relay", "_timer", "client", "connecting", "engine")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._timer: asyncio.TimerHandle | None = None
        self._is_broken = False
        self.client = _End(self)
        self.engine = _End(self)
        self.client.peer, self.engine.peer = self.engine, self.client
        self.connecting: asyncio.Task[None] | None = None

    def made(self, end: "_End") -> None:
        """An end stands: first the client's, then the engine's, from which on everything is passed on."""
        if self._is_broken:
            end.reset()
        elif end is self.client:
            self._relay.admit(self)
        else:
            self.client.pass_on()
            self.engine.pass_on()

    def ended(self, end: "_End") -> None:
        """An end sends nothing more; its other direction may go on for a while."""
        if end.peer.has_ended:
            self.client.close()
            self.engine.close()
            return
        self._timer = asyncio.get_running_loop().call_later(HALF_CLOSED_S, self.abort)
        end.peer.write_eof()

    def lost(self, end: "_End") -> None:
        """An end is gone.

        1. Both had ended: the other one sends what is left and closes by itself.
        2. The engine had ended: the client gets what is left.
        3. Whatever was under way has broken off.
        """
        if self.client.has_ended and self.engine.has_ended:
            pass
        elif end is self.engine and end.has_ended:
            self.client.close()
        else:
            self.abort()
        if self.client.is_gone and self.engine.is_gone:
            self._finish()

    def abort(self) -> None:
        """Reset both ends at once, whatever is still to be sent."""
        self._is_broken = True
        if self.connecting is not None:
            self.connecting.cancel()
        self.client.reset()
        self.engine.reset()

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._relay.forget(self)


class _End(asyncio.Protocol):
    """One end of a link: what it receives, its peer sends."""

    __slots__ = ("_early", "_link", "_pass", "has_ended", "is_gone", "peer", "transport")

    peer: "_End"

    def __init__(self, link: _Link) -> None:
        self._link = link
        self.transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        """What came before its peer stood: one segment, at which it stops reading."""
        self._pass: Callable[[bytes], None] = self._hold
        self.has_ended = False
        """Nothing more comes from it."""
        self.is_gone = True
        """It does not stand: not yet, or not any more."""

    # What the transport calls. Both loops set TCP_NODELAY by themselves.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.is_gone = False
        self._link.made(self)

    def data_received(self, data: bytes) -> None:
        self._pass(data)

    def eof_received(self) -> bool:
        self.has_ended = True
        self._link.ended(self)
        return self._can_half_close

    def pause_writing(self) -> None:
        self.peer.pause()

    def resume_writing(self) -> None:
        self.peer.resume()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.is_gone = True
        self.peer.deafen()
        self._link.lost(self)

    # What its link and its peer call.

    def pass_on(self) -> None:
        """Its peer stands: give it what came before, and go on reading."""
        transport = self.peer.transport
        assert transport is not None, "pass on to nobody"
        self._pass = transport.write
        self.resume()
        for data in self._early:
            transport.write(data)
        self._early.clear()
        if self.has_ended:
            self.peer.write_eof()

    def deafen(self) -> None:
        """Its peer is gone: nobody is there to have what it still sends."""
        self._pass = _drop

    def pause(self) -> None:
        """Read nothing more for now."""
        if (transport := self._open()) is not None:
            transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if (transport := self._open()) is not None:
            transport.resume_reading()

    def write_eof(self) -> None:
        """Send what is left and then the end; TLS has no half-closed connections and closes the whole of it."""
        transport = self._open()
        if transport is None:
            return
        if self._can_half_close:
            transport.write_eof()
        else:
            transport.close()

    def close(self) -> None:
        """Send what is left and close."""
        if (transport := self._open()) is not None:
            transport.close()

    def reset(self) -> None:
        """Close at once, in a way that the other side cannot take for an end."""
        self.deafen()
        if (transport := self._open()) is not None:
            with suppress(OSError):
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        if self.transport is not None and not self.is_gone:
            self.transport.abort()

    def _hold(self, data: bytes) -> None:
        self._early.append(data)
        self.pause()

    def _open(self) -> asyncio.Transport | None:
        transport = self.transport
        return None if transport is None or transport.is_closing() else transport

    @property
    def _can_half_close(self) -> bool:
        return self.transport is not None and self.transport.get_extra_info("sslcontext") is None


def _drop(_data: bytes) -> None:
    """Takes what nobody can have any more."""
