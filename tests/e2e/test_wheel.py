"""ORCH-3262: an installed wheel serves the contract that is inside it, with no file of the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import Processes
from tests.support.identities import ALICE
from tests.support.processes import ROOT
from tests.support.service import make_config, make_pool


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel, built from the source tree, was installed without its dependencies."""
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [wheel] = directory.glob("*.whl")
    site = directory / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def environment(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(site)}


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=site.parent,
        env={**os.environ, **environment(site)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_wheel_has_everything_and_nothing_of_the_tests(installed: Path) -> None:
    top = {path.name for path in installed.iterdir()}
    assert {"llorch", "llorch_contract"} < top
    assert not top & {"tests", "features", "tools", "bench", "openapi"}
    assert (installed / "llorch" / "py.typed").is_file()
    assert (installed / "llorch_contract" / "py.typed").is_file()


def test_modules_come_from_the_wheel(installed: Path) -> None:
    done = run(installed, "-c", "import llorch.app, llorch_contract.specs as s; print(llorch.__file__, s.__file__)")
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed)) for path in done.stdout.split()), done.stdout


def test_check_config_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    file = tmp_path / "llorch.yaml"
    pool = {"id": "small", "engine": "llamacpp", "model": "m", "replicas": [{"url": "http://127.0.0.1:9"}]}
    file.write_text(yaml.safe_dump({"pools": [pool]}), encoding="utf-8")
    good = run(installed, "-m", "llorch", "check-config", str(file))
    assert good.returncode == 0, good.stderr
    file.write_text(yaml.safe_dump({"pools": [{**pool, "modle": "m"}]}), encoding="utf-8")
    bad = run(installed, "-m", "llorch", "check-config", str(file))
    assert bad.returncode != 0
    assert "modle" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_server_of_the_wheel_serves(installed: Path, processes: Processes) -> None:
    engine = processes.fake()
    service = processes.serve(
        make_config([make_pool(engine)]), environment=environment(installed), cwd=installed.parent
    )
    with service.client(ALICE) as http:
        accepted = http.post("/v1/tasks", json={"model_ref": "fake", "prompt": "a", "max_tokens": 3})
        assert accepted.status_code == 202, accepted.text
        stream = http.get(f"/v1/tasks/{accepted.json()['task_id']}/stream")
        assert stream.text.count("event: token\n") == 3
        assert http.get("/v1/tasks?limit=0").status_code == 400
    service.stop()
