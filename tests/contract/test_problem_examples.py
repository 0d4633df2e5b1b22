"""ORCH-2006: what the contract shows of an error is what the service says of it: code, status and `retriable`."""

from collections.abc import Iterator
from typing import Any

import pytest

from llorch import errors
from llorch.api.problems import STATUS
from llorch.errors import LlorchError
from llorch_contract.specs import load_spec

NEVER_SENT = {errors.LlorchError, errors.ConfigError, errors.LaunchError, errors.DeterminismViolation}
"""Leave as Internal."""


def kinds(root: type[LlorchError] = LlorchError) -> Iterator[type[LlorchError]]:
    yield root
    for kind in root.__subclasses__():
        yield from kinds(kind)


def examples() -> Iterator[Any]:
    """(name, status, envelope) of every error of every operation."""
    for spec in (load_spec("data"), load_spec("control")):
        for path, item in spec["paths"].items():
            for method, operation in item.items():
                for status, answer in operation["responses"].items():
                    if status >= "400":
                        yield from _examples_of(f"{method} {path}", int(status), _resolved(spec, answer))


def _examples_of(operation: str, status: int, answer: dict[str, Any]) -> Iterator[Any]:
    for name, example in answer["content"]["application/json"].get("examples", {}).items():
        if "code" in example["value"]:
            yield pytest.param(status, example["value"], id=f"{operation} {status} {name}")


def _resolved(spec: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        found: Any = spec
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


@pytest.mark.parametrize(("status", "envelope"), [*examples()])
def test_example_says_what_the_service_would(status: int, envelope: dict[str, Any]) -> None:
    of_code = [kind for kind in kinds() if kind.code == envelope["code"] and kind in STATUS]
    fitting = [kind for kind in of_code if STATUS[kind] == status and kind not in NEVER_SENT]
    assert fitting, f"no error has {envelope['code']} and {status}"
    assert envelope["retriable"] in {kind.retriable for kind in fitting}


def test_everything_that_time_can_mend_is_retriable() -> None:
    """A queue, a quota, a budget and a deadline change by themselves; a request and a key do not."""
    assert {kind.code for kind in kinds() if kind.retriable} == {
        "ADMISSION_REJECT", "QUEUE_FULL_DROP_LRU", "QUOTA_EXCEEDED", "BUDGET_EXHAUSTED", "DEADLINE_UNMET",
        "POOL_UNREADY", "POOL_UNAVAILABLE", "REPLICA_EXHAUSTED", "DECODE_TIMEOUT", "WORKER_RESET",
        "DETERMINISM_VIOLATION", "INTERNAL",
    }  # fmt: skip
