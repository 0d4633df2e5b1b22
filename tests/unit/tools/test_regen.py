"""The command `tools/regen.py`: its output, its check in both directions, and its refusal to break clients unasked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import regen
from tools.contract import tree

REPOSITORY = Path(regen.__file__).resolve().parent.parent
COMMAND = [sys.executable, str(REPOSITORY / "tools" / "regen.py")]
PACKAGE = Path("generated", "llorch_contract")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contract and freshly made code; tests copy it."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(REPOSITORY / "openapi", root / "openapi")
    assert regen.main(["--root", str(root)]) == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("seed", ["0", "4242"])
def test_second_run_is_byte_identical_whatever_the_hash_seed_and_the_working_directory(
    root: Path, tmp_path: Path, seed: str
) -> None:
    before = tree.read(root / "generated")
    shutil.rmtree(root / "generated")
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([*COMMAND, "--root", str(root)], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert tree.read(root / "generated") == before


def test_committed_code_is_what_the_contract_says(capfd: pytest.CaptureFixture[str]) -> None:
    assert regen.main(["--check"]) == 0, capfd.readouterr().err


def test_check_accepts_an_untouched_tree_and_ignores_compiled_caches(root: Path) -> None:
    (root / PACKAGE / "__pycache__").mkdir()
    (root / PACKAGE / "__pycache__" / "models.cpython-311.pyc").write_bytes(b"x")
    assert regen.main(["--check", "--root", str(root)]) == 0


def test_check_fails_on_a_changed_file_and_names_it(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(root / PACKAGE / "models.py", "import", "import ")
    assert regen.main(["--check", "--root", str(root)]) == 1
    assert "changed: llorch_contract/models.py" in capfd.readouterr().err


def test_check_fails_on_a_missing_file_and_names_it(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / PACKAGE / "py.typed").unlink()
    assert regen.main(["--check", "--root", str(root)]) == 1
    assert "missing: llorch_contract/py.typed" in capfd.readouterr().err


@pytest.mark.parametrize("stray", ["stray.py", "specs/old.json", "../other.txt"])
def test_check_fails_on_a_stray_file_and_names_it(root: Path, capfd: pytest.CaptureFixture[str], stray: str) -> None:
    path = (root / PACKAGE / stray).resolve()
    path.write_text("", encoding="utf-8")
    assert regen.main(["--check", "--root", str(root)]) == 1
    assert f"stray: {path.relative_to((root / 'generated').resolve())}" in capfd.readouterr().err


def test_check_fails_when_only_the_contract_changed_and_writes_nothing(root: Path) -> None:
    before = tree.read(root / "generated")
    edit(root / "openapi" / "data.yaml", "summary: Submit a task", "summary: Hand in a task")
    assert regen.main(["--check", "--root", str(root)]) == 1
    assert tree.read(root / "generated") == before


def test_run_repairs_changed_missing_and_stray_files(root: Path) -> None:
    before = tree.read(root / "generated")
    edit(root / PACKAGE / "models.py", "import", "import ")
    (root / PACKAGE / "py.typed").unlink()
    (root / PACKAGE / "stray.py").write_text("", encoding="utf-8")
    assert regen.main(["--root", str(root)]) == 0
    assert tree.read(root / "generated") == before


def test_breaking_change_writes_nothing_until_it_is_accepted(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree.read(root / "generated")
    edit(root / "openapi" / "data.yaml", "      enum: [reuse, cold]", "      enum: [reuse]")

    assert regen.main(["--root", str(root)]) == 3
    assert "BREAKING  data: POST /v1/tasks request .kv_hint: enum value cold removed" in capfd.readouterr().out
    assert tree.read(root / "generated") == before

    assert regen.main(["--accept-breaking", "--root", str(root)]) == 0
    assert regen.main(["--check", "--root", str(root)]) == 0


def test_additive_change_is_told_and_written(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(root / "openapi" / "data.yaml", "      enum: [reuse, cold]", "      enum: [reuse, cold, any]")
    assert regen.main(["--root", str(root)]) == 0
    assert "additive  data: POST /v1/tasks request .kv_hint: enum value any added" in capfd.readouterr().out
    assert '"any"' in (root / PACKAGE / "models.py").read_text(encoding="utf-8")


def test_faulty_contract_is_refused_with_its_place(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree.read(root / "generated")
    edit(root / "openapi" / "data.yaml", "      operationId: create_task", "      operationId: createTask")
    assert regen.main(["--root", str(root)]) == 1
    assert "data: post /v1/tasks: operationId 'createTask' is not in snake_case" in capfd.readouterr().err
    assert tree.read(root / "generated") == before


def test_unreadable_earlier_contract_is_an_error_and_not_a_fresh_start(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (root / PACKAGE / "specs" / "data.json").write_text("<<<<<<< ours\n", encoding="utf-8")
    assert regen.main(["--root", str(root)]) == 1
    assert "specs/data.json cannot be compared with" in capfd.readouterr().err
