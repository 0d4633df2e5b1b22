"""Every cause for which an order is refused before anything starts, with real files and real ports."""

import asyncio
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from llorch.errors import LaunchError
from llorch.poolmanager.preflight import Checked, Preflight, Refusal
from llorch.service.launching import Cause, Headroom, LaunchOrder
from llorch.testing.devices import GIB, FakeDevices

TINY_MODEL = Path(__file__).resolve().parents[3] / ".cache" / "models" / "tiny.gguf"
TINY_DIGEST = "sha256:291846574cb40ded4c65a09dad2413854683c254d77aebb6b3e1da380d7eb529"
MIB = 1024**2
NO_RESERVE = Headroom(vram_bytes=0, ram_bytes=0)
ORDER = LaunchOrder(
    replica_id="small/0",
    pool_id="small",
    engine="llamacpp",
    launcher="llamacpp",
    model="small",
    model_path=str(TINY_MODEL),
    model_digest=None,
    ctx=1024,
    slots=2,
    allow_cpu=True,
)
ON_GPU = replace(ORDER, launcher="command", command=("/bin/sleep", "9"), allow_cpu=False)


def order(base: LaunchOrder = ORDER, **changes: Any) -> LaunchOrder:
    return replace(base, **changes)


def card_host(*cards: tuple[float, float]) -> FakeDevices:
    """GPUs 0, 1, … as (total, used) in GiB."""
    host = FakeDevices()
    for index, (total, used) in enumerate(cards):
        host.put(index, total_gib=total, used_gib=used)
    return host


async def refuse(wanted: LaunchOrder, host: FakeDevices | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await Preflight(host or FakeDevices()).check(wanted)
    refusal = caught.value
    assert refusal.cause.is_refusal
    assert refusal.code == ("UNTRUSTED_ARTIFACT" if refusal.cause is Cause.DIGEST else "POOL_UNAVAILABLE")
    assert re.fullmatch(r"[^\n]+: [^\n]+\.", refusal.message), "one sentence with its remedy"
    return refusal


async def accept(wanted: LaunchOrder, host: FakeDevices | None = None) -> Checked:
    return await Preflight(host or FakeDevices()).check(wanted)


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


async def test_good_order_is_measured() -> None:
    """ORCH-3032."""
    checked = await accept(ORDER)
    assert checked == Checked(f"xllamacpp-{metadata.version('xllamacpp')}", TINY_DIGEST, 0)


async def test_refusal_is_a_launch_error() -> None:
    assert isinstance(await refuse(order(model_path="/absent.gguf")), LaunchError)


# ---- binary


async def test_program_that_is_not_there_is_refused() -> None:
    refusal = await refuse(order(launcher="vllm", binary="no-such-engine"))
    assert refusal.cause is Cause.BINARY
    assert "The program no-such-engine of pool small is not there" in refusal.message


async def test_program_that_is_not_executable_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "engine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    assert (await refuse(order(launcher="command", command=(str(program),)))).cause is Cause.BINARY
    program.chmod(0o755)
    assert (await accept(order(launcher="command", command=(str(program),)))).engine_version is None


async def test_program_is_looked_up_in_the_path_of_the_pool(tmp_path: Path) -> None:
    shutil.copy("/bin/true", tmp_path / "engine-of-the-pool")
    wanted = order(launcher="command", command=("engine-of-the-pool",))
    assert (await refuse(wanted)).cause is Cause.BINARY
    await accept(order(wanted, environment=(("PATH", str(tmp_path)),)))


async def test_launcher_or_command_that_is_not_there_is_refused() -> None:
    assert (await refuse(order(launcher="docker"))).cause is Cause.BINARY
    assert (await refuse(order(launcher="command"))).cause is Cause.BINARY


async def test_engine_that_is_not_installed_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("llorch.poolmanager.preflight.metadata.version", absent)
    refusal = await refuse(ORDER)
    assert refusal.cause is Cause.BINARY
    assert "pip install 'llorch[local]'" in refusal.message


async def test_version_of_another_binary_is_not_claimed(tmp_path: Path) -> None:
    """ORCH-3032: what is installed here says nothing about it."""
    assert (await accept(order(binary="/bin/true"))).engine_version is None


# ---- model


@pytest.mark.parametrize("launcher", ["llamacpp", "command"])
async def test_model_that_is_not_there_is_refused(launcher: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "absent.gguf")
    refusal = await refuse(order(launcher=launcher, command=("/bin/true",), model_path=missing))
    assert refusal.cause is Cause.MODEL
    assert refusal.message.startswith(f"The model {missing} cannot be read (No such file or directory): ")


async def test_model_that_is_not_named_or_no_path_is_refused() -> None:
    assert "names no model file" in (await refuse(order(model_path=None))).message
    assert "is no path" in (await refuse(order(model_path="a\0b"))).message


async def test_model_that_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    async with asyncio.timeout(5):
        refusal = await refuse(order(model_path=str(tmp_path / "model.gguf")))
    assert refusal.cause is Cause.MODEL


async def test_truncated_model_is_refused_before_any_start(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(TINY_MODEL.read_bytes()[:-1])
    refusal = await refuse(order(model_path=str(path)))
    assert refusal.cause is Cause.MODEL
    assert "is cut off, with 5192255 of the 5192256 bytes" in refusal.message


async def test_llama_cpp_runs_gguf_files_only(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"something else, long enough")
    assert "is not a GGUF model file" in (await refuse(order(model_path=str(path)))).message
    await accept(order(launcher="command", command=("/bin/true",), model_path=str(path)))


async def test_every_part_of_a_spread_model_must_be_whole(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    shutil.copy(TINY_MODEL, parts[0])
    wanted = order(model_path=str(parts[0]))
    assert str(parts[1]) in (await refuse(wanted)).message
    shutil.copy(TINY_MODEL, parts[1])
    await accept(wanted)
    size = TINY_MODEL.stat().st_size
    host = FakeDevices(ram_available_bytes=2 * size - 1)
    assert (await refuse(order(wanted, headroom=replace(NO_RESERVE, kv_bytes_per_token=0)), host)).cause is (
        Cause.HEADROOM
    )


async def test_context_beyond_what_the_model_was_trained_for_is_refused() -> None:
    refusal = await refuse(order(ctx=4096))
    assert refusal.cause is Cause.MODEL
    assert "was trained for 2048 tokens of context and pool small asks for 4096: set ctx to 2048" in refusal.message
    await accept(order(ctx=2048))


# ---- digest


async def test_other_file_under_the_models_name_is_refused() -> None:
    """ORCH-3180."""
    wanted = f"sha256:{'0' * 64}"
    refusal = await refuse(order(model_digest=wanted))
    assert refusal.cause is Cause.DIGEST
    assert f"{TINY_MODEL} has {TINY_DIGEST} where pool small names {wanted}" in refusal.message
    assert (await accept(order(model_digest=TINY_DIGEST.upper().replace("SHA", "sha")))).model_digest == TINY_DIGEST


async def test_digest_of_a_directory_cannot_be_promised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    wanted = order(launcher="command", command=("/bin/true",), model_path=str(tmp_path))
    assert (await accept(wanted)).model_digest is None
    assert (await refuse(order(wanted, model_digest=TINY_DIGEST))).cause is Cause.DIGEST


async def test_digest_is_computed_once_for_each_state_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"first")
    wanted = order(launcher="command", command=("/bin/true",), model_path=str(path))
    hashed = []
    real = hashlib.file_digest

    def counting(file: Any, name: str) -> Any:
        hashed.append(file.name)
        return real(file, name)

    monkeypatch.setattr("llorch.poolmanager.preflight.hashlib.file_digest", counting)
    preflight = Preflight(FakeDevices())
    checks = await asyncio.gather(*(preflight.check(wanted) for _ in range(3)))
    assert {checked.model_digest for checked in checks} == {f"sha256:{hashlib.sha256(b'first').hexdigest()}"}
    assert len(hashed) == 1
    other = tmp_path / "other"
    other.write_bytes(b"other")  # the same size, and below the same time
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert (await preflight.check(wanted)).model_digest == f"sha256:{hashlib.sha256(b'other').hexdigest()}"


# ---- GPUs


async def test_host_without_gpus_is_refused_unless_the_pool_allows_the_cpu() -> None:
    """ORCH-3018."""
    refusal = await refuse(order(allow_cpu=False))
    assert refusal.cause is Cause.GPU
    assert "A GPU for small is not on this host, which has none: correct devices, or set allow_cpu" in refusal.message
    await accept(order(allow_cpu=True))
    await accept(order(allow_cpu=True, devices=(0,)))


async def test_mask_must_exist_on_this_host() -> None:
    """ORCH-3011."""
    host = card_host((24, 0), (24, 0))
    refusal = await refuse(order(ON_GPU, devices=(1, 2, 3)), host)
    assert refusal.cause is Cause.GPU
    assert "GPU 2, 3 of pool small is not on this host, which has 0, 1" in refusal.message
    await accept(order(ON_GPU, devices=(1,)), host)
    assert (await refuse(order(devices=(1, 2)), host)).cause is Cause.GPU, "half a mask is no CPU"


async def test_lost_gpu_is_not_there() -> None:
    """ORCH-3038."""
    host = card_host((24, 0))
    host.lose(0)
    refusal = await refuse(ON_GPU, host)
    assert refusal.cause is Cause.GPU
    assert "the driver gave up 0: reset it or restart the host" in refusal.message


async def test_split_that_does_not_match_its_mask_is_refused() -> None:
    """ORCH-3012."""
    refusal = await refuse(order(ON_GPU, devices=(0, 1), tensor_split=(1.0,)), card_host((24, 0), (24, 0)))
    assert refusal.cause is Cause.GPU
    assert "has 1 ratios for 2 devices" in refusal.message


# ---- memory


async def test_model_that_does_not_fit_into_vram_is_refused_with_numbers(tmp_path: Path) -> None:
    """ORCH-3003."""
    headroom = Headroom(vram_bytes=512 * MIB, ram_bytes=0, kv_bytes_per_token=2 * MIB)
    refusal = await refuse(order(ON_GPU, headroom=headroom), card_host((24, 20.5)))
    assert refusal.cause is Cause.HEADROOM
    assert refusal.message == (
        "Pool small needs 4.5 GiB on GPU 0 (model 0.0 + KV 4.0 + reserve 0.5), 3.5 GiB are free: free memory, lower"
        " ctx or slots, or take a smaller model."
    )
    await accept(order(ON_GPU, headroom=headroom), card_host((24, 19.4)))


async def test_kv_cache_is_measured_from_the_file_unless_the_pool_tells_it() -> None:
    size = TINY_MODEL.stat().st_size
    needed = size + 1024 * 2 * 256
    wanted = order(headroom=NO_RESERVE)
    await accept(wanted, FakeDevices(ram_available_bytes=needed))
    assert (await refuse(wanted, FakeDevices(ram_available_bytes=needed - 1))).cause is Cause.HEADROOM
    told = order(headroom=replace(NO_RESERVE, kv_bytes_per_token=0))
    await accept(told, FakeDevices(ram_available_bytes=size))


async def test_model_on_a_cpu_must_fit_into_ram_with_the_reserve() -> None:
    refusal = await refuse(ORDER, FakeDevices(ram_available_bytes=517 * MIB))
    assert refusal.cause is Cause.HEADROOM
    assert "needs 517 MiB of RAM (model 5 + KV 0 + reserve 512), 517 MiB are free" in refusal.message
    await accept(ORDER, FakeDevices(ram_available_bytes=518 * MIB))


async def test_reserve_of_ram_is_needed_beside_gpus_too() -> None:
    host = card_host((24, 0))
    host.ram_available_bytes = 511 * MIB
    assert "needs 512 MiB of RAM (reserve 512)" in (await refuse(ON_GPU, host)).message


async def test_memory_limit_below_what_the_model_needs_is_refused() -> None:
    refusal = await refuse(order(memory_limit_bytes=5 * MIB))
    assert refusal.cause is Cause.HEADROOM
    assert "its memory_limit is 5 MiB: raise it" in refusal.message
    await accept(order(memory_limit_bytes=6 * MIB))


async def test_unequal_gpus_need_ratios_and_are_capped_by_the_one_that_is_full_first() -> None:
    """ORCH-3012."""
    host = card_host((24, 0), (8, 4))
    headroom = replace(NO_RESERVE, kv_bytes_per_token=8 * MIB)  # 16 GiB of KV cache
    wanted = order(ON_GPU, devices=(0, 1), headroom=headroom)
    refusal = await refuse(wanted, host)
    assert (refusal.cause, "needs a tensor_split" in refusal.message) == (Cause.HEADROOM, True)
    assert "on GPU 1" in (await refuse(order(wanted, tensor_split=(3.0, 1.0)), host)).message
    await accept(order(wanted, tensor_split=(5.0, 1.0)), host)


async def test_files_of_a_directory_are_weighed_together(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "weights").write_bytes(bytes(3 * MIB))
    (tmp_path / "config.json").write_bytes(bytes(MIB))
    wanted = order(launcher="command", command=("/bin/true",), model_path=str(tmp_path), headroom=NO_RESERVE)
    await accept(wanted, FakeDevices(ram_available_bytes=4 * MIB))
    assert (await refuse(wanted, FakeDevices(ram_available_bytes=4 * MIB - 1))).cause is Cause.HEADROOM


async def test_vllm_without_a_mask_uses_the_first_gpu_alone(tmp_path: Path) -> None:
    wanted = order(ON_GPU, launcher="vllm", binary="/bin/true", headroom=NO_RESERVE)
    await accept(wanted, card_host((24, 0), (8, 8)))
    assert (await refuse(wanted, card_host((24, 24), (24, 0)))).cause is Cause.HEADROOM


async def test_command_without_a_model_needs_its_reserve_only() -> None:
    wanted = order(launcher="command", command=("/bin/true",), model_path=None, headroom=NO_RESERVE)
    checked = await accept(wanted, FakeDevices(ram_available_bytes=0))
    assert checked.model_digest is None


# ---- ports


async def test_port_that_is_taken_is_refused_with_its_number(listener: int) -> None:
    refusal = await refuse(order(port=listener))
    assert refusal.cause is Cause.PORT
    assert f"Port {listener} of pool small is taken: end what listens there, give the pool another" in refusal.message


async def test_port_that_was_just_left_can_be_taken_at_once() -> None:
    """Connections of the process before that linger do not matter."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = int(listening.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listening.accept()
            accepted.close()
            client.recv(1)
    assert (await accept(order(port=port))).port == port


async def test_free_ports_are_chosen_and_not_given_out_twice() -> None:
    preflight = Preflight(FakeDevices())
    wanted = order(launcher="command", command=("/bin/true",))
    ports = [(await preflight.check(wanted)).port for _ in range(20)]
    assert len(set(ports)) == 20
    assert min(ports) > 0


async def test_engine_that_announces_its_port_takes_one_itself() -> None:
    assert (await accept(order(port=0))).port == 0


# ---- the order of the checks


async def test_first_cause_is_told(listener: int, tmp_path: Path) -> None:
    """Binary, model, digest, GPU, memory, port: each hides what comes after it."""
    host = FakeDevices(ram_available_bytes=0)
    wrong: dict[str, Any] = {
        "launcher": "command",
        "command": ("/bin/absent",),
        "model_path": "/absent.gguf",
        "model_digest": f"sha256:{'0' * 64}",
        "allow_cpu": False,
        "port": listener,
    }
    repairs: list[dict[str, Any]] = [
        {"command": ("/bin/true",)},
        {"model_path": str(TINY_MODEL)},
        {"model_digest": TINY_DIGEST},
        {"allow_cpu": True},
    ]
    causes = [(await refuse(order(**wrong), host)).cause]
    for repair in repairs:
        wrong |= repair
        causes.append((await refuse(order(**wrong), host)).cause)
    host.ram_available_bytes = GIB
    causes.append((await refuse(order(**wrong), host)).cause)
    assert causes == [Cause.BINARY, Cause.MODEL, Cause.DIGEST, Cause.GPU, Cause.HEADROOM, Cause.PORT]
