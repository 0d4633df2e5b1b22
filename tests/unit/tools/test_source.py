"""Reading and bundling of contract files."""

from pathlib import Path

import pytest

from tools.contract.source import ContractError, bundle, load_yaml, operations


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def test_bundle_copies_what_is_reached_through_other_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        data="""
paths: {/a: {get: {responses: {'200': {$ref: 'common.yaml#/components/responses/Ok'}}}}}
components: {schemas: {Own: {$ref: 'common.yaml#/components/schemas/Deep'}}}
""",
        common="""
components:
  responses: {Ok: {content: {application/json: {schema: {$ref: '#/components/schemas/Body'}}}}}
  schemas:
    Body: {properties: {next: {$ref: '#/components/schemas/Body'}, deep: {$ref: '#/components/schemas/Deep'}}}
    Deep: {type: string}
    Unused: {type: string}
""",
    )
    document = bundle(tmp_path, "data.yaml")
    assert document["paths"]["/a"]["get"]["responses"]["200"] == {"$ref": "#/components/responses/Ok"}
    assert document["components"]["schemas"] == {
        "Body": {
            "properties": {"next": {"$ref": "#/components/schemas/Body"}, "deep": {"$ref": "#/components/schemas/Deep"}}
        },
        "Deep": {"type": "string"},
        "Own": {"$ref": "#/components/schemas/Deep"},
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("- 1", "expected a mapping"),
        ("a: [", "data.yaml"),
        ("true: 1", "key True is not text"),
        ("a: {$ref: 'common.yaml#/components/schemas/None'}", "there is no #/components/schemas/None"),
        ("a: {$ref: 'common.yaml#/x'}", "is not of the form"),
        ("a: {$ref: 'absent.yaml#/components/schemas/A'}", "absent.yaml"),
        (
            "a: {$ref: 'common.yaml#/components/schemas/A'}\ncomponents: {schemas: {A: {type: integer}}}",
            "#/components/schemas/A exists in",
        ),
    ],
)
def test_unusable_file_is_refused_with_the_reason(tmp_path: Path, data: str, message: str) -> None:
    write(tmp_path, data=data, common="components: {schemas: {A: {type: string}}}")
    with pytest.raises(ContractError, match=message.replace("(", r"\(")):
        bundle(tmp_path, "data.yaml")


def test_statuses_and_timestamps_stay_text(tmp_path: Path) -> None:
    write(tmp_path, data="responses: {200: {example: 2025-11-23T04:25:00Z}}")
    assert load_yaml(tmp_path / "data.yaml") == {"responses": {"200": {"example": "2025-11-23T04:25:00Z"}}}


def test_operations_share_the_parameters_of_their_path() -> None:
    spec = {"paths": {"/a": {"parameters": [{"name": "x"}], "get": {"parameters": [{"name": "y"}]}, "post": {}}}}
    found = [(method, [p["name"] for p in operation["parameters"]]) for _, method, operation in operations(spec)]
    assert found == [("get", ["x", "y"]), ("post", ["x"])]
