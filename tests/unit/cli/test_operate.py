"""The commands for whoever runs the server."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from llorch import app
from llorch.cli.exits import Exit
from llorch.cli.main import cli
from llorch.errors import ConfigError, LaunchError
from llorch.launch import llamacpp

CONFIG = """\
pools:
  - id: small
    engine: llamacpp
    model: tiny
    replicas: [{url: "http://127.0.0.1:9000"}]
"""


def test_a_new_key_is_shown_once_and_configured_by_its_digest() -> None:
    result = CliRunner().invoke(cli, ["keys", "new", "--tenant", "1e5", "--scope", "data", "--scope", "control"])
    key, _, snippet = result.stdout.partition("\n")
    assert result.exit_code == 0
    assert key.startswith("llk_")
    assert key not in snippet
    (entry,) = yaml.safe_load(snippet)["keys"]
    assert entry.pop("id").startswith("1e5-")
    assert entry == {
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "tenant": "1e5",
        "scopes": ["data", "control"],
        "priorities": ["interactive", "batch"],
    }


def test_a_new_key_fits_the_configuration(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["keys", "new", "--tenant", "t" * 64, "--priority", "batch", "--id", "ci"])
    file = tmp_path / "llorch.yaml"
    file.write_text(CONFIG + result.stdout.partition("\n")[2])
    checked = CliRunner().invoke(cli, ["check-config", str(file)])
    assert (checked.exit_code, checked.stdout) == (0, f"{file}: ok\n")


def test_two_new_keys_differ() -> None:
    keys = {CliRunner().invoke(cli, ["keys", "new", "--tenant", "t"]).stdout.splitlines()[0] for _ in range(2)}
    assert len(keys) == 2


@pytest.mark.parametrize("tenant", ["", "two words", "-x", "a'b", "a" * 65])
def test_a_tenant_that_no_configuration_can_hold_is_refused(tenant: str) -> None:
    assert CliRunner().invoke(cli, ["keys", "new", f"--tenant={tenant}"]).exit_code == Exit.USAGE


def test_check_config_tells_place_and_expectation(tmp_path: Path) -> None:
    file = tmp_path / "llorch.yaml"
    file.write_text(CONFIG.replace("engine: llamacpp", "engin: llamacpp"))
    result = CliRunner().invoke(cli, ["check-config", str(file)])
    assert (result.exit_code, result.stdout) == (Exit.USAGE, "")
    assert f"{file}:3" in result.stderr
    assert "engin" in result.stderr


def test_check_config_of_no_file_is_a_configuration_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["check-config", str(tmp_path / "none.yaml")])
    assert result.exit_code == Exit.USAGE
    assert "none.yaml" in result.stderr


@pytest.mark.parametrize(("arguments", "expected"), [((), None), (("--config", "l.yaml"), Path("l.yaml"))])
def test_serve_hands_the_configuration_to_the_app(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: Path | None
) -> None:
    served: list[Path | None] = []
    monkeypatch.setattr(app, "serve", served.append)
    assert CliRunner().invoke(cli, ["serve", *arguments], env={"LLORCH_CONFIG": ""}).exit_code == 0
    assert served == [expected]


@pytest.mark.parametrize(
    ("error", "exit_code"), [(ConfigError("l.yaml:3: pools: expected a list"), 2), (LaunchError("no such model"), 1)]
)
def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int) -> None:
    def fail(_config: Path | None) -> None:
        raise error

    monkeypatch.setattr(app, "serve", fail)
    result = CliRunner().invoke(cli, ["serve"])
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr.strip().endswith(str(error))
    assert "Traceback" not in result.stderr


def test_engine_hands_its_options_to_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, dict[str, object]]] = []
    monkeypatch.setattr(llamacpp, "run_server", lambda model, **options: calls.append((model, options)))
    arguments = ["--model", "m.gguf", "--port", "0", "--slots", "2", "--ctx", "512", "--threads", "1", "--alias", "a"]
    assert CliRunner().invoke(cli, ["engine", "llamacpp", *arguments]).exit_code == 0
    options = {"host": "127.0.0.1", "port": 0, "slots": 2, "ctx": 512, "threads": 1, "alias": "a"}
    assert calls == [(Path("m.gguf"), options)]


def test_an_engine_that_cannot_start_is_told_by_the_real_launcher(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "llorch",
        "engine",
        "llamacpp",
        "--model",
        str(tmp_path / "none.gguf"),
        "--port",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ.copy(), check=False)
    assert (done.returncode, done.stdout) == (Exit.FAILED, "")
    assert "none.gguf" in done.stderr
    assert "Traceback" not in done.stderr
