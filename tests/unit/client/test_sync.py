"""The synchronous facade does what the asynchronous client does."""

import inspect
import signal
import threading
from contextlib import closing

import pytest

from llorch.client import Accepted, ApiError, AsyncClient, Client, End, Started, Token
from tests.unit.client.scripted_server import (
    CANCEL,
    CANCELED,
    STREAM,
    TASK_ID,
    ScriptedServer,
    accepted,
    problem,
    stream,
    transcript,
)

WHOLE = transcript("a", "b")


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    def surface(client: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_") and name not in {"close", "aclose"}
        }

    assert surface(Client) == surface(AsyncClient)
    assert list(inspect.signature(Client).parameters) == list(inspect.signature(AsyncClient).parameters)


def test_generate_is_a_plain_iterator(server: ScriptedServer) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE))
    with Client(server.url) as client:
        kinds = [type(event) for event in client.generate(model_ref="m", prompt="p", task_id=TASK_ID)]
    assert kinds == [Accepted, Started, Token, Token, End]


def test_leaving_the_loop_cancels_the_task(server: ScriptedServer) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE[:2], is_held=True))
    server.on("POST", CANCEL, CANCELED)
    with Client(server.url) as client:
        for event in client.generate(model_ref="m", prompt="p", task_id=TASK_ID):
            if isinstance(event, Token):
                break
    assert len(server.seen("POST", CANCEL)) == 1


def test_closing_a_stream_returns_when_the_task_is_canceled(server: ScriptedServer) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE[:2], is_held=True))
    server.on("POST", CANCEL, CANCELED)
    with Client(server.url) as client:
        events = client.generate(model_ref="m", prompt="p", task_id=TASK_ID)
        while not isinstance(next(events), Token):
            pass
        events.close()
        assert len(server.seen("POST", CANCEL)) == 1


def test_following_only_cancels_nothing(server: ScriptedServer) -> None:
    server.on("GET", STREAM, stream(*WHOLE[:2], is_held=True))
    with Client(server.url) as client, closing(client.stream(TASK_ID)) as events:
        assert isinstance(next(events), Started)
    assert server.seen("POST", CANCEL) == []


def test_an_interrupt_while_waiting_cancels_the_task(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.on("POST", "/v1/tasks", accepted())
    server.on("GET", STREAM, stream(*WHOLE[:2], is_held=True))
    server.on("POST", CANCEL, CANCELED)
    with Client(server.url) as client:
        events = client.generate(model_ref="m", prompt="p", task_id=TASK_ID)
        while not isinstance(next(events), Token):
            pass
        server.wait_for("GET", STREAM)
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(events)
    assert len(server.seen("POST", CANCEL)) == 1


def test_errors_are_the_same(server: ScriptedServer) -> None:
    server.on("POST", CANCEL, problem(404, "NOT_FOUND"))
    with Client(server.url) as client, pytest.raises(ApiError, match="NOT_FOUND"):
        client.cancel(TASK_ID)


def test_closing_twice_is_once(server: ScriptedServer) -> None:
    client = Client(server.url)
    client.close()
    client.close()
