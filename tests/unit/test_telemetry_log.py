"""OC-CTRL-2041: no secret in any log; ORCH-3027: one form for every line of the process."""

import ast
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from llorch import telemetry_log

SRC = Path(__file__).resolve().parents[2] / "src" / "llorch"

CANARIES = ["llk_c4n4ryc4n4ry-_x", "Bearer c4n4ry.token/x=", "basic c4n4ry==", 'c4n4ry "engine" key']


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("canary", CANARIES)
def test_no_key_appears_wherever_it_stands(form: str, canary: str) -> None:
    out = io.BytesIO()
    log = telemetry_log.make_logger("debug", form, stream=out, secrets=['c4n4ry "engine" key', ""])
    event = f"with {canary}"
    log.info(event, url=f"http://{canary}", stack=[f"in {canary}"], tenant="acme")
    text = out.getvalue().decode()
    assert "c4n4ry" not in text
    assert telemetry_log.REDACTED in text
    assert "acme" in text


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize(
    "name", ["prompt", "messages", "text", "t", "authorization", "api_key", "headers", "body", "output"]
)
def test_field_that_is_not_known_to_be_harmless_is_withheld(form: str, name: str) -> None:
    out = io.BytesIO()
    telemetry_log.make_logger("debug", form, stream=out).info("x", **{name: "canary"})
    assert b"canary" not in out.getvalue()
    assert telemetry_log.WITHHELD.encode() in out.getvalue()


def test_every_field_that_the_code_logs_is_known() -> None:
    logged: set[str] = set()
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(r"\b_?log\.(debug|info|warning|error)", ast.unparse(node.func)):
                logged |= {word.arg for word in node.keywords if word.arg}
    assert {"pool_id", "notice"} <= logged
    assert logged - telemetry_log.FIELDS - {"exc_info"} == set()


# One form for the whole process


@pytest.fixture
def out() -> Iterator[io.BytesIO]:
    """What the process logs; everything is put back afterwards."""
    root, stream = logging.getLogger(), io.BytesIO()
    names = ["uvicorn", "uvicorn.error", "llorch"]
    before = root.handlers[:], root.level, [logging.getLogger(name).level for name in names]
    yield stream
    root.handlers[:], level, levels = before
    root.setLevel(level)
    for name, old in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(old)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def test_lines_of_the_web_server_have_the_same_form(out: io.BytesIO) -> None:
    telemetry_log.set_up("info", "json", stream=out)
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    line = json.loads(out.getvalue())
    assert (line["event"], line["level"], line["logger"]) == ("Started server process [7]", "info", "uvicorn.error")


def test_libraries_cannot_quote_a_request(out: io.BytesIO) -> None:
    telemetry_log.set_up("debug", "json", stream=out)
    logging.getLogger("connexion.validators").error("%s validation error: %s", "/v1/tasks", "'canary' is too long")
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: ValueError('canary')")
    logging.getLogger("httpx").info("HTTP Request: canary")
    try:
        raise ValueError("canary")
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    text = out.getvalue().decode()
    assert "canary" not in text
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert events == ["%s validation error: %s", "a library logged a message", "Exception in ASGI application"]
    assert json.loads(text.splitlines()[2])["exception"] == "ValueError"


def test_loggers_that_modules_made_before_follow_the_last_set_up(out: io.BytesIO) -> None:
    early = structlog.get_logger("llorch.api")
    telemetry_log.set_up("info", "json", stream=io.BytesIO())
    early.info("first")
    telemetry_log.set_up("warning", "json", stream=out)
    early.info("too quiet")
    early.warning("second", notice="x")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["second"]


def test_console_lines_are_for_people(out: io.BytesIO) -> None:
    telemetry_log.set_up("info", "console", stream=out).info("serving", url="http://127.0.0.1:8080")
    text = out.getvalue().decode()
    assert "serving" in text
    assert "url=http://127.0.0.1:8080" in text
    assert not text.startswith("{")
