"""Real engines for tests: llama.cpp processes with the tiny model that `make setup` puts into the cache."""

import sys
from pathlib import Path

from llorch.launch.llamacpp import EngineProcess

TINY_MODEL = Path(__file__).resolve().parents[1] / ".cache" / "models" / "tiny.gguf"

_ENTRY = """
import argparse, pathlib, sys
from llorch.errors import LaunchError
from llorch.launch.llamacpp import run_server
parser = argparse.ArgumentParser()
parser.add_argument("--model", type=pathlib.Path)
parser.add_argument("--alias")
for name in ("--port", "--slots", "--ctx", "--threads"):
    parser.add_argument(name, type=int)
try:
    run_server(**vars(parser.parse_args()))
except LaunchError as exc:
    sys.exit(exc.message)
"""
ENTRY = (sys.executable, "-c", _ENTRY)


def launch_tiny(*, slots: int = 1, ctx: int = 1024, alias: str | None = None, port: int = 0) -> EngineProcess:
    """An engine process with the tiny model and one thread, not started yet."""
    return EngineProcess(TINY_MODEL, slots=slots, ctx=ctx, threads=1, alias=alias, port=port, command=ENTRY)
