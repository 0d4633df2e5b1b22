"""The resolved contract documents, inside the package so that an installed wheel can serve them."""

import json
from importlib.resources import files
from typing import Any


def load_spec(name: str) -> dict[str, Any]:
    """The resolved OpenAPI document `data` or `control`: a fresh dict without references to other files."""
    return _load(f"{name}.json")


def load_config_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of the configuration file: a fresh dict."""
    return _load("config.schema.json")


def load_metrics() -> dict[str, Any]:
    """The metric families as the contract declares them: a fresh dict."""
    return _load("metrics.json")


def _load(name: str) -> dict[str, Any]:
    text = files(__name__).joinpath(name).read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document
