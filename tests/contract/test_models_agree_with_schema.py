"""The generated models and the schemas of the contract accept exactly the same bodies."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from llorch_contract import models
from llorch_contract.routes import ROUTES, Route
from llorch_contract.specs import load_spec
from tools.contract.schemas import as_draft4
from tools.contract.source import operations, resolve

Schema = dict[str, Any]

WITH_BODY = [route for route in ROUTES if route.body is not None]
BY_ID = {route.operation_id: route for route in ROUTES}
LONGEST_TEXT = 300


def request_schema(route: Route) -> Schema:
    spec = load_spec(route.spec)
    media = spec["paths"][route.path][route.method.lower()]["requestBody"]["content"]["application/json"]
    return as_draft4(spec, media["schema"])


def model_accepts(model: type[BaseModel], raw: bytes) -> bool:
    try:
        model.model_validate_json(raw)
    except ValidationError:
        return False
    return True


def valid(schema: Schema, root: Schema) -> st.SearchStrategy[Any]:
    """Values that fit `schema`, but for the number of fields of an exactly-one group: any of 0 to all of them."""
    if "$ref" in schema:
        return valid(root["definitions"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "allOf" in schema:
        return valid(schema["allOf"][0], root)
    if "anyOf" in schema:
        return st.one_of([valid(option, root) for option in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return BY_TYPE[schema.get("type", "any")](schema, root)


def texts(schema: Schema, root: Schema) -> st.SearchStrategy[Any]:
    if "pattern" in schema:
        return st.from_regex(schema["pattern"])
    least = schema.get("minLength", 0)
    return st.text(min_size=least, max_size=min(schema.get("maxLength", 40), least + 40))


def integers(schema: Schema, root: Schema) -> st.SearchStrategy[Any]:
    return st.integers(schema.get("minimum"), schema.get("maximum"))


def numbers(schema: Schema, root: Schema) -> st.SearchStrategy[Any]:
    floats = st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
    return floats | integers(schema, root)


def arrays(schema: Schema, root: Schema) -> st.SearchStrategy[Any]:
    least = schema.get("minItems", 0)
    return st.lists(
        valid(schema.get("items", {}), root), min_size=least, max_size=min(schema.get("maxItems", 4), least + 4)
    )


def objects(schema: Schema, root: Schema) -> st.SearchStrategy[Any]:
    if "properties" not in schema:
        values = schema.get("additionalProperties", {})
        inner = valid(values if isinstance(values, dict) else {}, root)
        return st.dictionaries(st.text(max_size=8), inner, max_size=4)
    fields = {name: valid(field, root) for name, field in schema["properties"].items()}
    return bodies_of(fields, schema.get("required", []), [option["required"][0] for option in schema.get("oneOf", [])])


@st.composite
def bodies_of(
    draw: st.DrawFn, fields: dict[str, st.SearchStrategy[Any]], required: list[str], group: list[str]
) -> dict[str, Any]:
    """Required fields, some others, and mostly one of the group, so that the rest decides; else none or several."""
    free = [name for name in fields if name not in required and name not in group]
    names = [*required, *draw(st.lists(st.sampled_from(free), unique=True, max_size=5) if free else st.just([]))]
    if group:
        one = draw(st.integers(0, 3)) > 0
        names += [draw(st.sampled_from(group))] if one else draw(st.lists(st.sampled_from(group), unique=True))
    return {name: draw(fields[name]) for name in names}


def anything(schema: Schema, root: Schema) -> st.SearchStrategy[Any]:
    return st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
    )


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
BY_TYPE: dict[str, Callable[[Schema, Schema], st.SearchStrategy[Any]]] = {
    "string": texts,
    "integer": integers,
    "number": numbers,
    "boolean": lambda _schema, _root: st.booleans(),
    "null": lambda _schema, _root: st.none(),
    "array": arrays,
    "object": objects,
    "any": anything,
}


def places(body: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside `body`, at any depth."""
    entries = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in entries:
        yield body, key
        yield from places(value)


def disguises(value: Any) -> list[Any]:
    """Values that a careless check would take for `value`, and its near neighbours."""
    common = [None, [], {}, "", 0, True, [value], {"value": value}]
    if isinstance(value, bool):
        return [*common, int(value), str(value).lower()]
    if isinstance(value, int | float):
        return [*common, str(value), float(value), value + 1, value - 1, -value, value + 0.5, 2**32, 4294967295, 2**64]
    if isinstance(value, str):
        return [
            *common,
            value.upper(),
            value + "\n",
            f" {value}",
            value * 2,
            value[:1],
            "x" * LONGEST_TEXT,
            "\u00e9\u0661",
        ]
    if isinstance(value, list):
        return [*common, value * 2, [*value, None], value * 20]
    if not isinstance(value, dict):
        return common
    return [*common, {**value, "extra": 1}, dict.fromkeys(map(str, range(20)), "x")]


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[Any]) -> Any:
    """A body from `whole`, damaged in none to two places."""
    body = draw(whole)
    for _ in range(draw(st.integers(0, 2))):
        found = list(places(body))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "extra", "whole"]))
        if kind == "whole" and draw(st.booleans()):
            return draw(SCALARS | st.just([body]))
        if kind == "extra" and isinstance(body, dict):
            body[draw(st.sampled_from(["extra", "Prompt", "model", "", "__class__", "model_config"]))] = draw(SCALARS)
        elif found:
            container, key = draw(st.sampled_from(found))
            if kind == "remove" and isinstance(container, dict):
                del container[key]
            else:
                container[key] = draw(st.sampled_from(disguises(container[key])))
    return body


def plain(schema: Schema, root: Schema) -> Any:
    """The plainest value that fits: only what is required, one of an exactly-one group, null where it may be."""
    inner = inside(schema, root)
    if inner is not None:
        return plain(inner, root)
    if "anyOf" in schema:
        return plain(schema["anyOf"][-1], root)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            names = [*schema.get("required", []), *[option["required"][0] for option in schema.get("oneOf", [])][:1]]
            return {name: plain(schema["properties"][name], root) for name in names}
        case "array":
            return [plain(schema["items"], root)] * schema.get("minItems", 0)
        case "string":
            return next(text for text in ("x", "https://x") if re.search(schema.get("pattern", ""), text))
        case kind:
            return {"null": None, "boolean": False}.get(str(kind), schema.get("minimum", 0))


def inside(schema: Schema, root: Schema) -> Schema | None:
    """The schema that this one only points to."""
    if "$ref" in schema:
        referred: Schema = root["definitions"][schema["$ref"].rsplit("/", 1)[1]]
        return referred
    return next(iter(schema.get("allOf", [])), None)


def at_bounds(schema: Schema, root: Schema) -> Iterator[Any]:
    """Values on and beside every bound that `schema` states, at any depth; what is beside them is plain."""
    inner = inside(schema, root)
    if inner is not None:
        yield from at_bounds(inner, root)
        return
    for option in schema.get("anyOf", []):
        yield from at_bounds(option, root)
    for keyword in ("minimum", "maximum"):
        if keyword in schema:
            yield from (schema[keyword] + step for step in (-1, 0, 1))
    for keyword, make in MAKERS.items():
        if keyword in schema:
            yield from (
                make(schema[keyword] + step, schema, root) for step in (-1, 0, 1) if schema[keyword] + step >= 0
            )
    if "items" in schema:
        yield from ([value] for value in at_bounds(schema["items"], root))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from ({"k": value} for value in at_bounds(schema["additionalProperties"], root))
    group = {option["required"][0] for option in schema.get("oneOf", [])}
    for name, field in schema.get("properties", {}).items():
        base = {key: value for key, value in plain(schema, root).items() if not (name in group and key in group)}
        yield from ({**base, name: value} for value in at_bounds(field, root))


def values_of(schema: Schema, root: Schema) -> Any:
    """A plain value of a map."""
    values = schema["additionalProperties"]
    return plain(values, root) if isinstance(values, dict) else "x"


MAKERS: dict[str, Callable[[int, Schema, Schema], Any]] = {
    "minLength": lambda size, _, __: "a" * size,
    "maxLength": lambda size, _, __: "a" * size,
    "minItems": lambda size, schema, root: [plain(schema["items"], root)] * size,
    "maxItems": lambda size, schema, root: [plain(schema["items"], root)] * size,
    "minProperties": lambda size, schema, _: dict.fromkeys(list(schema["properties"])[:size], 1),
    "maxProperties": lambda size, schema, root: dict.fromkeys(map(str, range(size)), values_of(schema, root)),
}


@pytest.mark.parametrize("route", WITH_BODY, ids=lambda route: route.operation_id)
def test_model_and_schema_agree_on_and_beside_every_bound(route: Route) -> None:
    assert route.body is not None
    schema = request_schema(route)
    validator = jsonschema_rs.Draft4Validator(schema)
    assert validator.is_valid(plain(schema, schema))
    verdicts: Counter[bool] = Counter()
    for body in at_bounds(schema, schema):
        accepted = model_accepts(route.body, json.dumps(body).encode())
        assert accepted == validator.is_valid(body), json.dumps(body)[:200]
        verdicts[accepted] += 1
    assert min(verdicts[True], verdicts[False]) * 4 > verdicts.total(), f"the bodies were one-sided: {verdicts}"


@pytest.mark.parametrize("route", WITH_BODY, ids=lambda route: route.operation_id)
def test_model_and_schema_agree_on_every_body(route: Route) -> None:
    assert route.body is not None
    schema, model = request_schema(route), route.body
    validator = jsonschema_rs.Draft4Validator(schema)
    verdicts: Counter[bool] = Counter()

    @settings(max_examples=800, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damaged(valid(schema, schema)))
    def agree(body: Any) -> None:
        raw = json.dumps(body).encode()
        accepted = model_accepts(model, raw)
        assert accepted == validator.is_valid(json.loads(raw)), raw
        verdicts[accepted] += 1

    agree()
    assert min(verdicts[True], verdicts[False]) > 100, f"the bodies were one-sided: {verdicts}"


TASK: Schema = {"model_ref": "m", "prompt": "p"}


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        (TASK, True),
        ({"model_ref": "m"}, False),
        ({"model_ref": "m", "messages": [{"role": "user", "content": "x"}]}, True),
        ({"model_ref": "m", "inputs": ["x"]}, True),
        ({**TASK, "inputs": ["x"]}, False),
        ({**TASK, "messages": [{"role": "user", "content": "x"}]}, False),
        ({**TASK, "messages": [{"role": "user", "content": "x"}], "inputs": ["x"]}, False),
        ({"model_ref": "m", "prompt": None}, False),
        ({**TASK, "messages": None}, False),
        ({**TASK, "max_tokens": True}, False),
        ({**TASK, "max_tokens": 5.0}, False),
        ({**TASK, "max_tokens": 5.5}, False),
        ({**TASK, "max_tokens": "5"}, False),
        ({**TASK, "max_tokens": 10**40}, False),
        ({**TASK, "max_tokens": None}, False),
        ({**TASK, "seed": 0}, True),
        ({**TASK, "seed": 4294967294}, True),
        ({**TASK, "seed": 4294967295}, False),
        ({**TASK, "seed": -1}, False),
        ({**TASK, "extra": 1}, False),
        ({**TASK, "priority": "Interactive"}, False),
        ({**TASK, "priority": None}, False),
        ({**TASK, "sampling": {"temperature": 1}}, True),
        ({**TASK, "sampling": {"temperature": "1"}}, False),
        ({**TASK, "sampling": {"extra": 1}}, False),
        ({**TASK, "session_budgets": {}}, False),
        ({**TASK, "session_budgets": {"tokens": 1}}, True),
        ({**TASK, "model_ref": "m\n"}, False),
        ({**TASK, "task_id": "6f1d0c5e-3b52-4f6b-9a51-0c8f5f6d2a10"}, True),
        ({**TASK, "task_id": "6F1D0C5E-3B52-4F6B-9A51-0C8F5F6D2A10"}, True),
        ({**TASK, "task_id": "{6f1d0c5e-3b52-4f6b-9a51-0c8f5f6d2a10}"}, False),
        ({**TASK, "task_id": "urn:uuid:6f1d0c5e-3b52-4f6b-9a51-0c8f5f6d2a10"}, False),
        ({**TASK, "task_id": "6f1d0c5e3b524f6b9a510c8f5f6d2a10"}, False),
        ([], False),
        (None, False),
    ],
    ids=lambda value: json.dumps(value)[:70] if not isinstance(value, bool) else str(value),
)
def test_task_request_takes_and_refuses_what_the_contract_says(body: Any, fits: bool) -> None:
    raw = json.dumps(body).encode()
    assert model_accepts(models.TaskRequest, raw) is fits
    assert jsonschema_rs.Draft4Validator(request_schema(BY_ID["create_task"])).is_valid(body) is fits


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model_ref": "m", "prompt": "p", "sampling": {"temperature": NaN}}',
        b'{"model_ref": "m", "prompt": "p", "sampling": {"temperature": Infinity}}',
        b'{"model_ref": "m", "prompt": "p", "session_budgets": {"cost": 1e400}}',
        b'{"model_ref": "m", "prompt": "p", "sampling": {"json_schema": {"a": [{"b": NaN}]}}}',
        b'{"model_ref": "m", "prompt": "p", "sampling": {"json_schema": {"a": -Infinity}}}',
        b'{"model_ref": "m", "prompt": "\xff"}',
        b'{"model_ref": "m", "prompt": "\\ud800"}',
        b'{"model_ref": "m", "prompt": "p"',
        b'{"model_ref": "m", "prompt": "p"} {}',
        b"",
    ],
)
def test_model_refuses_what_is_no_json(raw: bytes) -> None:
    assert not model_accepts(models.TaskRequest, raw)


def reply_examples() -> Iterator[tuple[str, Schema, str, Any]]:
    """(place, spec, model name, example) of every JSON example of every reply."""
    for name in ("data", "control"):
        spec = load_spec(name)
        for path, method, operation in operations(spec):
            for status, response in operation["responses"].items():
                for media in (resolve(spec, response).get("content", {}).get("application/json", {}),):
                    for key, example in media.get("examples", {}).items():
                        model = media["schema"]["$ref"].rsplit("/", 1)[1]
                        yield f"{method} {path} {status} {key}", spec, model, example["value"]


@pytest.mark.parametrize(
    ("spec", "model", "example"), [pytest.param(*rest, id=place) for place, *rest in reply_examples()]
)
def test_reply_model_reads_and_writes_the_examples_unchanged(spec: Schema, model: str, example: Any) -> None:
    read = getattr(models, model).model_validate_json(json.dumps(example))
    assert json.loads(read.model_dump_json(exclude_unset=True)) == example
    written = json.loads(read.model_dump_json())
    jsonschema_rs.Draft4Validator(as_draft4(spec, {"$ref": f"#/components/schemas/{model}"})).validate(written)


def test_client_ignores_fields_of_replies_that_it_does_not_know() -> None:
    example = {**next(e for _, _, model, e in reply_examples() if model == "TaskAccepted"), "later": 1}
    assert "later" not in models.TaskAccepted.model_validate(example).model_dump()


def frame_examples() -> Iterator[tuple[str, str, Any]]:
    """(place, event, data) of every frame that the contract shows."""
    spec = load_spec("data")
    frames = spec["components"]["schemas"]["StreamEvent"]["x-frames"]
    for event, model in frames.items():
        if "example" in spec["components"]["schemas"][model]:
            yield model, event, spec["components"]["schemas"][model]["example"]
    answer = spec["paths"]["/v1/tasks/{task_id}/stream"]["get"]["responses"]["200"]
    for key, example in answer["content"]["text/event-stream"]["examples"].items():
        yield f"stream {key}", example["value"]["event"], json.loads(example["value"]["data"])


@pytest.mark.parametrize(("event", "data"), [pytest.param(*rest, id=place) for place, *rest in frame_examples()])
def test_frame_model_reads_and_writes_the_examples_unchanged(event: str, data: Any) -> None:
    spec = load_spec("data")
    model = spec["components"]["schemas"]["StreamEvent"]["x-frames"][event]
    jsonschema_rs.Draft4Validator(as_draft4(spec, {"$ref": f"#/components/schemas/{model}"})).validate(data)
    read = getattr(models, model).model_validate_json(json.dumps(data))
    assert json.loads(read.model_dump_json(exclude_unset=True)) == data


@pytest.mark.parametrize(
    ("frame", "fits"),
    [
        ({}, True),
        (dict.fromkeys(models.MetricsFrame.model_fields), True),
        ({"on_time_probability": 1, "queue_depth": 0, "kv_warmth": False, "preempted": True, "resumable": False}, True),
        ({"on_time_probability": 1.01}, False),
        ({"on_time_probability": -0.01}, False),
        ({"queue_depth": -1}, False),
        ({"affinity": "hit"}, True),
        ({"affinity": "warm"}, False),
        ({"preempted": "yes"}, False),
        ({"budgets": {"tokens": 0, "time_ms": None, "cost": 0.5}}, True),
        ({"budgets": {"tokens": 0}}, False),
        ({"budgets": {"tokens": -1, "time_ms": None, "cost": None}}, False),
    ],
    ids=str,
)
def test_metrics_frame_takes_and_refuses_what_the_contract_says(frame: Any, fits: bool) -> None:
    """ORCH-2047."""
    validator = jsonschema_rs.Draft4Validator(
        as_draft4(load_spec("data"), {"$ref": "#/components/schemas/MetricsFrame"})
    )
    assert validator.is_valid(frame) is fits
    assert model_accepts(models.MetricsFrame, json.dumps(frame).encode()) is fits
