"""The engine process and its keeper, with the genuine llama.cpp and the tiny model."""

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from llorch.adapters.llamacpp import LlamaCppEngine
from llorch.errors import LaunchError, PoolUnready
from llorch.launch.llamacpp import EngineProcess, run_server
from llorch.service.ports import Generation
from tests.conformance.engine_process import TINY_MODEL, launch_tiny

TINY_SHA256 = "291846574cb40ded4c65a09dad2413854683c254d77aebb6b3e1da380d7eb529"

SURVIVOR = """
import asyncio, os, pathlib, sys
from llorch.launch.llamacpp import EngineProcess

async def main():
    process = EngineProcess(pathlib.Path(sys.argv[1]), ctx=256, threads=1)
    await process.start()
    print(process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def read_command_line(pid: int | None) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def test_started_engine_is_ready_and_measured() -> None:
    async with launch_tiny(slots=2, ctx=512, alias="tiny") as process:
        assert process.engine_version is not None
        assert process.engine_version.startswith("xllamacpp-20")
        assert process.model_digest == TINY_SHA256
        engine = LlamaCppEngine(process.url, api_key=process.api_key)
        facts = await engine.read_facts()
        assert (facts.slots, facts.ctx_per_slot, facts.model_name) == (2, 512, "tiny")
        await engine.aclose()
    assert not process.is_running


async def test_key_is_new_for_every_process_and_on_no_command_line() -> None:
    async with launch_tiny() as first:
        assert first.api_key != launch_tiny().api_key
        assert first.api_key not in read_command_line(first.pid)
        stranger = LlamaCppEngine(first.url)
        with pytest.raises(PoolUnready, match="refused llorch's key"):
            await stranger.read_facts()
        await stranger.aclose()


async def test_engine_lives_in_a_process_group_of_its_own() -> None:
    async with launch_tiny() as process:
        assert os.getpgid(process.pid or 0) == process.pid


async def test_stop_ends_it_cleanly_although_a_stream_is_open() -> None:
    async with launch_tiny() as process:
        engine = LlamaCppEngine(process.url, api_key=process.api_key)
        has_token = asyncio.Event()
        order = Generation("a", 100_000, 1, strict=True)
        run = asyncio.create_task(engine.generate(order, lambda _tokens: has_token.set()))
        await has_token.wait()
        await process.stop()
        assert await process.wait() == 0
        await asyncio.wait({run})
        assert run.exception() is not None
        await process.stop()
        await engine.aclose()


async def test_engine_that_does_not_end_in_time_is_killed() -> None:
    async with launch_tiny() as process:
        os.kill(process.pid or 0, signal.SIGSTOP)
        await process.stop(grace_s=0.1)
        assert await process.wait() == -signal.SIGKILL


async def test_engine_dies_with_the_process_that_started_it() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SURVIVOR, str(TINY_MODEL), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pidfd = os.pidfd_open(int(await parent.stdout.readline()))
    is_dead = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, is_dead.set)
    parent.kill()
    await parent.wait()
    await asyncio.wait_for(is_dead.wait(), 5)
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)


async def test_file_that_is_no_model_is_told(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("hello")
    with pytest.raises(LaunchError, match=r"is not a GGUF model file"):
        await EngineProcess(path).start()


async def test_model_that_is_cut_off_is_told_in_the_engines_own_words(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(TINY_MODEL.read_bytes()[:100_000])
    process = EngineProcess(path)
    with pytest.raises(LaunchError, match=r"(?s)before it was ready. It said:.*failed to load model"):
        await process.start()
    assert not process.is_running


async def test_missing_model_is_told_before_anything_is_started(tmp_path: Path) -> None:
    process = EngineProcess(tmp_path / "absent.gguf")
    with pytest.raises(LaunchError, match="cannot be read"):
        await process.start()
    assert process.pid is None


async def test_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await launch_tiny(port=port).start()


async def test_engine_that_is_not_ready_in_time_is_ended() -> None:
    process = EngineProcess(
        TINY_MODEL, start_timeout_s=0.2, command=(sys.executable, "-c", "import time; time.sleep(60)")
    )
    with pytest.raises(LaunchError, match=r"not ready within 0.2 s"):
        await process.start()
    assert not process.is_running


async def test_start_that_is_cancelled_leaves_no_process() -> None:
    process = EngineProcess(TINY_MODEL, command=(sys.executable, "-c", "import time; time.sleep(60)"))
    start = asyncio.create_task(process.start())
    async with asyncio.timeout(5):
        while process.pid is None:  # noqa: ASYNC110 (the process id is all there is to see)
            await asyncio.sleep(0.01)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not process.is_running


def test_engine_that_is_not_installed_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(LaunchError, match=r"llorch\[local\]"):
        run_server(TINY_MODEL, port=0)


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
