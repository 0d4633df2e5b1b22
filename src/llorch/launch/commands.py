"""What is executed for an order: the argument list and environment of each launcher.

Argument lists only, no shell. The engine's key goes by the environment, because a command line can be read by every
user of the machine. It starts nothing and looks at no file. Sources of the flags: llama.cpp, tools/server/README.md;
the CLI and environment references of vLLM; TGI, docs/source/reference/launcher.md; Triton, src/command_line_parser.cc.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from llorch.errors import ConfigError
from llorch.launch.llamacpp import KEY_VARIABLE
from llorch.service.launching import LaunchOrder

BUILT_IN: Final = "llamacpp"
"""The launcher of llorch's own engine process: the only one that announces the port that it took."""

_BATCH_TOKENS: Final = "64"
"""Between two batches llama.cpp looks whether its client has gone."""
_ALL_LAYERS: Final = "999"
_PLACEHOLDER: Final = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute. `environment` is added to that of the manager; it holds the key, and is never shown."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    host: str
    port: int
    api_key: str


def command_for(order: LaunchOrder, *, host: str, port: int, api_key: str) -> Command:
    """The command that runs this order at an address, asking its clients for a key.

    `port` 0 is for the launcher `llamacpp` alone. Raises ConfigError for an unknown launcher, a missing model or
    command, an unknown placeholder, or a tensor_split that the launcher has no means for.
    """
    launcher = _launcher(order)
    endpoint = _Endpoint(host, port, api_key)
    if order.tensor_split and not launcher.can_split:
        raise ConfigError(
            f"The launcher {order.launcher} divides a model evenly or not at all: leave tensor_split out of pool"
            f" {order.pool_id}, or use the launcher llama-server."
        )
    arguments = (*launcher.make(order, endpoint), *order.arguments)
    environment = {**_device_environment(order), launcher.key_variable: api_key, **dict(order.environment)}
    return Command(arguments, environment)


def program_of(order: LaunchOrder) -> str:
    """The name or path of what is executed. Raises ConfigError for an unknown launcher or a missing command."""
    launcher = _launcher(order)
    if order.launcher == "command":
        return _own_command(order)[0]
    return order.binary or launcher.program


def needs_model(order: LaunchOrder) -> bool:
    """Whether the launcher cannot do without a model file or directory."""
    return order.launcher != "command"


# ---- one function for each launcher


def _llamacpp(order: LaunchOrder, endpoint: _Endpoint) -> tuple[str, ...]:
    program = (order.binary,) if order.binary else (sys.executable, "-m", "llorch")
    options = {
        "--model": _model(order),
        "--host": endpoint.host,
        "--port": endpoint.port,
        "--slots": order.slots,
        "--ctx": order.ctx,
        "--alias": order.model,
        "--threads": order.threads,
    }
    return (*program, "engine", "llamacpp", *_flatten(options))


def _llama_server(order: LaunchOrder, endpoint: _Endpoint) -> tuple[str, ...]:
    options = {
        "-m": _model(order),
        "--host": endpoint.host,
        "--port": endpoint.port,
        "-c": order.ctx * order.slots,  # divided among the slots
        "-np": order.slots,
        "--alias": order.model,
        "-b": _BATCH_TOKENS,
        "-ub": _BATCH_TOKENS,
        "-t": order.threads,
        "-ngl": "0" if _is_on_cpu(order) else _ALL_LAYERS,
        "--tensor-split": _ratios(order) or None,
    }
    return (order.binary or "llama-server", *_flatten(options), "--slots", "--metrics")


def _vllm(order: LaunchOrder, endpoint: _Endpoint) -> tuple[str, ...]:
    options = {
        "--host": endpoint.host,
        "--port": endpoint.port,
        "--served-model-name": order.model,
        "--max-model-len": order.ctx,
        "--max-num-seqs": order.slots,
        "--tensor-parallel-size": len(order.devices) or None,
    }
    return (order.binary or "vllm", "serve", _model(order), *_flatten(options))


def _tgi(order: LaunchOrder, endpoint: _Endpoint) -> tuple[str, ...]:
    options = {
        "--model-id": _model(order),
        "--hostname": endpoint.host,
        "--port": endpoint.port,
        "--max-input-tokens": max(1, order.ctx - 1),  # its default may exceed max-total-tokens, which it refuses
        "--max-total-tokens": order.ctx,
        "--max-concurrent-requests": order.slots,
        "--num-shard": len(order.devices) or None,
        # Two launchers on one host would meet at the default.
        "--shard-uds-path": Path(tempfile.gettempdir()) / f"llorch-tgi-{endpoint.port}",
    }
    return (order.binary or "text-generation-launcher", *_flatten(options))


def _triton(order: LaunchOrder, endpoint: _Endpoint) -> tuple[str, ...]:
    # gRPC and metrics listen on fixed ports, where a second server would meet the first.
    return (
        order.binary or "tritonserver",
        f"--model-repository={_model(order)}",
        f"--http-address={endpoint.host}",
        f"--http-port={endpoint.port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
    )


def _command(order: LaunchOrder, endpoint: _Endpoint) -> tuple[str, ...]:
    values: dict[str, Callable[[], object]] = {
        "port": lambda: endpoint.port,
        "host": lambda: endpoint.host,
        "model": lambda: _model(order),
        "alias": lambda: order.model,
        "slots": lambda: order.slots,
        "ctx": lambda: order.ctx,
        "ctx_total": lambda: order.ctx * order.slots,
        "api_key": lambda: endpoint.api_key,
        "tensor_split": lambda: _ratios(order),
    }

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in values:
            known = ", ".join(f"{{{name}}}" for name in values)
            raise ConfigError(
                f"The command of pool {order.pool_id} has the unknown placeholder {match[0]}: take one of {known}."
            )
        return str(values[match[1]]())

    return tuple(_PLACEHOLDER.sub(value_of, word) for word in _own_command(order))


@dataclass(frozen=True, slots=True)
class _Launcher:
    program: str
    make: Callable[[LaunchOrder, _Endpoint], tuple[str, ...]]
    key_variable: str = KEY_VARIABLE
    can_split: bool = False


_LAUNCHERS: Final[Mapping[str, _Launcher]] = MappingProxyType(
    {
        BUILT_IN: _Launcher(sys.executable, _llamacpp),
        "llama-server": _Launcher("llama-server", _llama_server, "LLAMA_API_KEY", can_split=True),
        "vllm": _Launcher("vllm", _vllm, "VLLM_API_KEY"),
        # The launcher of TGI hands it on to its router on a command line; nothing that we can do prevents that.
        "tgi": _Launcher("text-generation-launcher", _tgi, "API_KEY"),
        "triton": _Launcher("tritonserver", _triton),  # it asks for no key
        "command": _Launcher("", _command, can_split=True),
    }
)


def _launcher(order: LaunchOrder) -> _Launcher:
    try:
        return _LAUNCHERS[order.launcher]
    except KeyError:
        known = ", ".join(_LAUNCHERS)
        raise ConfigError(
            f"Pool {order.pool_id} has the unknown launcher {order.launcher}: take one of {known}."
        ) from None


# ---- parts


def _device_environment(order: LaunchOrder) -> dict[str, str]:
    """Which GPUs the engine sees: those of the mask, none on a CPU, all without a mask."""
    if order.devices:
        mask = ",".join(str(index) for index in order.devices)
        # Without the second, CUDA numbers the GPUs by speed, and not as they were counted for the mask.
        return {"CUDA_VISIBLE_DEVICES": mask, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {"CUDA_VISIBLE_DEVICES": ""} if order.allow_cpu else {}


def _is_on_cpu(order: LaunchOrder) -> bool:
    return order.allow_cpu and not order.devices


def _ratios(order: LaunchOrder) -> str:
    """The ratios of a split, equal ones by default: llama.cpp's own default follows the memory that is free."""
    split = order.tensor_split or ((1.0,) * len(order.devices) if len(order.devices) > 1 else ())
    return ",".join(f"{ratio:g}" for ratio in split)


def _model(order: LaunchOrder) -> str:
    if not order.model_path:
        raise ConfigError(
            f"Pool {order.pool_id} names no model file, which the launcher {order.launcher} needs: add its path."
        )
    return order.model_path


def _own_command(order: LaunchOrder) -> tuple[str, ...]:
    if not order.command:
        raise ConfigError(f"Pool {order.pool_id} has the launcher command, and no command: add it.")
    return order.command


def _flatten(options: Mapping[str, object]) -> tuple[str, ...]:
    """Options as words; those without a value are left out."""
    return tuple(word for name, value in options.items() if value is not None for word in (name, str(value)))
