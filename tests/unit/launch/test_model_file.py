"""The demonstration model is found without importing its package, and is checked."""

from importlib import metadata
from pathlib import Path

import pytest

from llorch.errors import LaunchError
from llorch.launch.model_file import DEMO_MODEL_SHA256, find_demo_model, locate_demo_model, read_digest, verify_digest


async def test_demo_model_is_found_and_is_the_right_file() -> None:
    path = await find_demo_model()
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert await read_digest(path) == DEMO_MODEL_SHA256


async def test_other_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF, but no model")
    with pytest.raises(LaunchError, match=r"has sha256 [0-9a-f]{64} where b179.* was expected: `make setup`"):
        await verify_digest(path, DEMO_MODEL_SHA256)


async def test_missing_file_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"absent\.gguf cannot be read: No such file"):
        await read_digest(tmp_path / "absent.gguf")


def test_distribution_that_is_not_installed_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llorch.launch.model_file._DISTRIBUTION", "no-such-distribution")
    with pytest.raises(LaunchError, match="not installed: `make setup`"):
        locate_demo_model()


def test_distribution_without_the_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metadata.version("pytest")
    monkeypatch.setattr("llorch.launch.model_file._DISTRIBUTION", "pytest")
    with pytest.raises(LaunchError, match="no model file"):
        locate_demo_model()
