"""Requests over HTTP: errors made typed, refusals waited for, broken connections tried again where that is safe.

It knows statuses and headers and nothing of tasks.
"""

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

import httpx
from pydantic import ValidationError

from llorch.client.errors import ApiError, ClientError, InvalidRequest, ProtocolFault, Unreachable
from llorch.client.patience import Draw, Patience, advised_wait_s, backoff_s
from llorch_contract.models import Problem

MAX_DROPS: Final = 2
"""How often a request is sent again because the connection broke before the answer."""

Notify = Callable[[float, ClientError], None]
"""Told before every wait: the seconds, and what is the reason. Must not block."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `idle_s` bounds the silence in an open stream; the server's heartbeats come far more often."""

    connect_s: float = 5.0
    answer_s: float = 30.0
    idle_s: float = 60.0


class Transport:
    """One server, seen through a pool of connections. Belongs to one event loop."""

    def __init__(
        self,
        base_url: str,
        key: str | None,
        *,
        timeouts: Timeouts,
        patience_s: float,
        draw: Draw,
        notify: Notify | None,
        ca_file: str | None = None,
    ) -> None:
        url = _server_url(base_url)
        self._server = f"{url.scheme}://{url.netloc.decode()}"  # the address may carry a password, messages must not
        self._timeouts = timeouts
        self._patience_s = patience_s
        self._draw = draw
        self._notify = notify
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            timeout=httpx.Timeout(timeouts.answer_s, connect=timeouts.connect_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=not _is_loopback(url.host),
            verify=_trust(url, ca_file),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: str | None = None,
        params: Mapping[str, str | int] | None = None,
        is_repeatable: bool = True,
    ) -> httpx.Response:
        """The successful answer of one request.

        A refusal is waited for as long as patience reaches. A request that can be repeated is sent again when its
        connection broke. Raises ApiError and Unreachable.
        """
        patience = Patience(self._patience_s, self._draw)
        drops = 0
        while True:
            request = self._http.build_request(
                method,
                path,
                content=body,
                params=params,
                headers={"Content-Type": "application/json"} if body else None,
            )
            try:
                with self._connection_errors():
                    response = await self._http.send(request)
                _raise_for_error(response)
                return response
            except Unreachable as exc:
                drops += 1
                if not (exc.dropped and is_repeatable) or drops > MAX_DROPS:
                    raise
                await self.wait(backoff_s(drops, self._draw), exc)
            except ApiError as exc:
                await self._wait_out(exc, patience)

    @asynccontextmanager
    async def open(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes] | None]:
        """The body of one answer as it comes; None when the answer is 204.

        Raises as `call` does, but sends nothing again over a new connection, and ProtocolFault.
        """
        response = await self._answer(path, headers)
        try:
            if response.status_code == httpx.codes.NO_CONTENT:
                yield None
            else:
                async with aclosing(self._chunks(response)) as chunks:
                    yield chunks
        finally:
            await response.aclose()

    async def _answer(self, path: str, headers: Mapping[str, str]) -> httpx.Response:
        """A successful answer whose body is not read yet."""
        patience = Patience(self._patience_s, self._draw)
        timeout = httpx.Timeout(self._timeouts.answer_s, connect=self._timeouts.connect_s, read=self._timeouts.idle_s)
        # A body that a proxy compressed could not be read up to the byte where it broke.
        headers = {**headers, "Accept": "text/event-stream", "Accept-Encoding": "identity"}
        while True:
            request = self._http.build_request("GET", path, headers=headers, timeout=timeout)
            try:
                with self._connection_errors():
                    response = await self._http.send(request, stream=True)
                    if response.is_success:
                        return response
                    await response.aread()
                _raise_for_error(response)
            except ApiError as exc:
                await self._wait_out(exc, patience)

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "text/event-stream":
            raise ProtocolFault(f"the server sent {media_type or 'no media type'} where a stream was due")
        with self._connection_errors():
            async for chunk in response.aiter_bytes():
                yield chunk

    async def wait(self, seconds: float, reason: ClientError) -> None:
        if self._notify is not None:
            self._notify(seconds, reason)
        await asyncio.sleep(seconds)

    async def _wait_out(self, error: ApiError, patience: Patience) -> None:
        wait_s = patience.next_wait_s(error.advised_wait_s) if error.is_refusal else None
        if wait_s is None:
            raise error
        await self.wait(wait_s, error)

    @contextmanager
    def _connection_errors(self) -> Iterator[None]:
        """Maps what the HTTP client raises, in this one place."""
        if self._http.is_closed:
            raise Unreachable("this client is closed")
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.ProxyError) as exc:
            raise Unreachable(f"cannot connect to {self._server}: {str(exc) or 'timed out'}") from exc
        except httpx.TimeoutException as exc:
            raise Unreachable(f"{self._server} did not answer in time") from exc
        except httpx.TransportError as exc:
            raise Unreachable(
                f"the connection to {self._server} broke: {str(exc) or type(exc).__name__}", dropped=True
            ) from exc


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        problem = Problem.model_validate_json(response.content, extra="ignore")
    except ValidationError:
        problem = None
    raise ApiError(response.status_code, problem, advised_wait_s(response.headers, problem))


def _server_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as exc:
        raise InvalidRequest(f"{base_url!r} is no address of a server: {exc}") from exc
    if url.scheme not in {"http", "https"} or not url.host:
        raise InvalidRequest(
            f"{base_url!r} is no address of a server: it begins with http:// or https:// and has a host"
        )
    return url


def _trust(url: httpx.URL, ca_file: str | None) -> ssl.SSLContext | bool:
    """Whom TLS trusts. Where none is spoken that is nobody, which spares reading the list of authorities (50 ms)."""
    if url.scheme != "https":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as exc:
        raise InvalidRequest(f"{ca_file} cannot be read as certificates: {exc.strerror or exc}") from exc


def _is_loopback(host: str) -> bool:
    """Whether no proxy can stand between."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
