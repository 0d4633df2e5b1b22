"""A cable that can be pulled: a TCP relay on loopback that falls silent and comes back, in a thread of its own.

It knows bytes and connections, not what they carry: TLS passes as well as plain HTTP.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

Result = TypeVar("Result")

BOUND_S = 10.0
"""For anything that a wire does itself."""
_CHUNK = 65_536
_BACKLOG = 512
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: on, 0 s. Such a socket is closed by RST."""


class Wire:
    """A relay to the host and port of `target`, a URL whose scheme `url` takes over.

    It listens at `listen`, by default a free port of 127.0.0.1.

    Use it with `with`. A target that does not listen resets the connections to it, and an end that is closed or reset
    does the same to the other. Connections that stand when the wire is cut see neither bytes nor an end of either side
    until it is healed, and are reset then, as after a long silence; what was on its way is lost.
    """

    def __init__(self, target: str, *, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        address = urlsplit(target)
        assert address.hostname is not None, target
        assert address.port is not None, target
        self._target = (address.hostname, address.port)
        self._listener = socket.create_server(listen, backlog=_BACKLOG)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{address.scheme}://{listen[0]}:{self.port}"
        self.connections_made = 0
        self.bytes_passed = 0
        """In both directions."""
        self._is_cut = False
        self._links: dict[asyncio.Task[None], list[socket.socket]] = {}
        self._dead: list[socket.socket] = []
        """Of connections that stood while the wire was cut: open, and never read again."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"wire {self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def cut(self) -> None:
        """From now on nothing passes, and nobody is told. New connections are accepted and hang."""
        self._call(self._cut())

    def heal(self) -> None:
        """New connections pass again; those that stood while the wire was cut are reset, at both ends."""
        self._call(self._heal())

    def close(self) -> None:
        """Reset every connection and stop listening. Idempotent."""
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(BOUND_S)
        assert not self._thread.is_alive()
        self._loop.close()

    def _run(self) -> None:
        self._loop.add_reader(self._listener, self._accept)
        self._loop.run_forever()

    def _call(self, step: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result(BOUND_S)

    # In the thread.

    def _accept(self) -> bool:
        """Take a connection, if there is one. Whether it passes is decided at once, by how the wire is now."""
        try:
            near, _ = self._listener.accept()
        except BlockingIOError:
            return False
        near.setblocking(False)
        self.connections_made += 1
        if self._is_cut:
            self._dead.append(near)
            return True
        ends = [near]
        link = self._loop.create_task(self._link(ends))
        self._links[link] = ends
        link.add_done_callback(lambda link: self._links.pop(link, None))
        return True

    async def _link(self, ends: list[socket.socket]) -> None:
        """Relay one connection until both its ends are done with it; only the wire itself cancels this."""
        near = ends[0]
        try:
            far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            far.setblocking(False)
            ends.append(far)
            await self._loop.sock_connect(far, self._target)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(near, far))
                pumps.create_task(self._pump(far, near))
        except* OSError:
            _reset(ends)
        else:
            for end in ends:
                end.close()

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := await self._loop.sock_recv(source, _CHUNK):
            await self._loop.sock_sendall(sink, data)
            self.bytes_passed += len(data)
        sink.shutdown(socket.SHUT_WR)

    async def _cut(self) -> None:
        self._is_cut = True
        self._dead += await self._stop_links()

    async def _heal(self) -> None:
        while self._accept():  # what the kernel took in while the wire was cut is none of after
            pass
        self._is_cut = False
        dead, self._dead = self._dead, []
        _reset(dead)

    async def _end(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        _reset([*await self._stop_links(), *self._dead])

    async def _stop_links(self) -> list[socket.socket]:
        """Stop relaying. The sockets of what was relayed, open still."""
        links = dict(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        return [end for ends in links.values() for end in ends if end.fileno() >= 0]


def _reset(ends: list[socket.socket]) -> None:
    for end in ends:
        if end.fileno() >= 0:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.close()
