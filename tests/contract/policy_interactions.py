"""The interactions about shares, quotas, budgets, deadlines and preemption: each new code, field and header once."""

from collections.abc import Awaitable, Callable
from typing import Any

from llorch.client import (
    Affinity,
    AsyncClient,
    ErrorCode,
    ErrorEvent,
    Event,
    Metrics,
    Queued,
    Started,
    TaskState,
    WaitReason,
    known,
)
from tests.contract.interactions import (
    ANYTHING,
    EXACT,
    INTEGER,
    INTEGER_OR_NULL,
    MODEL,
    NUMBER,
    PACED_MODEL,
    QUOTA_KEYS,
    TEXT_OR_NULL,
    TIME,
    UUID,
    WAIT_MS,
    WIDE_MODEL,
    Interaction,
    Reply,
    State,
    problem,
    refused,
    regex,
)

PROMPT: dict[str, Any] = {"model_ref": MODEL, "prompt": "The capital of France is", "max_tokens": 2}
BUDGETS = {"tokens": 400, "time_ms": 60_000, "cost": 500.0}
PREEMPTED_TOKENS = 12


def task_id(number: int) -> str:
    return f"00000000-0000-4000-8000-{0x100 + number:012x}"


def session_id(number: int) -> str:
    return f"00000000-0000-4000-8000-{0xB00 + number:012x}"


def submits(**fields: Any) -> Callable[[AsyncClient], Awaitable[object]]:
    return lambda client: client.submit(**fields)


def refusal(
    name: str,
    state: State,
    status: int,
    code: str,
    fields: dict[str, Any],
    *,
    policy: str | None,
    knows_wait: bool | None,
    details: dict[str, int] | None = None,
    **extra: Any,
) -> Interaction:
    """A submission that is refused for now, by this policy."""
    body = {**PROMPT, **fields}
    reply = problem(status, code, retriable=policy is not None, policy=policy, knows_wait=knows_wait, details=details)
    advised_s = WAIT_MS / 1000 if knows_wait else None
    act = refused(code, status, submits(**body), advised_wait_s=advised_s, policy=policy)
    return Interaction(name, "POST", "/v1/tasks", reply, act, (state,), body=body, **extra)


# Streams. Oniguruma, where \A and \z are the ends of the text and a dot is no newline.

ANY_FRAMES = r"(: hb\n\n|(id: [0-9]+\n)?event: [a-z]+\ndata: \{.*\}\n\n)*"
STARTED = (
    '{"queue_position":0,"predicted_start_ms":null,"waited_ms":1,"pool_id":"pact","replica_id":"pact/0",'
    '"kv_warmth":%s,"affinity":%s}'
)
END = (
    '{"tokens_out":2,"decode_ms":5,"first_token_ms":2,"waited_ms":1,"finish_reason":"length",'
    '"usage":{"prompt_tokens":6,"completion_tokens":2,"cached_tokens":null}}'
)


def frame(number: int | None, event: str, data: str) -> str:
    id_line = "" if number is None else f"id: {number}\n"
    return f"{id_line}event: {event}\ndata: {data}\n\n"


def error_frame(code: str, policy: str | None, number: int = 1) -> str:
    label = "null" if policy is None else f'"{policy}"'
    return frame(
        number, "error",
        f'{{"code":"{code}","message":"for people","engine":"llamacpp","pool_id":null,"retriable":true,'
        f'"retry_after_ms":null,"policy_label":{label},"details":null,"correlation_id":"req-1"}}',
    )  # fmt: skip


def error_pattern(code: str, policy: str | None, number: int = 1) -> str:
    label = "null" if policy is None else f'"{policy}"'
    data = rf'\{{"code":"{code}",.*"retriable":true,.*"policy_label":{label},.*\}}'
    return rf"id: {number}\nevent: error\ndata: {data}\n\n"


def stream(
    name: str, state: State, text: str, pattern: str, check: Callable[[list[Event]], None], **extra: Any
) -> Interaction:
    followed = str(state[1]["task_id"])

    async def act(client: AsyncClient) -> None:
        check([event async for event in client.stream(followed)])

    reply = Reply(200, text, {"$": regex(rf"\A{pattern}\z")})
    return Interaction(name, "GET", f"/v1/tasks/{followed}/stream", reply, act, (state,), **extra)


def ends_in(code: str, policy: str | None) -> Callable[[list[Event]], None]:
    def check(events: list[Event]) -> None:
        last = events[-1]
        assert isinstance(last, ErrorEvent)
        assert (last.frame.code, last.frame.policy_label) == (ErrorCode(code), policy)
        assert last.frame.retriable

    return check


def lost(name: str, state: State, code: str, policy: str) -> Interaction:
    """The stream of a task that lost its place."""
    pattern = ANY_FRAMES + error_pattern(code, policy)
    return stream(name, state, error_frame(code, policy), pattern, ends_in(code, policy))


# Acceptance

BUDGETED: State = ("a task runs that has long to go, at known rates", {"model_ref": PACED_MODEL})


async def _accepts_budgeted(client: AsyncClient) -> None:
    accepted = await client.submit(**BUDGETED_TASK)
    left = known(accepted.budgets)
    assert left is not None
    assert (left.tokens, left.time_ms, left.cost) == (392, 50_000, 492.0)
    assert (accepted.state, accepted.predicted_start_ms, accepted.backoff_ms) == (TaskState.queued, 1840, 620)


BUDGETED_TASK = {
    **PROMPT, "task_id": task_id(1), "session_id": session_id(1), "model_ref": PACED_MODEL, "session_budgets": BUDGETS,
}  # fmt: skip
LEFT: dict[str, Any] = {"tokens": 392, "time_ms": 50_000, "cost": 492.0}
LEFT_RULES = {"tokens": INTEGER, "time_ms": INTEGER, "cost": NUMBER}
ACCEPTED = Interaction(
    "a task with budgets that waits at known rates", "POST", "/v1/tasks",
    Reply(
        202,
        {
            "task_id": task_id(1), "session_id": session_id(1), "state": "queued", "queue_position": 0,
            "predicted_start_ms": 1840, "backoff_ms": 620, "budgets": LEFT,
        },
        {
            "$.task_id": EXACT, "$.session_id": EXACT, "$.state": EXACT, "$.queue_position": INTEGER,
            "$.predicted_start_ms": INTEGER, "$.backoff_ms": INTEGER,
            **{f"$.budgets.{name}": rule for name, rule in LEFT_RULES.items()},
        },
        {
            "X-Budget-Tokens-Remaining": ("392", regex(r"^\d+$")),
            "X-Budget-Time-Remaining-Ms": ("50000", regex(r"^\d+$")),
            "X-Budget-Cost-Remaining": ("492.0", regex(r"^\d+(\.\d+)?$")),
        },
    ),
    _accepts_budgeted, (BUDGETED,), body=BUDGETED_TASK,
)  # fmt: skip


# Sessions

WITH_BUDGETS: State = (
    "a session with budgets",
    {"model_ref": MODEL, "task_id": task_id(2), "session_id": session_id(2), "session_budgets": BUDGETS},
)


async def _reads_budgets(client: AsyncClient) -> None:
    session = await client.get_session(session_id(2))
    assert session.budgets is not None
    assert (session.budgets.tokens, session.budgets.cost, session.kv_warmth) == (392, 492.0, True)


SESSION = Interaction(
    "a session with budgets", "GET", f"/v1/sessions/{session_id(2)}",
    Reply(
        200,
        {
            "session_id": session_id(2), "ttl_ms_remaining": 534210, "turns": 1, "turns_max": 8, "kv_bytes": None,
            "kv_warmth": True, "budgets": LEFT,
        },
        {
            "$.session_id": EXACT, "$.ttl_ms_remaining": INTEGER, "$.turns": INTEGER, "$.turns_max": INTEGER,
            "$.kv_bytes": INTEGER_OR_NULL, "$.kv_warmth": EXACT,
            **{f"$.budgets.{name}": rule for name, rule in LEFT_RULES.items()},
        },
    ),
    _reads_budgets, (WITH_BUDGETS,),
)  # fmt: skip


# What a waiting reader is told

QUOTA_KEY = QUOTA_KEYS["max-concurrent"]
BOUND: State = (
    "a task that waits for its tenant's quota until its deadline",
    {"model_ref": WIDE_MODEL, "task_id": task_id(3), "deadline_ms": 1000, "key": QUOTA_KEY},
)
QUEUED_FOR_QUOTA = '{"queue_position":0,"predicted_start_ms":null,"reason":"quota"}'


def _waits_for_quota(events: list[Event]) -> None:
    ends_in("DEADLINE_UNMET", None)(events)
    assert isinstance(events[0], Queued)
    assert events[0].frame.reason is WaitReason.quota


PATIENT: State = (
    "a task with budgets that waits until its deadline, at known rates",
    {
        "model_ref": PACED_MODEL, "task_id": task_id(4), "session_id": session_id(4), "deadline_ms": 2000,
        "session_budgets": BUDGETS,
    },
)  # fmt: skip
ADVISED = (
    frame(None, "queued", '{"queue_position":0,"predicted_start_ms":1840,"reason":"slots_busy"}')
    + frame(
        None, "metrics",
        '{"queue_depth":1,"on_time_probability":0.93,"budgets":{"tokens":392,"time_ms":50000,"cost":492.0}}',
    )
)  # fmt: skip
ADVISED_PATTERN = (
    r'event: queued\ndata: \{.*"predicted_start_ms":\d+,.*"reason":"slots_busy".*\}\n\n'
    r'event: metrics\ndata: \{"queue_depth":1,"on_time_probability":(0|1|0\.\d+|1\.0),'
    r'"budgets":\{"tokens":\d+,"time_ms":\d+,"cost":[\d.]+\}\}\n\n'
)


def _told_of_the_wait(events: list[Event]) -> None:
    ends_in("DEADLINE_UNMET", None)(events)
    queued, metrics = events[:2]
    assert isinstance(queued, Queued)
    assert queued.frame.predicted_start_ms == 1840
    assert isinstance(metrics, Metrics)
    left = known(metrics.frame.budgets)
    assert left is not None
    assert (left.tokens, left.time_ms, left.cost) == (392, 50_000, 492.0)
    assert (known(metrics.frame.queue_depth), known(metrics.frame.on_time_probability)) == (1, 0.93)


# Affinity and preemption

RETURNED: State = (
    "the second task of a session, which succeeded",
    {"model_ref": MODEL, "task_id": task_id(5), "session_id": session_id(5)},
)
TOKENS = frame(2, "token", '{"t":" Paris","i":0}') + frame(3, "token", '{"t":".","i":1}')
TOKEN_PATTERN = r'(id: \d+\nevent: token\ndata: \{"t":".*","i":\d+\}\n\n)'


def _met_its_replica(events: list[Event]) -> None:
    started = events[0]
    assert isinstance(started, Started)
    assert (known(started.frame.affinity), started.frame.kv_warmth) == (Affinity.hit, True)


PREEMPTED: State = (
    "a batch task that is preempted once somebody follows it",
    {"model_ref": PACED_MODEL, "task_id": task_id(6), "max_tokens": PREEMPTED_TOKENS},
)
PREEMPTED_TEXT = (
    frame(1, "started", STARTED % ("null", "null"))
    + frame(2, "token", '{"t":" Paris","i":0}')
    + frame(None, "metrics", '{"queue_depth":1,"preempted":true,"resumable":true}')
    + frame(None, "metrics", '{"preempted":false,"affinity":"hit","kv_warmth":false}')
    + frame(3, "token", '{"t":".","i":1}')
    + frame(4, "end", END)
)
PREEMPTED_PATTERN = (
    r"id: 1\nevent: started\ndata: \{.*\}\n\n" + ANY_FRAMES
    + r'event: metrics\ndata: \{"queue_depth":\d+,"preempted":true,"resumable":true\}\n\n' + ANY_FRAMES
    + r'event: metrics\ndata: \{"preempted":false,"affinity":"hit","kv_warmth":false\}\n\n' + ANY_FRAMES
    + rf'id: {PREEMPTED_TOKENS + 2}\nevent: end\ndata: \{{"tokens_out":{PREEMPTED_TOKENS},.*\}}\n\n'
)  # fmt: skip


def _made_room(events: list[Event]) -> None:
    broken_off, goes_on = [event.frame for event in events if isinstance(event, Metrics)]
    assert (known(broken_off.preempted), known(broken_off.resumable), known(broken_off.queue_depth)) == (True, True, 1)
    assert (known(goes_on.preempted), known(goes_on.affinity)) == (False, Affinity.hit)
    assert known(goes_on.kv_warmth) is False


# Tasks that lost their place

DROPPED: State = ("a batch task that newer ones of its tenant dropped", {"model_ref": MODEL, "task_id": task_id(7)})


async def _reads_dropped(client: AsyncClient) -> None:
    task = await client.get_task(task_id(7))
    assert task.error is not None
    assert (task.state, task.error.code) == (TaskState.failed, ErrorCode.QUEUE_FULL_DROP_LRU)
    assert known(task.timeline.preemptions) == 0


DROPPED_TASK = Interaction(
    "a task that was dropped", "GET", f"/v1/tasks/{task_id(7)}",
    Reply(
        200,
        {
            "task_id": task_id(7), "session_id": session_id(7), "state": "failed", "workload": "completion",
            "priority": "batch", "model_ref": MODEL, "engine": "llamacpp", "determinism": "best_effort", "seed": 7,
            "labels": {}, "queue_position": None, "predicted_start_ms": None,
            "timeline": {
                "accepted_at": "2025-11-23T04:25:00.123Z", "started_at": None, "first_token_at": None,
                "ended_at": "2025-11-23T04:25:00.126Z", "waited_ms": 3, "wait_reasons": ["tasks_ahead"],
                "attempts": 0, "preemptions": 0,
            },
            "placement": None, "output": None, "finish_reason": None, "usage": None,
            "error": {
                "code": "QUEUE_FULL_DROP_LRU", "message": "for people", "engine": "llamacpp", "pool_id": None,
                "retriable": True, "retry_after_ms": None, "policy_label": "drop-lru", "details": None,
                "correlation_id": "req-1",
            },
        },
        {
            "$.task_id": EXACT, "$.session_id": UUID, "$.state": EXACT, "$.priority": EXACT, "$.seed": INTEGER,
            "$.queue_position": EXACT, "$.placement": EXACT, "$.output": EXACT, "$.finish_reason": EXACT,
            "$.usage": ANYTHING, "$.timeline.accepted_at": TIME, "$.timeline.ended_at": TIME,
            "$.timeline.started_at": EXACT, "$.timeline.attempts": EXACT, "$.timeline.preemptions": EXACT,
            "$.timeline.wait_reasons": ANYTHING, "$.error.code": EXACT, "$.error.retriable": EXACT,
            "$.error.policy_label": EXACT, "$.error.pool_id": TEXT_OR_NULL, "$.error.retry_after_ms": INTEGER_OR_NULL,
            "$.error.details": ANYTHING,
        },
    ),
    _reads_dropped, (DROPPED,),
)  # fmt: skip


# Refusals


def quota(name: str, number: int, *, knows_wait: bool, **fields: Any) -> Interaction:
    """A submission of a tenant that has reached the limit of that name."""
    state: State = ("a tenant that has reached a limit", {"model_ref": MODEL, "limit": name, "key": QUOTA_KEYS[name]})
    body = {"task_id": task_id(number), **fields}
    return refusal(
        f"a task beyond the tenant's {name}", state, 429, "QUOTA_EXCEEDED", body, policy=name, knows_wait=knows_wait,
        key=QUOTA_KEYS[name],
    )  # fmt: skip


def budget(name: str, number: int, budgets: dict[str, float], **fields: Any) -> Interaction:
    """A submission that more is asked for than a session has left."""
    state: State = (
        f"a session that has spent its {name}",
        {"model_ref": MODEL, "task_id": task_id(number), "session_id": session_id(number), "session_budgets": budgets},
    )
    body = {"task_id": task_id(number + 100), "session_id": session_id(number), **fields}
    return refusal(
        f"a task for a session whose {name} is spent", state, 429, "BUDGET_EXHAUSTED", body,
        policy=f"session-{name}", knows_wait=True,
    )  # fmt: skip


RESERVED: State = (
    "a session whose tokens a running task has reserved",
    {"model_ref": MODEL, "task_id": task_id(15), "session_id": session_id(15), "session_budgets": {"tokens": 100}},
)
OVERRUN: State = (
    "a session that has spent its time",
    {
        "model_ref": MODEL, "task_id": task_id(17), "session_id": session_id(17), "session_budgets": {"time_ms": 300},
    },
)  # fmt: skip

POLICY_INTERACTIONS = [
    ACCEPTED,
    SESSION,
    DROPPED_TASK,
    stream(
        "the stream of a task that waits for a quota", BOUND,
        frame(None, "queued", QUEUED_FOR_QUOTA) + error_frame("DEADLINE_UNMET", None),
        r'event: queued\ndata: \{.*"reason":"quota".*\}\n\n' + ANY_FRAMES + error_pattern("DEADLINE_UNMET", None),
        _waits_for_quota, key=QUOTA_KEY,
    ),
    stream(
        "the stream of a task with a deadline that waits", PATIENT, ADVISED + error_frame("DEADLINE_UNMET", None),
        ADVISED_PATTERN + ANY_FRAMES + error_pattern("DEADLINE_UNMET", None), _told_of_the_wait,
    ),
    stream(
        "the stream of a task that met its session's replica", RETURNED,
        frame(1, "started", STARTED % ("true", '"hit"')) + TOKENS + frame(4, "end", END),
        r'id: 1\nevent: started\ndata: \{.*"kv_warmth":true,"affinity":"hit".*\}\n\n' + TOKEN_PATTERN + "{2}"
        r"id: 4\nevent: end\ndata: \{.*\}\n\n", _met_its_replica,
    ),
    stream("the stream of a task that makes room", PREEMPTED, PREEMPTED_TEXT, PREEMPTED_PATTERN, _made_room),
    stream(
        "the stream of a task whose session ran out of time", OVERRUN,
        frame(1, "started", STARTED % ("null", "null")) + error_frame("BUDGET_EXHAUSTED", "session-time", 2),
        r"id: 1\nevent: started\ndata: \{.*\}\n\n" + ANY_FRAMES
        + error_pattern("BUDGET_EXHAUSTED", "session-time", 2),
        ends_in("BUDGET_EXHAUSTED", "session-time"),
    ),
    lost(
        "the stream of a task that was dropped",
        ("a batch task that newer ones of its tenant dropped", {"model_ref": MODEL, "task_id": task_id(8)}),
        "QUEUE_FULL_DROP_LRU", "drop-lru",
    ),
    lost(
        "the stream of a task beyond its tenant's fair share",
        ("a task whose place went to another tenant", {"model_ref": MODEL, "task_id": task_id(9)}),
        "ADMISSION_REJECT", "fair-share",
    ),
    lost(
        "the stream of a batch task that was shed",
        ("a batch task that was shed for an interactive one", {"model_ref": PACED_MODEL, "task_id": task_id(10)}),
        "ADMISSION_REJECT", "shed-low-priority",
    ),
    quota("max-queued", 11, knows_wait=False),
    quota("rate", 12, knows_wait=True),
    quota("tokens-per-minute", 13, knows_wait=True, max_tokens=40),
    budget("tokens", 14, {"tokens": 100}, max_tokens=80),
    budget("cost", 16, {"cost": 100.0}, max_tokens=80),
    budget("time", 18, {"time_ms": 300}),
    refusal(
        "a task for a session whose tokens are reserved", RESERVED, 429, "BUDGET_EXHAUSTED",
        {"task_id": task_id(115), "session_id": session_id(15), "max_tokens": 80},
        policy="session-tokens", knows_wait=False,
    ),
    refusal(
        "a task with other budgets than its session has", WITH_BUDGETS, 422, "INVALID_PARAMS",
        {"task_id": task_id(102), "session_id": session_id(2), "session_budgets": {"tokens": 7}},
        policy=None, knows_wait=False,
    ),
    refusal(
        "a task whose deadline cannot be met", BUDGETED, 422, "DEADLINE_UNMET",
        {"task_id": task_id(19), "model_ref": PACED_MODEL, "deadline_ms": 100}, policy="deadline", knows_wait=True,
        details={"predicted_start_ms": 4100, "predicted_run_ms": 1500},
    ),
    refusal(
        "an interactive task for a full queue with nothing to shed",
        ("a full queue without a batch task, at known rates", {"model_ref": PACED_MODEL}), 429, "ADMISSION_REJECT",
        {"task_id": task_id(20), "model_ref": PACED_MODEL}, policy="shed-low-priority", knows_wait=True,
    ),
]  # fmt: skip
