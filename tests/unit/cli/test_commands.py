"""The commands that speak to a server, against one: what is on stdout, what is on stderr, and the exit code."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llorch.cli.exits import MEANINGS, Exit
from llorch.cli.main import cli
from tests.unit.client.scripted_server import (
    CANCEL,
    CANCELED,
    END,
    STARTED,
    TASK,
    TASK_ID,
    Reply,
    ScriptedServer,
    accepted,
    body,
    frame,
    problem,
    stream,
    transcript,
)

ROUTE = {
    "engine": "llamacpp", "model": "tiny", "quant": "default", "ctx_max": 2048, "sampler_profile_version": "v1",
    "workloads": ["completion"], "priorities": ["interactive"], "determinism": ["exact"], "features": ["prompt"],
    "allow_cpu": True,
}  # fmt: skip
LIMITS = dict.fromkeys(
    (
        "body_bytes", "header_bytes", "prompt_chars", "max_tokens", "open_streams", "session_ttl_ms", "session_turns",
        "disconnect_grace_ms", "transcript_retention_ms",
    ),
    1,
)  # fmt: skip
FAILURE = {
    "code": "DECODE_TIMEOUT", "message": "the engine was silent", "engine": "llamacpp", "pool_id": "p",
    "retriable": True, "retry_after_ms": None, "policy_label": None, "details": None, "correlation_id": "c",
}  # fmt: skip
WHOLE = transcript("Hel", "lo")
SUMMARY: dict[str, Any] = {
    "task_id": TASK_ID, "session_id": TASK_ID, "state": "running", "workload": "completion", "priority": "batch",
    "model_ref": "tiny", "engine": "llamacpp", "accepted_at": "2025-11-23T04:25:00Z", "ended_at": None,
    "finish_reason": None, "error_code": None, "labels": {},
}  # fmt: skip
TASK_BODY: dict[str, Any] = {
    "task_id": TASK_ID, "session_id": TASK_ID, "state": "succeeded", "workload": "completion", "priority": "batch",
    "model_ref": "tiny", "engine": "llamacpp", "determinism": "strict", "seed": 7, "labels": {"app": "\x1b[2Jdocs"},
    "queue_position": None, "predicted_start_ms": None,
    "timeline": {
        "accepted_at": "2025-11-23T04:25:00Z", "started_at": None, "first_token_at": None, "ended_at": None,
        "waited_ms": 240, "wait_reasons": ["slots_busy"], "attempts": 1,
    },
    "placement": {"pool_id": "small", "replica_id": "small/0", "attempt": 1}, "output": {"text": "Hello"},
    "finish_reason": "stop", "usage": None, "error": None,
}  # fmt: skip


def capabilities(*models: str) -> Reply:
    routes = [{**ROUTE, "model": model} for model in models]
    return body({"api_version": "1.0", "routes": routes, "limits": LIMITS, "notices": []})


def run(server: ScriptedServer, *arguments: str, stdin: str | None = None) -> Result:
    environment = {"LLORCH_URL": server.url, "LLORCH_KEY": "llk_test"}
    return CliRunner().invoke(cli, [*arguments], input=stdin, env=environment)


def serve_task(server: ScriptedServer, *pieces: bytes) -> None:
    server.on("GET", "/v1/capabilities", capabilities("tiny"))
    server.on("POST", "/v1/tasks", accepted())
    server.on_any_stream(stream(*pieces))


def submitted(server: ScriptedServer) -> dict[str, Any]:
    found: dict[str, Any] = server.seen("POST", "/v1/tasks")[0].json
    del found["task_id"]
    return found


def test_submit_prints_the_answer_and_nothing_else(server: ScriptedServer) -> None:
    serve_task(server, *WHOLE)
    result = run(server, "submit", "Say hello")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\n", "")
    assert submitted(server) == {"model_ref": "tiny", "messages": [{"role": "user", "content": "Say hello"}]}
    assert server.requests[0].headers["authorization"] == "Bearer llk_test"


def test_submit_sends_every_option(server: ScriptedServer) -> None:
    serve_task(server, *WHOLE)
    session = "0b9f5a6c-77de-4c51-8f0e-5a3c2e1d4b60"
    result = run(
        server, "submit", "Hi", "--model", "big", "--system", "Be brief.", "--max-tokens", "5", "--priority", "batch",
        "--seed", "7", "--strict", "--temperature", "0", "--deadline-ms", "900", "--session", session,
        "--expected-tokens", "3", "--on-deadline", "abort", "--budget-tokens", "90", "--budget-time-ms", "1500",
        "--budget-cost", "0.5",
    )  # fmt: skip
    assert result.exit_code == 0
    assert submitted(server) == {
        "model_ref": "big",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_tokens": 5, "priority": "batch", "seed": 7, "determinism": "strict", "sampling": {"temperature": 0.0},
        "deadline_ms": 900, "session_id": session, "expected_tokens": 3, "on_deadline": "abort",
        "session_budgets": {"tokens": 90, "time_ms": 1500, "cost": 0.5},
    }  # fmt: skip
    assert server.seen("GET", "/v1/capabilities") == []


def test_submit_sends_no_budget_that_was_not_given(server: ScriptedServer) -> None:
    serve_task(server, *WHOLE)
    assert run(server, "submit", "Hi", "--budget-cost", "2").exit_code == 0
    assert submitted(server)["session_budgets"] == {"cost": 2.0}


def test_submit_reads_stdin_and_raw_is_a_prompt(server: ScriptedServer) -> None:
    serve_task(server, *WHOLE)
    result = run(server, "submit", "--raw", "-", stdin="Once upon\na time")
    assert result.exit_code == 0
    assert submitted(server) == {"model_ref": "tiny", "prompt": "Once upon\na time"}


def test_submit_json_is_one_object_a_line(server: ScriptedServer) -> None:
    serve_task(server, *WHOLE)
    result = run(server, "submit", "--json", "Hi")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["event"], line.get("id")) for line in lines] == [
        ("accepted", None), ("started", 1), ("token", 2), ("token", 3), ("end", 4),
    ]  # fmt: skip
    assert [line["data"] for line in lines[1:]] == [STARTED, {"t": "Hel", "i": 0}, {"t": "lo", "i": 1}, END]


@pytest.mark.parametrize("arguments", [("submit", ""), ("submit", "--raw", "--system", "s", "x"), ("submit",)])
def test_submit_without_sense_is_a_usage_error(server: ScriptedServer, arguments: tuple[str, ...]) -> None:
    assert run(server, *arguments).exit_code == Exit.USAGE
    assert server.requests == []


@pytest.mark.parametrize(("models", "told"), [((), "it has none"), (("a", "b"), "it has a, b")])
def test_submit_asks_for_the_model_where_there_is_not_exactly_one(
    server: ScriptedServer, models: tuple[str, ...], told: str
) -> None:
    server.on("GET", "/v1/capabilities", capabilities(*models))
    result = run(server, "submit", "Hi")
    assert result.exit_code == Exit.USAGE
    assert told in result.stderr


@pytest.mark.parametrize(
    ("error", "exit_code"), [(FAILURE, Exit.FAILED), ({**FAILURE, "code": "CANCELED"}, Exit.CANCELED)]
)
def test_a_task_that_ends_in_an_error_decides_the_exit_code(
    server: ScriptedServer, error: dict[str, Any], exit_code: Exit
) -> None:
    serve_task(server, *WHOLE[:2], frame(3, "error", error))
    result = run(server, "submit", "Hi")
    assert (result.exit_code, result.stdout) == (exit_code, "Hel\n")
    assert result.stderr.startswith(f"llorch: {error['code']}: the engine was silent.")


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (400, "INVALID_PARAMS", 2), (401, "UNAUTHENTICATED", 5), (403, "FORBIDDEN", 5), (404, "NOT_FOUND", 3),
        (409, "CONFLICT", 2), (410, "STREAM_GONE", 3), (413, "PAYLOAD_TOO_LARGE", 2), (422, "DEADLINE_UNMET", 4),
        (422, "INVALID_PARAMS", 2), (429, "BUDGET_EXHAUSTED", 4), (429, "QUOTA_EXCEEDED", 4),
        (429, "ADMISSION_REJECT", 4), (500, "INTERNAL", 1), (503, "POOL_UNREADY", 4),
    ],
)  # fmt: skip
def test_every_refusal_has_its_exit_code_and_one_line(
    server: ScriptedServer, status: int, code: str, exit_code: int
) -> None:
    server.on("POST", CANCEL, problem(status, code, "first\nsecond \x1b[31mline"))
    result = run(server, "cancel", TASK_ID)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.startswith(f"llorch: {code}: first second  [31mline.")
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr


def test_a_refusal_tells_when_to_come_back(server: ScriptedServer) -> None:
    full = problem(429, "ADMISSION_REJECT", retriable=True, X_Backoff_Ms="1730")
    server.on("POST", CANCEL, full)
    result = run(server, "cancel", TASK_ID, "--patience", "0")
    assert "Try again in 1.7 s" in result.stderr
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "code", "advice", "hint"),
    [
        (422, "DEADLINE_UNMET", {"X_Backoff_Ms": "2600"}, "Try again in 2.6 s, or give it a longer --deadline-ms."),
        (422, "DEADLINE_UNMET", {}, "Try again later, or give it a longer --deadline-ms."),
        (429, "BUDGET_EXHAUSTED", {"Retry_After": "412"}, "Try again in 412.0 s, or use another session."),
        (429, "BUDGET_EXHAUSTED", {}, "Try again later, or use another session."),
        (429, "QUOTA_EXCEEDED", {"X_Backoff_Ms": "240"}, "Try again in 0.2 s, or wait longer with --patience."),
    ],
)
def test_a_refusal_of_a_policy_tells_what_helps(
    server: ScriptedServer, status: int, code: str, advice: dict[str, str], hint: str
) -> None:
    server.on("POST", "/v1/tasks", problem(status, code, retriable=True, **advice))
    result = run(server, "submit", "--model", "tiny", "Hi", "--patience", "0")
    assert result.exit_code == Exit.REFUSED
    assert result.stderr.endswith(f"{hint}\n")
    assert len(server.requests) == 1


def test_a_refusal_is_waited_for_within_patience(server: ScriptedServer) -> None:
    server.on("POST", CANCEL, problem(429, "ADMISSION_REJECT", retriable=True, X_Backoff_Ms="1"), CANCELED)
    assert run(server, "cancel", TASK_ID).exit_code == 0
    assert len(server.requests) == 2


def test_no_server_is_its_own_exit_code() -> None:
    result = CliRunner().invoke(cli, ["pools", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == Exit.UNREACHABLE
    assert "llorch: UNREACHABLE: cannot connect to http://127.0.0.1:9" in result.stderr


def test_an_address_of_no_server_is_a_usage_error() -> None:
    assert CliRunner().invoke(cli, ["pools", "--url", "localhost:8080"]).exit_code == Exit.USAGE


def test_something_that_is_no_llorch_is_told(server: ScriptedServer) -> None:
    server.on("GET", TASK, body({"hello": "world"}))
    result = run(server, "status", TASK_ID)
    assert result.exit_code == Exit.UNREACHABLE
    assert result.stderr.startswith("llorch: PROTOCOL: ")


def test_status_shows_a_task_without_letting_it_steer_the_terminal(server: ScriptedServer) -> None:
    server.on("GET", TASK, body(TASK_BODY))
    result = run(server, "status", TASK_ID)
    assert result.exit_code == 0
    for shown in ("succeeded", "strict, seed 7", "240 ms, slots_busy", "small/0, attempt 1", "Hello"):
        assert shown in result.stdout
    assert "\x1b" not in result.stdout


def test_status_tells_why_a_task_lost_its_place(server: ScriptedServer) -> None:
    error = {**FAILURE, "code": "QUEUE_FULL_DROP_LRU", "retry_after_ms": 2210, "policy_label": "drop-lru"}
    timeline = {**TASK_BODY["timeline"], "preemptions": 2, "wait_reasons": ["quota"]}
    server.on("GET", TASK, body({**TASK_BODY, "state": "failed", "error": error, "timeline": timeline}))
    shown = {
        line.partition("  ")[0]: line.partition("  ")[2].strip()
        for line in run(server, "status", TASK_ID).stdout.splitlines()
    }
    assert (shown["preempted"], shown["waited"]) == ("2 times", "240 ms, quota")
    assert shown["error"].startswith("QUEUE_FULL_DROP_LRU: ")
    assert (shown["policy"], shown["try again"]) == ("drop-lru", "in 2210 ms")


def test_status_of_a_session_tells_what_is_left_of_it(server: ScriptedServer) -> None:
    session = "0b9f5a6c-77de-4c51-8f0e-5a3c2e1d4b60"
    server.on("GET", "/v1/tasks", body({"tasks": [SUMMARY], "next_cursor": None}))
    kept = {
        "session_id": session, "ttl_ms_remaining": 534210, "turns": 2, "turns_max": 8, "kv_bytes": None,
        "kv_warmth": True, "budgets": {"tokens": 18211, "time_ms": None, "cost": 4.25},
    }  # fmt: skip
    server.on("GET", f"/v1/sessions/{session}", body(kept), problem(404, "NOT_FOUND"))
    *_, last = run(server, "status", "--session", session).stdout.splitlines()
    assert last == (
        "session: 2 of 8 turns · ends in 534 s unless used · KV cache warm · budget left: 18211 tokens, cost 4.25"
    )
    _, row = run(server, "status", "--session", session).stdout.splitlines()
    assert row.startswith(TASK_ID)
    assert [json.loads(run(server, "status", "--session", session, "--json").stdout)] == [SUMMARY]


def test_status_json_is_the_task(server: ScriptedServer) -> None:
    server.on("GET", TASK, body(TASK_BODY))
    assert json.loads(run(server, "status", TASK_ID, "--json").stdout) == TASK_BODY


def test_status_lists_over_pages_up_to_the_limit(server: ScriptedServer) -> None:
    server.on(
        "GET", "/v1/tasks",
        body({"tasks": [SUMMARY], "next_cursor": "AA"}), body({"tasks": [SUMMARY, SUMMARY], "next_cursor": "BB"}),
    )  # fmt: skip
    result = run(server, "status", "--json", "--limit", "3", "--state", "running")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [SUMMARY] * 3
    assert [request.query for request in server.requests] == [
        {"state": "running", "limit": "3"},
        {"state": "running", "limit": "2", "cursor": "AA"},
    ]


def test_status_as_a_table_cuts_nothing_in_a_pipe(server: ScriptedServer) -> None:
    server.on("GET", "/v1/tasks", body({"tasks": [SUMMARY], "next_cursor": None}))
    header, row = run(server, "status").stdout.splitlines()
    assert header.split() == ["task", "state", "priority", "model", "accepted", "ended", "outcome"]
    assert row.split() == [TASK_ID, "running", "batch", "tiny", "2025-11-23T04:25:00Z"]


def test_help_documents_every_exit_code() -> None:
    shown = CliRunner().invoke(cli, ["--help"]).stdout
    assert set(MEANINGS) == set(Exit)
    for code, meaning in MEANINGS.items():
        assert f"{code.value:>3}  {meaning}" in shown
