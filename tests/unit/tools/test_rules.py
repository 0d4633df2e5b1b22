"""What regen demands of a contract; each rule is broken once in the real one."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.contract import rules
from tools.contract.source import Contract, load_contract

FOLDER = Path(__file__).resolve().parents[3] / "openapi"
Break = Callable[[Contract], object]


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract(FOLDER)


def create(c: Contract) -> Any:
    return c.specs["data"]["paths"]["/v1/tasks"]["post"]


def schema(c: Contract, name: str) -> Any:
    return c.specs["data"]["components"]["schemas"][name]


def request(c: Contract) -> Any:
    return create(c)["requestBody"]["content"]["application/json"]


def accepted(c: Contract) -> Any:
    return create(c)["responses"]["202"]


def test_the_contract_keeps_every_rule(contract: Contract) -> None:
    assert rules.faults(contract) == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda c: create(c).pop("x-req-id"), "data: post /v1/tasks: no x-req-id"),
        (lambda c: create(c).update({"x-req-id": "A-1"}), "data: post /v1/tasks: 'A-1' is no requirement ID"),
        (lambda c: schema(c, "Task").pop("x-req-id"), "data: schema Task: no x-req-id"),
        (lambda c: create(c).pop("operationId"), "data: post /v1/tasks: operationId None is not in snake_case"),
        (lambda c: create(c).pop("x-scope"), "data: post /v1/tasks: x-scope None is none of"),
        (
            lambda c: create(c).update(security=[]),
            "data: post /v1/tasks: x-scope none and an empty security go together",
        ),
        (lambda c: create(c).update(parameters=[]), "data: post /v1/tasks: the parameter X-Correlation-Id is missing"),
        (lambda c: request(c).pop("examples"), "data: post /v1/tasks request body application/json: no example"),
        (
            lambda c: request(c)["examples"]["prompt"]["value"].update(max_tokens="16"),
            "data: post /v1/tasks request body application/json: an example does not fit its schema",
        ),
        (
            lambda c: schema(c, "Message")["example"].update(role="robot"),
            "data: schema Message: an example does not fit its schema",
        ),
        (
            lambda c: accepted(c).pop("headers"),
            "data: post /v1/tasks response 202: the header X-Correlation-Id is missing",
        ),
        (
            lambda c: accepted(c)["content"]["application/json"].pop("examples"),
            "data: post /v1/tasks response 202 application/json: no example",
        ),
        (
            lambda c: c.specs["data"]["components"]["responses"]["Conflict"]["content"]["application/json"].update(
                schema={"$ref": "#/components/schemas/ProblemDetails"}
            ),
            "data: post /v1/tasks response 409: an error must be application/json of the schema Problem",
        ),
        (
            lambda c: create(c).update(responses={"202": accepted(c)}),
            "data: post /v1/tasks: no error is declared",
        ),
        (lambda c: create(c)["responses"].pop("202"), "data: post /v1/tasks: no success is declared"),
        (
            lambda c: schema(c, "Message").pop("additionalProperties"),
            "Message: an object of a request must say additionalProperties: false",
        ),
        (
            lambda c: schema(c, "Sampling")["properties"]["stop"].update(uniqueItems=True),
            "Sampling.stop: `uniqueItems` in a request is more than its model can hold",
        ),
        (lambda c: schema(c, "Uuid").pop("pattern"), "Uuid: a text format in a request needs a pattern"),
        (lambda c: schema(c, "TaskRequest")["oneOf"].pop(), "TaskRequest: oneOf must be the `required` of each name"),
        (lambda c: c.config.pop("x-req-id"), "config: no x-req-id"),
        (
            lambda c: c.config["$defs"]["Queue"].pop("additionalProperties"),
            "config: Queue: additionalProperties must be false",
        ),
        (
            lambda c: c.config["$defs"]["Queue"]["properties"]["capacity"].pop("description"),
            "config: Queue: capacity: no",
        ),
        (
            lambda c: c.config["$defs"]["Queue"]["properties"]["capacity"].update(default=0),
            "config: Queue.capacity: the default 0 does not fit",
        ),
        (
            lambda c: c.metrics["families"][0].pop("x-req-id"),
            "metrics.yaml: tasks_enqueued_total: `x-req-id` is missing",
        ),
        (
            lambda c: c.metrics["families"][0].update(type="summary"),
            "metrics.yaml: tasks_enqueued_total: type 'summary'",
        ),
        (
            lambda c: c.metrics["families"][0].update(buckets=[1]),
            "metrics.yaml: tasks_enqueued_total: a histogram, and",
        ),
        (
            lambda c: c.metrics["families"].append(c.metrics["families"][0]),
            "metrics.yaml: declared twice: tasks_enqueued_total",
        ),
    ],
)
def test_each_rule_names_the_place_that_broke_it(contract: Contract, damage: Break, fault: str) -> None:
    broken = copy.deepcopy(contract)
    damage(broken)
    found = rules.faults(broken)
    assert any(line.startswith(fault) for line in found), found
