"""What is executed for each launcher: exact argument lists, the key outside them, the mask in the environment."""

import sys
import tempfile
from dataclasses import replace
from typing import Any

import pytest

from llorch.errors import ConfigError
from llorch.launch.commands import Command, command_for, needs_model, program_of
from llorch.launch.llamacpp import KEY_VARIABLE
from llorch.service.launching import LaunchOrder

KEY = "s3cret-key"
LAUNCHERS = ("llamacpp", "llama-server", "vllm", "tgi", "triton")
ORDER = LaunchOrder(
    replica_id="small/0",
    pool_id="small",
    engine="llamacpp",
    launcher="llamacpp",
    model="small-model",
    model_path="/models/small.gguf",
    model_digest=None,
    ctx=2048,
    slots=4,
    allow_cpu=True,
)


def order(launcher: str, **changes: Any) -> LaunchOrder:
    return replace(ORDER, launcher=launcher, **changes)


def make(launcher: str, **changes: Any) -> Command:
    return command_for(order(launcher, **changes), host="127.0.0.1", port=8123, api_key=KEY)


def words(launcher: str, **changes: Any) -> str:
    return " ".join(make(launcher, **changes).arguments)


# ---- launchers


def test_built_in_engine_is_this_llorch() -> None:
    """ORCH-3178."""
    assert words("llamacpp", threads=2) == (
        f"{sys.executable} -m llorch engine llamacpp --model /models/small.gguf --host 127.0.0.1 --port 8123"
        " --slots 4 --ctx 2048 --alias small-model --threads 2"
    )
    assert words("llamacpp", binary="/opt/llorch").startswith("/opt/llorch engine llamacpp --model")


def test_llama_server_gets_the_context_of_all_slots_and_small_batches() -> None:
    """ORCH-3175, ORCH-3179."""
    assert words("llama-server", threads=3) == (
        "llama-server -m /models/small.gguf --host 127.0.0.1 --port 8123 -c 8192 -np 4 --alias small-model"
        " -b 64 -ub 64 -t 3 -ngl 0 --slots --metrics"
    )


@pytest.mark.parametrize(
    ("changes", "tail"),
    [
        ({"devices": (0,)}, "-ngl 999 --slots --metrics"),
        ({"allow_cpu": False}, "-ngl 999 --slots --metrics"),
        ({"devices": (0, 2)}, "-ngl 999 --tensor-split 1,1 --slots --metrics"),
        ({"devices": (0, 2), "tensor_split": (3.0, 1.5)}, "-ngl 999 --tensor-split 3,1.5 --slots --metrics"),
    ],
)
def test_llama_server_uses_gpus_wholly_and_in_told_shares(changes: dict[str, Any], tail: str) -> None:
    """ORCH-3012: its own default would follow the memory that happens to be free."""
    assert words("llama-server", **changes).endswith(tail)


def test_vllm_serves_one_model_on_its_mask() -> None:
    assert words("vllm", devices=(1, 3), model_path="/models/big") == (
        "vllm serve /models/big --host 127.0.0.1 --port 8123 --served-model-name small-model --max-model-len 2048"
        " --max-num-seqs 4 --tensor-parallel-size 2"
    )
    assert "--tensor-parallel-size" not in words("vllm")


def test_tgi_is_kept_apart_from_its_neighbours() -> None:
    socket_path = f"{tempfile.gettempdir()}/llorch-tgi-8123"
    assert words("tgi", devices=(0, 1), model_path="/models/big") == (
        "text-generation-launcher --model-id /models/big --hostname 127.0.0.1 --port 8123 --max-input-tokens 2047"
        f" --max-total-tokens 2048 --max-concurrent-requests 4 --num-shard 2 --shard-uds-path {socket_path}"
    )


def test_triton_listens_on_its_own_port_alone() -> None:
    assert words("triton", model_path="/models/repository") == (
        "tritonserver --model-repository=/models/repository --http-address=127.0.0.1 --http-port=8123"
        " --allow-grpc=false --allow-metrics=false"
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_arguments_of_the_pool_come_last(launcher: str) -> None:
    assert make(launcher, arguments=("--more", "a b")).arguments[-2:] == ("--more", "a b")


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_binary_of_the_pool_replaces_the_default(launcher: str) -> None:
    assert make(launcher, binary="/opt/engine").arguments[0] == "/opt/engine"
    assert program_of(order(launcher, binary="/opt/engine")) == "/opt/engine"


def test_program_is_the_first_word() -> None:
    for launcher in LAUNCHERS:
        assert program_of(order(launcher)) == make(launcher).arguments[0]
    assert program_of(order("command", command=("/bin/engine", "{port}"))) == "/bin/engine"


# ---- the launcher `command`


def test_placeholders_are_filled_in() -> None:
    command = (
        "/bin/engine", "--at={host}:{port}", "{model}", "{alias}", "{slots}/{ctx}/{ctx_total}", "k={api_key}",
        "{tensor_split}",
    )  # fmt: skip
    assert make("command", command=command, devices=(0, 1), tensor_split=(2.0, 1.0)).arguments == (
        "/bin/engine", "--at=127.0.0.1:8123", "/models/small.gguf", "small-model", "4/2048/8192", f"k={KEY}", "2,1",
    )  # fmt: skip


def test_other_braces_are_left_alone() -> None:
    command = ("engine", '{"port": 1}', "{}", "{Port}", "${HOME}", "{{port}}", "{ port }", "a{", "}b")
    assert make("command", command=command).arguments == (
        "engine", '{"port": 1}', "{}", "{Port}", "${HOME}", "{8123}", "{ port }", "a{", "}b",
    )  # fmt: skip


def test_values_are_not_filled_in_again() -> None:
    assert make("command", command=("engine", "{alias}"), model="{api_key}").arguments == ("engine", "{api_key}")


def test_unknown_placeholder_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pool small has the unknown placeholder \{prot\}: take one of \{port\}, "):
        make("command", command=("engine", "--port={prot}"))


def test_command_needs_a_model_only_where_it_names_one() -> None:
    assert not needs_model(order("command"))
    assert make("command", command=("engine",), model_path=None).arguments == ("engine",)
    with pytest.raises(ConfigError, match="Pool small names no model file"):
        make("command", command=("engine", "{model}"), model_path=None)


# ---- keys and masks


@pytest.mark.parametrize(
    ("launcher", "variable"),
    [
        ("llamacpp", KEY_VARIABLE),
        ("llama-server", "LLAMA_API_KEY"),
        ("vllm", "VLLM_API_KEY"),
        ("tgi", "API_KEY"),
        ("command", KEY_VARIABLE),
    ],
)
def test_key_is_in_the_environment_and_nowhere_else(launcher: str, variable: str) -> None:
    command = make(launcher, command=("engine",) if launcher == "command" else ())
    assert command.environment[variable] == KEY
    assert KEY not in " ".join(command.arguments)
    assert KEY not in repr(command)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_engine_sees_the_gpus_of_its_mask_only(launcher: str) -> None:
    """ORCH-3011: numbered as they were for the mask, not by speed."""
    environment = make(launcher, devices=(2, 0)).environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,0"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_engine_on_a_cpu_sees_no_gpu(launcher: str) -> None:
    """ORCH-3018."""
    assert make(launcher).environment["CUDA_VISIBLE_DEVICES"] == ""


def test_engine_without_a_mask_sees_every_gpu() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in make("vllm", allow_cpu=False).environment


def test_environment_of_the_pool_wins() -> None:
    mine = (("CUDA_VISIBLE_DEVICES", "GPU-1234"), ("OMP_NUM_THREADS", "1"))
    environment = make("vllm", devices=(0,), environment=mine).environment
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("GPU-1234", "1")


# ---- what cannot be run


def test_unknown_launcher_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="Pool small has the unknown launcher docker: take one of llamacpp, llama-ser"
    ):
        make("docker")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_model_that_is_not_named_is_refused(launcher: str) -> None:
    assert needs_model(order(launcher))
    with pytest.raises(ConfigError, match=f"Pool small names no model file, which the launcher {launcher} needs"):
        make(launcher, model_path=None)


def test_command_that_is_not_given_is_refused() -> None:
    with pytest.raises(ConfigError, match="has the launcher command, and no command"):
        make("command")


@pytest.mark.parametrize("launcher", ["llamacpp", "vllm", "tgi", "triton"])
def test_ratios_are_refused_where_nothing_could_heed_them(launcher: str) -> None:
    """ORCH-3012: silently split evenly, the smaller GPU would overflow."""
    with pytest.raises(ConfigError, match=f"launcher {launcher} divides a model evenly or not at all"):
        make(launcher, devices=(0, 1), tensor_split=(3.0, 1.0))
