"""The same strict generation on two replica processes of the real engine gives the same tokens (ORCH-3045..3050)."""

import asyncio
import json
from pathlib import Path

import pytest

from llorch.adapters.llamacpp import LlamaCppEngine
from llorch.launch.model_file import find_demo_model
from llorch.service.ports import Generation, Sampling
from tests.conformance.engine_process import TINY_MODEL, EngineProcess

SEEDS = range(64)
PROMPT = "The lighthouse keeper wrote in his log:"


async def test_64_seeds_give_the_same_tokens_on_two_processes(tmp_path: Path) -> None:
    await compare_two_processes(TINY_MODEL, tmp_path, max_tokens=16)


@pytest.mark.prove
async def test_64_seeds_give_the_same_tokens_on_two_processes_of_the_demonstration_model(tmp_path: Path) -> None:
    await compare_two_processes(await find_demo_model(), tmp_path, max_tokens=24)


async def compare_two_processes(model: Path, tmp_path: Path, *, max_tokens: int) -> None:
    """Byte for byte; what differs is left in `token_diff.json`."""
    first, second = await asyncio.gather(*(generate_all(model, max_tokens) for _ in range(2)))
    diff = {seed: [first[seed], second[seed]] for seed in SEEDS if first[seed] != second[seed]}
    (tmp_path / "token_diff.json").write_text(json.dumps(diff, indent=1))
    assert not diff, f"{len(diff)} of {len(SEEDS)} seeds differ: {tmp_path / 'token_diff.json'}"
    assert all(first[seed] for seed in SEEDS), "a generation without tokens proves nothing"
    assert len({tuple(tokens) for tokens in first.values()}) > len(SEEDS) // 2, "the seed does not matter"


async def generate_all(model: Path, max_tokens: int) -> dict[int, list[str]]:
    """The tokens of every seed, from a process of their own with one slot and one thread."""
    found: dict[int, list[str]] = {}
    async with EngineProcess(model, ctx=512) as process:
        engine = LlamaCppEngine(process.url, api_key=process.api_key)
        for seed in SEEDS:
            found[seed] = []
            order = Generation(PROMPT, max_tokens, seed, strict=True, sampling=Sampling(temperature=0.8))
            await engine.generate(order, found[seed].extend)
        await engine.aclose()
    return found
