"""Request bodies: read within a bound, taken as JSON only, and validated by the generated model in one step."""

from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.types import Receive

from llorch.api.faults import MALFORMED, schema_fault
from llorch.errors import PayloadTooLarge, SchemaFault, UnsupportedMediaType

_JSON = b"application/json"


class JsonBody:
    """The body of one operation. `limit` in bytes."""

    def __init__(self, model: type[BaseModel], limit: int, *, is_required: bool = True) -> None:
        self._validate = TypeAdapter(model).validate_json
        self._limit = limit
        self._is_required = is_required

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> Any:
        """The validated model; None for no body where none is needed.

        Raises UnsupportedMediaType, PayloadTooLarge, SchemaFault.
        """
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._limit:
            raise self._too_large()
        content_type = headers.get(b"content-type")
        if content_type is not None and not is_json(content_type):
            raise UnsupportedMediaType(details={"choices": ["application/json"]})
        raw = await self._receive(receive)
        if not raw:
            if not self._is_required:
                return None
            raise SchemaFault("a body is required", details={"path": "", "reason": "is required"})
        if content_type is None or headers.get(b"content-encoding", b"identity") != b"identity":
            raise UnsupportedMediaType(details={"choices": ["application/json"]})
        return self._parse(raw)

    async def _receive(self, receive: Receive) -> bytes:
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            body: bytes = message.get("body", b"")
            if len(body) > self._limit:
                raise self._too_large()
            return body
        pieces: list[bytes] = []
        size = 0
        while message["type"] == "http.request":
            piece = message.get("body", b"")
            pieces.append(piece)
            size += len(piece)
            if size > self._limit:
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(pieces)
            message = await receive()
        raise SchemaFault("the body was cut off")

    def _parse(self, raw: bytes) -> Any:
        try:
            if b"NaN" in raw or b"Infinity" in raw:
                # Pydantic reads these words as numbers where the model says anything goes; JSON has no such numbers.
                msgspec.json.decode(raw)
            return self._validate(raw)
        except ValidationError as exc:
            raise schema_fault(exc) from None
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise SchemaFault("the body is not valid JSON", details=MALFORMED) from None

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body exceeds {self._limit} bytes", details={"limit_bytes": self._limit})


def is_json(content_type: bytes) -> bool:
    """Whether a Content-Type means JSON in UTF-8."""
    if content_type == _JSON:
        return True
    media_type, _, parameters = content_type.lower().partition(b";")
    if media_type.strip() != _JSON:
        return False
    charsets = [p.partition(b"=")[2].strip(b' "\t') for p in parameters.split(b";") if p.strip().startswith(b"charset")]
    return all(charset in (b"utf-8", b"utf8") for charset in charsets)
