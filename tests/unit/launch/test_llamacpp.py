"""The engine process: the genuine llama.cpp with the tiny model, from its start to its end."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llorch.adapters.llamacpp import LlamaCppEngine
from llorch.errors import LaunchError, PoolUnready
from llorch.launch.llamacpp import installed_version, run_server
from llorch.service.ports import Generation
from tests.conformance.engine_process import TINY_MODEL, launch_tiny


def started(*words: str) -> subprocess.CompletedProcess[str]:
    """`llorch engine llamacpp` that ends by itself."""
    command = [sys.executable, "-m", "llorch", "engine", "llamacpp", "--ctx", "256", "--threads", "1", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


async def test_engine_has_the_slots_and_the_context_that_were_asked_for() -> None:
    async with launch_tiny(slots=2, ctx=512, alias="tiny") as process:
        engine = LlamaCppEngine(process.url, api_key=process.api_key)
        facts = await engine.read_facts()
        assert (facts.slots, facts.ctx_per_slot, facts.model_name) == (2, 512, "tiny")
        await engine.aclose()


async def test_key_comes_by_the_environment_and_is_asked_for() -> None:
    """ORCH-3208."""
    async with launch_tiny() as process:
        assert process.api_key not in psutil.Process(process.pid).cmdline()
        stranger = LlamaCppEngine(process.url)
        with pytest.raises(PoolUnready, match="refused llorch's key"):
            await stranger.read_facts()
        await stranger.aclose()


async def test_sigterm_ends_it_cleanly_although_a_stream_is_open() -> None:
    async with launch_tiny() as process:
        engine = LlamaCppEngine(process.url, api_key=process.api_key)
        has_token = asyncio.Event()
        order = Generation("a", 100_000, 1, strict=True)
        run = asyncio.create_task(engine.generate(order, lambda _tokens: has_token.set()))
        await has_token.wait()
        process.signal(signal.SIGTERM)
        assert await process.wait() == 0
        await asyncio.wait({run})
        assert run.exception() is not None
        await engine.aclose()


def test_file_that_is_no_model_is_told(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("hello")
    ended = started("--model", str(path), "--port", "0")
    assert ended.returncode == 1
    assert "is not a GGUF model file" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_missing_model_is_told(tmp_path: Path) -> None:
    ended = started("--model", str(tmp_path / "absent.gguf"), "--port", "0")
    assert ended.returncode == 1
    assert "cannot be read" in ended.stderr


def test_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = started("--model", str(TINY_MODEL), "--port", str(port))
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in ended.stderr


def test_engine_that_is_not_installed_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(LaunchError, match=r"llorch\[local\]"):
        run_server(TINY_MODEL, port=0)


def test_installed_version_is_that_of_the_package() -> None:
    """ORCH-3032."""
    assert installed_version().startswith("xllamacpp-20")


async def test_listening_line_is_json_on_stdout() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llorch", "engine", "llamacpp"),
        *("--model", str(TINY_MODEL), "--port", "0", "--ctx", "256", "--threads", "1"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    line = json.loads(await process.stdout.readline())
    assert (line["event"], line["engine"], line["pid"]) == ("listening", "llamacpp", process.pid)
    assert line["url"].startswith("http://127.0.0.1:")
    process.terminate()
    assert await process.wait() == 0
