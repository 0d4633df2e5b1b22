"""Whole file trees as values: building the generated package, reading one from disk, comparing, replacing.

A tree maps paths relative to `generated/` to bytes. Compiled caches are no part of it.
"""

import json
from pathlib import Path

from tools.contract.metrics import metrics_source
from tools.contract.models import HEADER, config_models, wire_models
from tools.contract.operations import operations_source, read_operations, routes_source
from tools.contract.source import Contract, Document

Tree = dict[str, bytes]

PACKAGE = "llorch_contract"
_STATIC = Path(__file__).parent / "static"


def build(contract: Contract) -> Tree:
    """The files of `generated/` that `contract` stands for; a pure function of it and of the generator's version."""
    found = read_operations(contract.specs)
    files: dict[str, str] = {
        "models.py": wire_models(contract.specs),
        "operations.py": operations_source(found),
        "routes.py": routes_source(found),
        "config.py": config_models(contract.config),
        "metrics.py": metrics_source(contract.metrics),
        "py.typed": "",
        "specs/config.schema.json": as_json(contract.config),
        "specs/metrics.json": as_json(contract.metrics),
    }
    files |= {f"specs/{name}.json": as_json(spec) for name, spec in contract.specs.items()}
    for source in sorted(_STATIC.rglob("*.py")):
        files[source.relative_to(_STATIC).as_posix()] = f"{HEADER}\n\n{source.read_text(encoding='utf-8')}"
    return {f"{PACKAGE}/{name}": text.encode() for name, text in sorted(files.items())}


def as_json(document: Document) -> str:
    """`document` in the one form that is committed."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def read(folder: Path) -> Tree:
    """The tree under `folder`; empty when there is none."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def differences(wanted: Tree, present: Tree) -> list[str]:
    """One line per file that is missing, stray or changed in `present`, by path."""
    verdicts = dict.fromkeys(wanted.keys() - present.keys(), "missing")
    verdicts |= dict.fromkeys(present.keys() - wanted.keys(), "stray")
    verdicts |= {name: "changed" for name in wanted.keys() & present.keys() if wanted[name] != present[name]}
    return [f"{verdicts[name]}: {name}" for name in sorted(verdicts)]


def replace(wanted: Tree, folder: Path) -> list[str]:
    """Makes `folder` hold exactly `wanted`; returns what differed. Files that are right are not touched."""
    present = read(folder)
    for name in present.keys() - wanted.keys():
        (folder / name).unlink()
    for name, content in wanted.items():
        if present.get(name) != content:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return differences(wanted, present)
