"""The engine llama.cpp over its native HTTP API: what llorch asks, and what the answers mean.

It owns the wire format of /completion, /tokenize, /apply-template, /health, /props, /slots and /v1/models, and the
table from the engine's errors to LlorchErrors. Connections belong to `llorch.adapters.http`, order and retries to
the service.
"""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from llorch.adapters.connections import Response
from llorch.adapters.http import Answer, HttpClient, Timeouts, typed_errors
from llorch.adapters.sse import EventSplitter
from llorch.errors import InvalidParams, LlorchError, PoolUnready, WorkerReset
from llorch.service.ports import Completed, EngineFacts, Generation, Message, OnTokens, SlotLoad, Usage

T = TypeVar("T")

ENGINE: Final = "llamacpp"
SEED_MAX: Final = 4294967294
"""llama.cpp takes 4294967295 for "draw one at random" and wraps larger seeds around 2**32."""

RELEASE_S: Final = 30.0
"""The longest that an engine is waited for to let go of a slot."""

_RELEASE_FIRST_PAUSE_S: Final = 0.005
_RELEASE_LAST_PAUSE_S: Final = 0.1
_REFUSAL_BYTES_MAX: Final = 1024 * 1024
_END_FIELDS: Final = ("index", "content", "stop", "stop_type", "tokens_predicted", "tokens_evaluated", "timings")
_FINISH_REASONS: Final = {"limit": "length", "word": "stop_sequence", "eos": "stop", "none": "stop"}
_UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError)
_UNKNOWN_BUILD: Final = "b0-unknown"


class _Event(msgspec.Struct, gc=False):
    """What is needed of every event of a stream; `content` is absent from errors only."""

    content: str | None = None
    stop: bool = False


class _Timings(msgspec.Struct):
    cache_n: int | None = None


class _End(msgspec.Struct):
    stop_type: str = "none"
    tokens_predicted: int = 0
    tokens_evaluated: int | None = None
    timings: _Timings = msgspec.field(default_factory=_Timings)


class _Fault(msgspec.Struct):
    message: str = ""
    type: str = ""
    code: int | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class _Refusal(msgspec.Struct):
    error: _Fault


class _GenerationSettings(msgspec.Struct):
    n_ctx: int | None = None


class _Props(msgspec.Struct):
    total_slots: int | None = None
    default_generation_settings: _GenerationSettings = msgspec.field(default_factory=_GenerationSettings)
    build_info: str = ""
    chat_template: str = ""


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Next(msgspec.Struct):
    n_decoded: int = 0


class _Slot(msgspec.Struct):
    id: int = 0
    is_processing: bool = False
    n_ctx: int | None = None
    n_prompt_tokens: int = 0
    next_token: list[_Next] = msgspec.field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of context that its task fills now."""
        return self.n_prompt_tokens + sum(each.n_decoded for each in self.next_token)


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Prompt(msgspec.Struct):
    prompt: str


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_end = msgspec.json.Decoder(_End).decode
_encode = msgspec.json.Encoder().encode


class LlamaCppEngine:
    """Client of one llama.cpp server; implements `llorch.service.ports.Engine`.

    Raises ConfigError when `base_url` or `api_key` cannot be used. A closed connection ends its generation within the
    batch that is being computed, so `can_interrupt`.
    """

    can_interrupt: Final = True

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeouts: Timeouts | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = HttpClient(base_url, headers=headers, timeouts=timeouts, ssl_context=ssl_context, engine=ENGINE)

    async def generate(self, generation: Generation, on_tokens: OnTokens) -> Completed:
        """See Engine.generate. Raises InvalidParams for a seed over SEED_MAX."""
        response = await self._open(generation)
        relay = _Relay(response, on_tokens)
        try:
            return await relay.run()
        except LlorchError as exc:
            exc.engine = ENGINE
            raise
        finally:
            await response.aclose()

    async def wait_released(self, slot: int) -> None:
        """See Engine.wait_released; asks the slots endpoint, for at most RELEASE_S seconds."""
        pause_s = _RELEASE_FIRST_PAUSE_S
        try:
            async with asyncio.timeout(RELEASE_S):
                while await self._is_processing(slot):
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _RELEASE_LAST_PAUSE_S)
        except (TimeoutError, LlorchError):
            return

    async def erase(self, slot: int) -> bool:
        """See Engine.erase; a server that was started without --slot-save-path cannot."""
        try:
            answer = await self._http.request(
                "POST", f"/slots/{slot}?action=erase", b"{}", timeout_s=self._http.timeouts.probe_s
            )
        except LlorchError:
            return False
        return answer.status == 200

    async def _is_processing(self, slot: int) -> bool:
        slots = await self._read_optional("/slots", list[_Slot]) or []
        return any(found.is_processing for found in slots if found.id == slot)

    async def _open(self, generation: Generation) -> Response:
        response = await self._http.stream("POST", "/completion", _encode_generation(generation))
        if response.status == 200:
            return response
        try:
            with typed_errors(self._http.authority, engine=ENGINE):
                raise _refusal(response.status, await response.read(_REFUSAL_BYTES_MAX))
        finally:
            await response.aclose()

    async def check_health(self) -> None:
        """See Engine.check_health."""
        _accept(await self._probe("/health"))

    async def read_facts(self) -> EngineFacts:
        """See Engine.read_facts. The engine tells no digest of its model, and this build perhaps no version."""
        props = await self._read_optional("/props", _Props) or _Props()
        slots = await self._read_optional("/slots", list[_Slot])
        models = await self._read_optional("/v1/models", _Models)
        total = props.total_slots if props.total_slots is not None else (len(slots) if slots else None)
        ctx = props.default_generation_settings.n_ctx or (slots[0].n_ctx if slots else None)
        features = {"grammar", "json_schema", "tokenize"}
        if props.chat_template:
            features.add("chat_template")
        if slots is not None:
            features.add("slots")
        return EngineFacts(
            slots=total,
            ctx_per_slot=ctx,
            engine_version=props.build_info if props.build_info not in ("", _UNKNOWN_BUILD) else None,
            model_digest=None,
            model_name=models.data[0].id if models and models.data else None,
            features=frozenset(features),
        )

    async def read_load(self) -> SlotLoad | None:
        """See Engine.read_load; None when the server was started without its slots endpoint."""
        slots = await self._read_optional("/slots", list[_Slot])
        if slots is None:
            return None
        room = sum(slot.n_ctx or 0 for slot in slots)
        used = sum(slot.tokens for slot in slots if slot.is_processing)
        return SlotLoad(sum(slot.is_processing for slot in slots), min(1.0, used / room) if room else None)

    async def count_tokens(self, text: str) -> int:
        """See Engine.count_tokens. The engine tokenizes, so that a long text does not hold up this process."""
        body = _encode_request({"content": text, "add_special": True, "parse_special": True})
        return len(self._read(await self._http.request("POST", "/tokenize", body), _Tokens).tokens)

    async def render_messages(self, messages: Sequence[Message]) -> str:
        """See Engine.render_messages."""
        spoken = [{"role": message.role, "content": message.content} for message in messages]
        answer = await self._http.request("POST", "/apply-template", _encode_request({"messages": spoken}))
        return self._read(answer, _Prompt).prompt

    async def aclose(self) -> None:
        """See Engine.aclose."""
        await self._http.aclose()

    async def _probe(self, path: str) -> Answer:
        return await self._http.request("GET", path, timeout_s=self._http.timeouts.probe_s)

    async def _read_optional(self, path: str, model: type[T]) -> T | None:
        """None when the server does not offer the path."""
        answer = await self._probe(path)
        return None if answer.status in (404, 501) else self._read(answer, model)

    def _read(self, answer: Answer, model: type[T]) -> T:
        _accept(answer)
        try:
            return msgspec.json.decode(answer.body, type=model)
        except _UNREADABLE as exc:
            raise WorkerReset("The engine's answer is not what llama.cpp answers.", engine=ENGINE) from exc


class _Relay:
    """Takes one streamed answer apart as it arrives, and hands out its tokens."""

    __slots__ = ("_ended", "_on_tokens", "_response", "_splitter")

    def __init__(self, response: Response, on_tokens: OnTokens) -> None:
        self._response = response
        self._on_tokens = on_tokens
        self._splitter = EventSplitter()
        self._ended: asyncio.Future[Completed] = asyncio.get_running_loop().create_future()

    async def run(self) -> Completed:
        """Return the engine's last word, or raise why there is none; nothing is handed out afterwards."""
        self._response.on_arrival = self._take
        self._take()
        try:
            return await self._ended
        finally:
            self._response.on_arrival = None
            if self._ended.done() and not self._ended.cancelled():
                self._ended.exception()  # seen, even when a cancellation came first

    def _take(self) -> None:
        """Hand out what has arrived. Whatever goes wrong ends the run, not the connection that calls this."""
        if self._ended.done():
            return
        response = self._response
        completed = None
        try:
            chunks = response.chunks
            if len(chunks) == 1 and (event := self._splitter.feed_one(chunks[0])) is not None:
                # Nearly always one token comes at a time: spare it the lists.
                response.discard()
                token = _decode_event(event)
                if token.content and not token.stop:
                    self._on_tokens((token.content,))
                    return
                completed = self._hand_out([event])
            elif data := response.take():
                completed = self._hand_out(self._splitter.feed(data))
            if completed is None and (response.complete or response.error is not None):
                response.take()  # raises what broke it off
                raise WorkerReset("The engine ended its answer without saying that it is complete.")
        except _UNREADABLE as exc:
            error = WorkerReset("The engine's stream is not what llama.cpp sends.", engine=ENGINE)
            error.__cause__ = exc
            self._ended.set_exception(error)
        except Exception as exc:  # noqa: BLE001 (raised again by run)
            self._ended.set_exception(exc)
        else:
            if completed is not None:
                # Nothing follows but the end of the HTTP message, which must not delay the last token.
                self._response.let_finish()
                self._ended.set_result(completed)

    def _hand_out(self, events: list[bytes]) -> Completed | None:
        tokens: list[str] = []
        end: bytes | None = None
        has_stopped = False
        for data in events:
            event = _decode_event(data)
            if event.content:
                tokens.append(event.content)
            if event.stop or event.content is None:
                end, has_stopped = data, event.stop
                break
        if tokens:
            self._on_tokens(tokens)
        if end is None:
            return None
        if not has_stopped:
            raise _broken_off(end)
        return _completed(_decode_end(end))


def _encode_generation(generation: Generation) -> bytes:
    if not 0 <= generation.seed <= SEED_MAX:
        raise InvalidParams(f"llama.cpp takes seeds from 0 to {SEED_MAX}.", engine=ENGINE)
    sampling = generation.sampling
    optional = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": sampling.stop or None,
        "grammar": sampling.grammar,
        "json_schema": sampling.json_schema,
    }
    return _encode_request(
        {
            "prompt": generation.prompt,
            "n_predict": generation.max_tokens,
            "seed": generation.seed,
            "id_slot": generation.slot,
            "stream": True,
            # Without progress events a closed connection is noticed only when the whole prompt has been processed.
            "return_progress": True,
            # A reused prefix is computed in other batches, which changes the sampled tokens.
            "cache_prompt": not generation.strict,
            # Else the last event repeats the whole prompt.
            "response_fields": _END_FIELDS,
            **{name: value for name, value in optional.items() if value is not None},
        }
    )


def _encode_request(body: dict[str, Any]) -> bytes:
    try:
        return _encode(body)
    except UnicodeEncodeError as exc:
        raise InvalidParams("The text has lone surrogates, which are no characters.", engine=ENGINE) from exc


def _completed(end: _End) -> Completed:
    return Completed(
        finish_reason=_FINISH_REASONS.get(end.stop_type, "stop"),
        usage=Usage(
            prompt_tokens=end.tokens_evaluated,
            completion_tokens=end.tokens_predicted,
            cached_tokens=end.timings.cache_n,
        ),
    )


def _accept(answer: Answer) -> None:
    if answer.status != 200:
        raise _refusal(answer.status, answer.body)


def _fault(body: bytes) -> _Fault:
    try:
        return msgspec.json.decode(body, type=_Refusal).error
    except _UNREADABLE:
        return _Fault()


def _refusal(status: int, body: bytes) -> LlorchError:
    """The error that an answer other than 200 means.

    1. 400, 413, 422: the request cannot be served, by no replica of this kind.
    2. 401, 403, 404, 501, 503: the replica cannot work yet, or not as it is configured.
    3. anything else: the replica failed.
    """
    fault = _fault(body)
    if status in (400, 413, 422):  # 1
        return _invalid(fault)
    if status in (401, 403):  # 2
        return PoolUnready("The engine refused llorch's key.", engine=ENGINE)
    if status == 503:
        return PoolUnready(fault.message or "The engine is not ready.", engine=ENGINE)
    if status in (404, 501):
        return PoolUnready(f"The engine does not offer what llama.cpp offers ({status}).", engine=ENGINE)
    return WorkerReset(f"The engine failed ({status}): {fault.message or 'no reason given'}", engine=ENGINE)  # 3


def _broken_off(data: bytes) -> LlorchError:
    """The error that an event without content means: the status had been sent before the engine knew of it."""
    fault = _fault(data)
    if fault.code == 400:
        return _invalid(fault)
    return WorkerReset(f"The engine broke off: {fault.message or 'no reason given'}", engine=ENGINE)


def _invalid(fault: _Fault) -> InvalidParams:
    known = {"type": fault.type, "n_prompt_tokens": fault.n_prompt_tokens, "n_ctx": fault.n_ctx}
    details = {name: value for name, value in known.items() if value}
    return InvalidParams(fault.message or None, engine=ENGINE, details=details or None)
