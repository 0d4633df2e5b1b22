"""One fair, honest, deterministic queue in front of every LLM inference engine a team runs on its own GPUs."""

from importlib.metadata import version

__version__ = version("llorch")
