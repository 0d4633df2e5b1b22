"""The genuine llama.cpp with the tiny model that `make setup` puts into the cache, as the engine suites need it."""

from pathlib import Path

from llorch.launch.llamacpp import EngineProcess

TINY_MODEL = Path(__file__).resolve().parents[2] / ".cache" / "models" / "tiny.gguf"


def launch_tiny(*, slots: int = 1, ctx: int = 1024, alias: str | None = None, port: int = 0) -> EngineProcess:
    """An engine process with the tiny model and one thread, not started yet."""
    return EngineProcess(TINY_MODEL, slots=slots, ctx=ctx, threads=1, alias=alias, port=port)
