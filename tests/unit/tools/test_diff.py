"""What counts as breaking when a contract replaces another."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.contract.diff import Change, compare_config, compare_metrics, compare_specs
from tools.contract.source import load_contract

FOLDER = Path(__file__).resolve().parents[3] / "openapi"
Document = dict[str, Any]
Edit = Callable[[Document], object]

SPEC: Document = {
    "security": [{"key": []}],
    "paths": {
        "/things": {
            "post": {
                "operationId": "create_thing",
                "x-scope": "data",
                "parameters": [
                    {"name": "q", "in": "query", "required": False, "schema": {"type": "string", "maxLength": 9}}
                ],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}},
                },
                "responses": {
                    "200": {
                        "headers": {"X-Id": {"required": True, "schema": {"type": "string"}}},
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Reply"}}},
                    },
                    "404": {"content": {}},
                },
            },
            "get": {"operationId": "list_things", "x-scope": "none", "security": [], "parameters": [], "responses": {}},
        },
    },
    "components": {
        "schemas": {
            "Request": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name"],
                "x-exactly-one": ["a", "b"],
                "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^a"},
                    "kind": {"allOf": [{"$ref": "#/components/schemas/Kind"}], "default": "x"},
                    "size": {"type": "integer", "minimum": 0, "maximum": 10, "nullable": True},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}},
                    "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 5}},
                    "a": {"type": "string"},
                    "b": {"type": "string"},
                },
            },
            "Reply": {
                "type": "object",
                "required": ["id", "kind"],
                "properties": {
                    "id": {"type": "string", "maxLength": 9},
                    "kind": {"$ref": "#/components/schemas/State"},
                    "size": {"type": "integer", "nullable": True},
                    "inner": {"$ref": "#/components/schemas/Reply"},
                },
            },
            "Kind": {"type": "string", "enum": ["x", "y"]},
            "State": {"type": "string", "enum": ["up", "down"]},
            "Frame": {"type": "object", "required": ["t"], "properties": {"t": {"type": "string"}}},
        }
    },
}


def post(d: Document) -> Any:
    return d["paths"]["/things"]["post"]


def schema(d: Document, name: str) -> Any:
    return d["components"]["schemas"][name]


def field(d: Document, name: str, key: str) -> Any:
    return schema(d, name)["properties"][key]


def changed(old: Document, edit: Edit, compare: Callable[[str, Document, Document], list[Change]]) -> list[Change]:
    new = copy.deepcopy(old)
    edit(new)
    return compare("spec", old, new)


BREAKING: list[tuple[Edit, str]] = [
    (lambda d: d["paths"].pop("/things"), "POST /things: removed"),
    (lambda d: d["paths"]["/things"].pop("get"), "GET /things: removed"),
    (lambda d: post(d).update(operationId="make_thing"), "POST /things: operationId create_thing became make_thing"),
    (lambda d: post(d).update({"x-scope": "admin"}), "POST /things: scope data became admin"),
    (lambda d: d["paths"]["/things"]["get"].pop("security"), "GET /things: security [] became"),
    (lambda d: d["paths"]["/things"]["get"].update({"x-scope": "any"}), "GET /things: scope none became any"),
    (lambda d: post(d)["parameters"].pop(), "POST /things: query parameter q removed"),
    (
        lambda d: post(d)["parameters"].append({"name": "r", "in": "query", "required": True, "schema": {}}),
        "POST /things: required query parameter r added",
    ),
    (lambda d: post(d)["parameters"][0].update(required=True), "POST /things parameter q: became required"),
    (lambda d: post(d)["parameters"][0]["schema"].update(maxLength=8), "parameter q: maxLength 9 became 8"),
    (lambda d: post(d)["requestBody"]["content"].clear(), "request: media type application/json removed"),
    (lambda d: post(d)["responses"].pop("404"), "POST /things: response 404 removed"),
    (lambda d: post(d)["responses"].update({"204": {}}), "POST /things: response 204 added"),
    (lambda d: post(d)["responses"]["200"]["content"].clear(), "response 200: media type application/json removed"),
    (lambda d: post(d)["responses"]["200"]["headers"].clear(), "response 200: header X-Id removed"),
    (lambda d: post(d)["responses"]["200"]["headers"]["X-Id"].update(required=False), "header X-Id may be absent"),
    (lambda d: schema(d, "Request")["required"].append("size"), "request .size: became required"),
    (lambda d: schema(d, "Request")["properties"].pop("size"), "request .size: removed"),
    (
        lambda d: schema(d, "Request").update(
            properties={**schema(d, "Request")["properties"], "new": {}}, required=["name", "new"]
        ),
        "request .new: added and required",
    ),
    (lambda d: schema(d, "Kind")["enum"].remove("y"), "request .kind: enum value y removed"),
    (lambda d: field(d, "Request", "name").update(enum=["abc"]), "request .name: enum added"),
    (lambda d: field(d, "Request", "kind").update(default="y"), "request .kind: default 'x' became 'y'"),
    (lambda d: field(d, "Request", "name").update(minLength=2), "request .name: minLength 1 became 2"),
    (lambda d: field(d, "Request", "name").update(pattern="^b"), "request .name: pattern '^a' became '^b'"),
    (lambda d: field(d, "Request", "a").update(pattern="^b"), "request .a: pattern None became '^b'"),
    (lambda d: field(d, "Request", "a").update(maxLength=3), "request .a: maxLength None became 3"),
    (lambda d: field(d, "Request", "size").update(maximum=9), "request .size: maximum 10 became 9"),
    (lambda d: field(d, "Request", "size").update(minimum=1), "request .size: minimum 0 became 1"),
    (lambda d: field(d, "Request", "size").update(exclusiveMinimum=True), "request .size: exclusiveMinimum None"),
    (lambda d: field(d, "Request", "size").update(type="string"), ".size: type integer|null became null|string"),
    (lambda d: field(d, "Request", "size").pop("nullable"), "request .size: type integer|null became integer"),
    (lambda d: field(d, "Request", "tags")["items"].update(maxLength=4), "request .tags[]: maxLength 5 became 4"),
    (lambda d: field(d, "Request", "labels").update(maxProperties=4), "request .labels: maxProperties None became 4"),
    (
        lambda d: field(d, "Request", "labels")["additionalProperties"].update(maxLength=4),
        "request .labels.*: maxLength 5 became 4",
    ),
    (lambda d: field(d, "Request", "labels").update(additionalProperties=False), "additional properties"),
    (lambda d: field(d, "Request", "tags").update({"x-new-rule": 1}), "request .tags: x-new-rule None became 1"),
    (
        lambda d: schema(d, "Request").update({"x-exactly-one": ["a", "size"]}),
        "request: exactly one of a, b became exactly one of a, size",
    ),
    (lambda d: schema(d, "Reply")["properties"].pop("size"), "response 200 .size: removed"),
    (lambda d: schema(d, "Reply")["required"].remove("id"), "response 200 .id: may be absent"),
    (lambda d: schema(d, "State")["enum"].append("gone"), "response 200 .kind: enum value gone added; clients that"),
    (lambda d: field(d, "Reply", "id").update(nullable=True), "response 200 .id: type string became null|string"),
    (lambda d: field(d, "Reply", "id").update(type="integer"), "response 200 .id: type string became integer"),
    (lambda d: field(d, "Reply", "size").update(type="number"), ".size: type integer|null became null|number"),
    (lambda d: field(d, "Frame", "t").update(type="integer"), "schema Frame .t: type string became integer"),
    (lambda d: d["components"]["schemas"].pop("Frame"), "schema Frame: removed"),
]  # fmt: skip

ADDITIVE: list[tuple[Edit, str]] = [
    (lambda d: d["paths"].update({"/more": {"get": {"operationId": "x"}}}), "GET /more: added"),
    (lambda d: post(d).update({"x-scope": "any"}), "POST /things: scope data became any"),
    (
        lambda d: post(d)["parameters"].append({"name": "r", "in": "query", "required": False, "schema": {}}),
        "POST /things: optional query parameter r added",
    ),
    (lambda d: post(d)["parameters"][0]["schema"].update(maxLength=10), "parameter q: maxLength 9 became 10"),
    (lambda d: post(d)["requestBody"].update(required=False), "POST /things: request body became optional"),
    (lambda d: post(d)["responses"].update({"409": {}}), "POST /things: response 409 added"),
    (lambda d: post(d)["responses"]["200"]["headers"].update({"X-B": {}}), "response 200: header X-B added"),
    (lambda d: schema(d, "Request")["properties"].update(new={}), "request .new: added"),
    (lambda d: schema(d, "Request")["required"].clear(), "request .name: became optional"),
    (lambda d: schema(d, "Kind")["enum"].append("z"), "request .kind: enum value z added"),
    (lambda d: field(d, "Request", "name").update(maxLength=10), "request .name: maxLength 9 became 10"),
    (lambda d: field(d, "Request", "name").pop("pattern"), "request .name: pattern '^a' became None"),
    (lambda d: field(d, "Request", "size").update(type="number"), ".size: type integer|null became null|number"),
    (lambda d: field(d, "Request", "a").update(nullable=True), "request .a: type string became null|string"),
    (
        lambda d: schema(d, "Request").update(
            {"x-exactly-one": ["a", "b", "c"], "oneOf": [{"required": [name]} for name in "abc"]}
        ),
        "request: exactly one of a, b became exactly one of a, b, c",
    ),
    (lambda d: schema(d, "Reply")["properties"].update(new={}), "response 200 .new: added"),
    (lambda d: schema(d, "Reply")["required"].append("size"), "response 200 .size: always there"),
    (lambda d: schema(d, "State")["enum"].remove("down"), "response 200 .kind: enum value down removed"),
    (lambda d: field(d, "Reply", "id").update(maxLength=99), "response 200 .id: maxLength 9 became 99"),
    (lambda d: field(d, "Reply", "size").pop("nullable"), "response 200 .size: type integer|null became integer"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "line"), BREAKING, ids=[line for _, line in BREAKING])
def test_change_that_breaks_clients_is_breaking(edit: Edit, line: str) -> None:
    found = changed(SPEC, edit, compare_specs)
    assert any(change.breaking and line in str(change) for change in found), [str(change) for change in found]


@pytest.mark.parametrize(("edit", "line"), ADDITIVE, ids=[line for _, line in ADDITIVE])
def test_change_that_only_adds_is_not_breaking(edit: Edit, line: str) -> None:
    found = changed(SPEC, edit, compare_specs)
    assert any(line in str(change) for change in found), [str(change) for change in found]
    assert not any(change.breaking for change in found), [str(change) for change in found]


@pytest.mark.parametrize(
    "edit",
    [
        lambda _d: None,
        lambda d: schema(d, "Request").update(description="other words", example={}),
        lambda d: schema(d, "Reply").update({"x-req-id": ["ORCH-2001"]}),
        lambda d: post(d).update(summary="other words", tags=["things"]),
    ],
)
def test_words_and_examples_are_no_change(edit: Edit) -> None:
    assert changed(SPEC, edit, compare_specs) == []


def test_breaking_changes_are_told_first() -> None:
    def edit(d: Document) -> None:
        schema(d, "Request")["properties"].update(new={})
        schema(d, "Reply")["properties"].pop("size")

    assert [change.breaking for change in changed(SPEC, edit, compare_specs)][:2] == [True, False]


CONFIG = load_contract(FOLDER).config
METRICS: Document = {
    "families": [
        {"name": "a", "type": "histogram", "unit": "ms", "labels": ["x", "y"], "buckets": [1, 2], "max_series": 4},
        {"name": "b", "type": "gauge", "labels": []},
    ]
}


def part(d: Document, name: str) -> Any:
    return d["$defs"][name]


@pytest.mark.parametrize(
    ("edit", "breaking", "line"),
    [
        (lambda d: part(d, "Queue")["properties"].pop("capacity"), True, "spec .pools[].queue.capacity: removed"),
        (lambda d: part(d, "Pool")["required"].append("quant"), True, "spec .pools[].quant: became required"),
        (
            lambda d: part(d, "Pool").update(
                required=["new"], properties={**part(d, "Pool")["properties"], "new": {"type": "string"}}
            ),
            True,
            "spec .pools[].new: added and required",
        ),
        (lambda d: part(d, "LogLevel")["enum"].remove("debug"), True, "spec .log.level: enum value debug removed"),
        (
            lambda d: part(d, "Server")["properties"]["port"].update(default=80),
            True,
            "spec .server.port: default 8080 became 80",
        ),
        (
            lambda d: part(d, "Timeouts")["properties"]["idle_s"].update(exclusiveMinimum=1),
            True,
            "spec .pools[].timeouts.idle_s: exclusiveMinimum 0 became 1",
        ),
        (
            lambda d: part(d, "Queue")["properties"].update(new={"type": "string"}),
            False,
            "spec .pools[].queue.new: added",
        ),
        (
            lambda d: part(d, "FullPolicy")["enum"].append("drop-newest"),
            False,
            "queue.full_policy.batch: enum value drop-newest added",
        ),
    ],
)
def test_configuration_change_is_judged_by_what_old_files_meet(edit: Edit, breaking: bool, line: str) -> None:
    found = changed(CONFIG, edit, compare_config)
    assert any(change.breaking is breaking and line in str(change) for change in found), [str(c) for c in found]
    assert any(change.breaking for change in found) is breaking


@pytest.mark.parametrize(
    ("edit", "breaking", "line"),
    [
        (lambda d: d["families"].pop(), True, "spec: b: removed"),
        (lambda d: d["families"][0].update(type="counter"), True, "spec: a: type histogram became counter"),
        (lambda d: d["families"][0].update(unit="s"), True, "spec: a: unit ms became s"),
        (lambda d: d["families"][0]["labels"].remove("x"), True, "spec: a: label x removed"),
        (lambda d: d["families"][0]["buckets"].remove(2), True, "spec: a: bucket 2 removed"),
        (lambda d: d["families"][0]["labels"].append("z"), False, "spec: a: label z added"),
        (lambda d: d["families"][0]["buckets"].append(3), False, "spec: a: bucket 3 added"),
        (lambda d: d["families"][0].update(max_series=3), False, "spec: a: max_series 4 became 3"),
        (lambda d: d["families"].append({"name": "c"}), False, "spec: c: added"),
    ],
)
def test_metric_change_is_judged_by_what_dashboards_meet(edit: Edit, breaking: bool, line: str) -> None:
    found = changed(METRICS, edit, compare_metrics)
    assert [(change.breaking, line in str(change)) for change in found] == [(breaking, True)], [str(c) for c in found]
