"""The least that can take a task: a bare ASGI application that parses the body with the contract's model.

What `POST /v1/tasks` costs above it is what llorch does for its money. Runs as `python -m bench.bare PORT`.
"""

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
import uvicorn
from pydantic import TypeAdapter

from llorch_contract.models import TaskRequest

_validate = TypeAdapter(TaskRequest).validate_json
_encode = msgspec.json.Encoder().encode
_Message = MutableMapping[str, Any]


async def app(
    scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]
) -> None:
    """202 for a valid TaskRequest, 200 for a GET."""
    if scope["method"] == "GET":
        status, body = 200, b"{}"
    else:
        message = await receive()
        data = message["body"]
        while message.get("more_body"):
            message = await receive()
            data += message["body"]
        task = _validate(data)
        answer = {"task_id": task.task_id, "session_id": task.task_id, "state": "queued", "queue_position": 0}
        status, body = 202, _encode({**answer, "predicted_start_ms": None, "backoff_ms": None})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        http="httptools",
        loop="uvloop",
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
    )
