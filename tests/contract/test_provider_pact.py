"""ORCH-2001 … 2014: the live service keeps what `llorch.client` relies on, by the committed pact.

Every provider state is made over the public API and the engine's admin path; the service has no door for tests.
"""

import gc
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["PACT_DO_NOT_TRACK"] = "true"

from pact import Verifier

from tests.conftest import Processes
from tests.contract.interactions import (
    ADMIN_KEY,
    DATA_KEY,
    KEY,
    MODEL,
    NODE,
    NODE_TOKEN,
    OTHER_NODE,
    PACED_MODEL,
    POOL,
    QUOTA_KEYS,
    REMOTE_MODEL,
    REMOTE_POOL,
    RIVAL_KEY,
    SPARE_MODEL,
    SPARE_POOL,
    WIDE_MODEL,
)
from tests.contract.provider_states import CAPACITY, PACED_CAPACITY, TURNS, States
from tests.support.service import LlorchProcess, make_config, make_pool

PACTS = Path(__file__).parent / "pacts"
PRICE = {"prompt_per_1k": 1000, "output_per_1k": 1000}
QUOTAS: list[dict[str, Any]] = [
    {"name": "max-queued", "max_queued": 1},
    {"name": "rate", "rate": {"interactive": {"per_s": 0.01, "burst": 1}}},
    {"name": "tokens-per-minute", "tokens_per_minute": 60},
    {"name": "max-concurrent", "max_concurrent": 1},
]


REMOTE: dict[str, Any] = {
    "id": REMOTE_POOL, "engine": "llamacpp", "model": REMOTE_MODEL, "ctx": 2048, "allow_cpu": True,
    "replicas": [{"slots": 1, "managed": {"launcher": "command", "command": ["engine"], "node": NODE}}],
}  # fmt: skip
EXPECTED = ("task_ended", "replica_changed", "config_reload", "engine_failed")
"""What its log may warn of: tasks fail, a pool is drained, a configuration is refused, a node comes and goes."""


def key_entry(name: str, key: str, scopes: list[str], tenant: str = "pact") -> dict[str, Any]:
    return {"id": name, "tenant": tenant, "sha256": digest(key), "scopes": scopes}


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def service_and_states(processes: Processes) -> Iterator[tuple[LlorchProcess, States]]:
    engines = {
        MODEL: processes.fake(MODEL),
        PACED_MODEL: processes.fake(PACED_MODEL, token_interval_ms=5),
        WIDE_MODEL: processes.fake(WIDE_MODEL, slots=2),
        SPARE_MODEL: processes.fake(SPARE_MODEL),
    }
    pools = [
        make_pool(engines[MODEL], pool_id=POOL, queue={"capacity": CAPACITY}, price=PRICE),
        make_pool(
            engines[PACED_MODEL],
            queue={"capacity": PACED_CAPACITY, "full_policy": {"interactive": "shed-low-priority"}},
            preemption={"mode": "hard", "per_minute": 1000},
            price=PRICE,
        ),
        make_pool(engines[WIDE_MODEL]),
        make_pool(engines[SPARE_MODEL], pool_id=SPARE_POOL),
        REMOTE,
    ]
    config = make_config(pools, keys=[], sessions={"turns": TURNS}, tenants=QUOTAS)
    config["nodes"] = [{"id": NODE, "sha256": digest(NODE_TOKEN)}, {"id": OTHER_NODE, "sha256": "0" * 64}]
    config["keys"] = [
        key_entry("both", KEY, ["data", "control"]),
        key_entry("admin", ADMIN_KEY, ["admin"]),
        key_entry("data", DATA_KEY, ["data"]),
        key_entry("rival", RIVAL_KEY, ["data"], "rival"),
        *(key_entry(limit, key, ["data"], limit) for limit, key in QUOTA_KEYS.items()),
    ]
    service = processes.serve(config, replicas=len(engines), expected=EXPECTED)
    states = States(service, engines, processes.directory / "llorch.yaml")
    yield service, states
    states.close()
    service.stop()


def verify(service: LlorchProcess, states: States) -> None:
    """Raises AssertionError with the verifier's report when the service breaks the pact."""
    verifier = Verifier("llorch", host="127.0.0.1").add_source(PACTS).add_transport(url=service.url)
    verifier.state_handler(states.handlers(), teardown=False)
    verifier.set_error_on_empty_pact(enabled=True)
    try:
        verifier.verify()
    except RuntimeError:
        raise AssertionError(verifier.output(strip_ansi=True)[-8000:]) from None


def test_live_service_keeps_the_pact(service_and_states: tuple[LlorchProcess, States]) -> None:
    with warnings.catch_warnings():
        # pact-python does not close the socket on which it takes calls for states.
        warnings.simplefilter("ignore", ResourceWarning)
        verify(*service_and_states)
        gc.collect()
