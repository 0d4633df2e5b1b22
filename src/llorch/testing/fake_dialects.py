"""The wire formats that FakeEngine speaks: llama.cpp's own, and OpenAI's with vLLM's framing.

A dialect reads a request and encodes its answer; it knows nothing of sockets, slots or time. Frames are built by
formatting bytes, because benchmarks measure what stands between this engine and its client.
"""

import hashlib
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

BATCH_TOKENS: Final = 64
SEED_RANDOM: Final = 4294967295
_WANTED: Final = re.compile(r"<out:(\d{1,9})>")

WORDS: Final = tuple(
    (
        " the of and to in is it you that he was for on are with as his they be at one have this from or had by hot but"
        " some what there we can out other were all your when up use word how said an each she which do their time if"
        " will way about many then them would write like so these her"
    )
    .replace(" ", "\n ")
    .split("\n")[1:65]
)


@dataclass(slots=True)
class Order:
    """What a request asks for, whatever its dialect."""

    path: str
    prompt: str
    max_tokens: int
    seed: int
    stream: bool
    stop: tuple[str, ...] = ()
    is_chat: bool = False
    include_usage: bool = False
    return_progress: bool = False
    response_fields: tuple[str, ...] = ()
    body: Mapping[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """The request is answered with an error."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class Encoder(Protocol):
    """Encodes the answer to one order. Frames are whole HTTP chunks; `n` counts the tokens sent, this one included."""

    def progress(self, total: int, processed: int) -> bytes:
        """Frame of prefill progress; empty where the dialect has none."""
        ...

    def token(self, text: str, n: int, finish: str | None) -> bytes:
        """Frame of one token; `finish` (`limit`, `word` or `eos`) when it is the last."""
        ...

    def end(self, finish: str, n: int) -> bytes:
        """What follows the last token, up to and including the last HTTP chunk."""
        ...

    def fault(self, message: str) -> bytes:
        """An error in the middle of the stream, and what the engine sends after it."""
        ...

    def whole(self, text: str, finish: str, n: int) -> bytes:
        """The body of an answer that is not streamed."""
        ...


def tokenize(text: str) -> list[int]:
    """Ids of the tokens of a text: one per word."""
    return [zlib.crc32(word.encode("utf-8", "surrogatepass")) % 49152 for word in text.split()]


def wanted_tokens(prompt: str) -> tuple[str, int, int | None]:
    """The prompt as it was asked first, how many tokens of the answer it has already, and how many it shall have.

    A prompt that ends in ` <out:N>` wants N tokens. What follows the mark is the beginning of the answer: a task that
    was broken off goes on from there, with the tokens that it would have had.
    """
    found = _WANTED.search(prompt)
    if found is None:
        return prompt, 0, None
    return prompt[: found.end()], len(prompt[found.end() :].split()), int(found[1])


def make_tokens(prompt: str, seed: int, count: int) -> list[str]:
    """The first `count` tokens of the only stream that (prompt, seed) has."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode("utf-8", "surrogatepass")).digest()
    state = int.from_bytes(digest[:8], "big")
    tokens = []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        tokens.append(WORDS[state >> 58])
    return tokens


def expected_tokens(prompt: str, seed: int, count: int) -> list[str]:
    """The tokens that a generation has to give, at most `count`: on every FakeEngine the same."""
    asked, done, wanted = wanted_tokens(prompt)
    most = count if wanted is None else min(count, max(0, wanted - done))
    return make_tokens(asked, seed, done + most)[done:]


def cut_at_stop(tokens: list[str], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """The tokens before the first stop sequence, the last of them cut, and whether there was one."""
    text = "".join(tokens)
    ends = [text.find(each) for each in stop if each and each in text]
    if not ends:
        return tokens, False
    left = min(ends)
    kept = []
    for token in tokens:
        if left <= 0:
            break
        kept.append(token[:left])
        left -= len(token)
    return kept, True


def chunk(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK: Final = b"0\r\n\r\n"


def encode_text(text: str) -> bytes:
    """JSON string without its quotes."""
    return msgspec.json.encode(text)[1:-1]


class LlamaCppEncoder:
    """llama.cpp's POST /completion."""

    def __init__(self, order: Order, model: str, prompt_tokens: int) -> None:
        self._order = order
        self._model = model
        self._prompt_tokens = prompt_tokens

    def progress(self, total: int, processed: int) -> bytes:
        event = (
            b'data: {"index":0,"content":"","tokens":[0],"stop":false,"id_slot":-1,"tokens_predicted":0,'
            b'"tokens_evaluated":%d,"prompt_progress":{"total":%d,"cache":0,"processed":%d,"time_ms":0}}\n\n'
        )
        return chunk(event % (total, total, processed))

    def token(self, text: str, n: int, finish: str | None) -> bytes:  # noqa: ARG002 (llama.cpp tells it after the last)
        event = (
            b'data: {"index":0,"content":"%b","tokens":[%d],"stop":false,"id_slot":-1,"tokens_predicted":%d,'
            b'"tokens_evaluated":%d}\n\n'
        )
        return chunk(event % (encode_text(text), n, n, self._prompt_tokens))

    def end(self, finish: str, n: int) -> bytes:
        fields = self._end_fields("", finish, n)
        if self._order.response_fields:
            fields = {name: value for name, value in fields.items() if name in self._order.response_fields}
        return chunk(b"data: " + msgspec.json.encode(fields) + b"\n\n") + LAST_CHUNK

    def fault(self, message: str) -> bytes:
        fault = {"error": {"code": 500, "message": message, "type": "server_error"}}
        return chunk(b"data: " + msgspec.json.encode(fault) + b"\n\n") + LAST_CHUNK

    def whole(self, text: str, finish: str, n: int) -> bytes:
        return msgspec.json.encode(self._end_fields(text, finish, n))

    def _end_fields(self, text: str, finish: str, n: int) -> dict[str, Any]:
        return {
            "index": 0,
            "content": text,
            "tokens": [],
            "id_slot": 0,
            "stop": True,
            "model": self._model,
            "tokens_predicted": n,
            "tokens_evaluated": self._prompt_tokens,
            "generation_settings": {"seed": self._order.seed},
            "prompt": self._order.prompt,
            "truncated": False,
            "stop_type": finish,
            "stopping_word": self._order.stop[0] if finish == "word" else "",
            "timings": {"cache_n": 0, "prompt_n": self._prompt_tokens, "predicted_n": n},
        }


class OpenAIEncoder:
    """vLLM's /v1/completions and /v1/chat/completions."""

    def __init__(self, order: Order, model: str, prompt_tokens: int, answer_id: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._include_usage = order.include_usage
        self._is_chat = order.is_chat
        self._id = f"{'chatcmpl' if order.is_chat else 'cmpl'}-{answer_id:016x}"
        self._model = model
        self._created = int(time.time())
        kind = "chat.completion.chunk" if order.is_chat else "text_completion"
        self._start = msgspec.json.encode(
            {"id": self._id, "object": kind, "created": self._created, "model": model}
        ).removesuffix(b"}")

    def progress(self, total: int, processed: int) -> bytes:  # noqa: ARG002 (vLLM tells nothing of it)
        return b""

    def token(self, text: str, n: int, finish: str | None) -> bytes:
        reason = b"null" if finish is None else b'"length"' if finish == "limit" else b'"stop"'
        if self._is_chat:
            event = b'data: %b,"choices":[{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b}]}\n\n'
            if n == 1:
                return chunk(self._chat_start()) + chunk(event % (self._start, encode_text(text), reason))
        else:
            event = (
                b'data: %b,"choices":[{"index":0,"text":"%b","logprobs":null,"finish_reason":%b,"stop_reason":null,'
                b'"prompt_token_ids":null,"token_ids":null}]}\n\n'
            )
        return chunk(event % (self._start, encode_text(text), reason))

    def end(self, finish: str, n: int) -> bytes:  # noqa: ARG002 (vLLM told it with the last token)
        done = chunk(b"data: [DONE]\n\n") + LAST_CHUNK
        if not self._include_usage:
            return done
        usage = msgspec.json.encode(self._usage(n))
        return chunk(b'data: %b,"choices":[],"usage":%b}\n\n' % (self._start, usage)) + done

    def fault(self, message: str) -> bytes:
        fault = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}
        return chunk(b"data: " + msgspec.json.encode(fault) + b"\n\n") + chunk(b"data: [DONE]\n\n") + LAST_CHUNK

    def whole(self, text: str, finish: str, n: int) -> bytes:
        reason = "length" if finish == "limit" else "stop"
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return msgspec.json.encode(
            {
                "id": self._id,
                "object": "chat.completion" if self._is_chat else "text_completion",
                "created": self._created,
                "model": self._model,
                "choices": [choice],
                "usage": self._usage(n),
            }
        )

    def _chat_start(self) -> bytes:
        event = b'data: %b,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
        return event % self._start

    def _usage(self, n: int) -> dict[str, int]:
        return {"prompt_tokens": self._prompt_tokens, "total_tokens": self._prompt_tokens + n, "completion_tokens": n}


def read_llamacpp(path: str, body: Mapping[str, Any]) -> Order:
    """The order in a /completion request. Raises Refused as llama.cpp refuses it."""
    prompt, max_tokens = body.get("prompt"), body.get("n_predict", 128)
    if not isinstance(prompt, str):
        raise refuse_llamacpp("[json.exception.out_of_range.403] key 'prompt' not found")
    if not isinstance(max_tokens, int):
        raise refuse_llamacpp("Field 'n_predict': [json.exception.type_error.302] type must be number, but is string")
    grammar = body.get("grammar")
    if grammar and ("::=" not in grammar or grammar.count("(") != grammar.count(")")):
        raise refuse_llamacpp("Failed to initialize samplers: failed to parse grammar")
    return Order(
        path=path,
        prompt=prompt,
        # Asked for none, llama.cpp evaluates the prompt and generates one.
        max_tokens=max(max_tokens, 1),
        seed=int(body.get("seed", SEED_RANDOM)) % (SEED_RANDOM + 1),
        stream=bool(body.get("stream", False)),
        stop=tuple(body.get("stop") or ()),
        return_progress=bool(body.get("return_progress", False)),
        response_fields=tuple(body.get("response_fields") or ()),
        body=body,
    )


def read_openai(path: str, body: Mapping[str, Any]) -> Order:
    """The order in a /v1/completions or /v1/chat/completions request. Raises Refused as vLLM refuses it."""
    is_chat = path.endswith("/chat/completions")
    messages, prompt = body.get("messages"), body.get("prompt")
    if is_chat and isinstance(messages, list):
        prompt = render_template(messages)
    if not isinstance(prompt, str) or not prompt:
        fault = {"message": "1 validation error", "type": "Bad Request", "param": "body.prompt", "code": 400}
        raise Refused(400, {"error": fault})
    stop = body.get("stop") or ()
    return Order(
        path=path,
        prompt=prompt,
        max_tokens=int(body.get("max_tokens") or body.get("max_completion_tokens") or 16),
        seed=int(body.get("seed") or 0),
        stream=bool(body.get("stream", False)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        is_chat=is_chat,
        include_usage=bool((body.get("stream_options") or {}).get("include_usage", False)),
        body=body,
    )


def render_template(messages: list[Mapping[str, Any]]) -> str:
    """ChatML, as many models have it. Raises Refused when a message has no text."""
    parts = []
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise refuse_llamacpp("Expected 'content' to be a string or an array")
        parts.append(f"<|im_start|>{message.get('role')}\n{message['content']}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


def refuse_llamacpp(message: str, **more: Any) -> Refused:
    """A 400 in llama.cpp's form."""
    return Refused(400, {"error": {"code": 400, "message": message, "type": "invalid_request_error", **more}})


def refuse_context(prompt_tokens: int, ctx: int) -> Refused:
    """The 400 of a prompt that does not fit."""
    return refuse_llamacpp(
        f"request ({prompt_tokens} tokens) exceeds the available context size ({ctx} tokens), try increasing it",
        type="exceed_context_size_error",
        n_prompt_tokens=prompt_tokens,
        n_ctx=ctx,
    )
