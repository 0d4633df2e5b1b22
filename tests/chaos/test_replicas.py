"""Every fault of a managed engine ends with the system healthy by itself, under load, every status and byte checked.

ORCH-3038, ORCH-3039, ORCH-3049, ORCH-3053, OC-POOL-3010, ORCH-3303.
"""

import signal
from collections.abc import Iterator

import pytest

from llorch.launch.model_file import locate_demo_model
from tests.conftest import Processes
from tests.support.load import KEEPING, Load, Want, fake_answer
from tests.support.managed import HONEST, WARNINGS, Operator, fake, genuine_pool, kill, pool, tiny
from tests.support.process_table import assert_none_left, engine_processes, is_gone
from tests.support.service import make_config

WANTS = [
    Want("fake", max_tokens=(4, 40), share=3),
    Want("fake", priority="batch", max_tokens=(20, 60)),
]


def loaded(url: str) -> Load:
    return Load(url, WANTS, clients=6, may_fail=HONEST, oracle=fake_answer)


@pytest.fixture
def operator(processes: Processes) -> Iterator[Operator]:
    """Two pools on one route, two slots each."""
    pools = [
        pool("left", fake(2, token_interval_ms=5, managed={"memory_limit_mib": 300})),
        pool("right", fake(2, token_interval_ms=5)),
    ]
    service = processes.serve(make_config(pools, streams=KEEPING), replicas=2, expected=WARNINGS)
    operator = Operator(service)
    yield operator
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)


def test_engine_that_dies_hangs_or_grows_is_replaced_and_no_task_is_lost(operator: Operator) -> None:
    """By kill -9 while decoding; SIGSTOP; a port that accepts and never answers; more memory than allowed."""
    with loaded(operator.service.url) as load:
        load.wait_succeeded(10)
        operator.wait("left/0", lambda found: found["slots_busy"] > 0, "decodes")
        kill(operator.engine("left/0"))
        operator.wait_restarted("left/0", ["signal"], 1)
        load.wait_succeeded(5)

        operator.engine("right/0").send_signal(signal.SIGSTOP)
        operator.wait_restarted("right/0", ["unresponsive"], 1)
        load.wait_succeeded(5)

        operator.set_faults("right/0", freeze=True)
        operator.wait_restarted("right/0", ["unresponsive"], 2)
        load.wait_succeeded(5)

        operator.set_faults("left/0", hog_mib=400)
        operator.wait_restarted("left/0", ["host-oom"], 2)
        error = operator.replica("left/0")["last_error"]
        assert "300" in error["message"], error
        load.wait_succeeded(5)
        report = load.stop()
    assert report.outcomes["succeeded"] > 30, report
    assert len(report.failures) <= 4 * 2, "more than ran on the two slots of each of the four that failed"
    assert len(engine_processes(operator.service.pid)) == 2


def test_peer_bug_10_replica_that_fails_at_once_takes_no_more_tasks(operator: Operator) -> None:
    """FAULT-10, ORCH-3049: healthy by its own word, it fails its self-test, and is started anew for that."""
    with loaded(operator.service.url) as load:
        load.wait_succeeded(10)
        operator.set_faults("left/0", error_status=503)
        operator.wait("left/0", lambda found: found["state"] != "ready", "out of service")
        first = operator.engine("left/0")
        operator.wait_restarted("left/0", ["self-test"], 1)
        assert is_gone(first)
        error = operator.replica("left/0")["last_error"]
        assert "self-test" in error["message"], error
        load.wait_succeeded(10)
        report = load.stop()
    assert set(report.outcomes) == {"succeeded"}, "it refused before a token: everything was tried elsewhere"
    tried = [line for line in operator.service.lines() if line["event"] == "task_requeued"]
    assert 0 < len(tried) <= 2, "no more than it had slots: after its first fault it was not asked again"


def test_engine_that_dies_while_it_loads_comes_up_the_next_time(processes: Processes) -> None:
    slow = pool("slow", fake(load_s=1.0))
    service = processes.serve(
        make_config([pool("quick", fake(2, token_interval_ms=5)), slow], streams=KEEPING), expected=WARNINGS
    )
    operator = Operator(service)
    with loaded(service.url) as load:
        operator.wait("slow/0", lambda found: found["state"] == "loading", "loading")
        kill(operator.engine("slow/0"))
        operator.wait_restarted("slow/0", ["signal"], 1)
        load.wait_succeeded(5)
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)


def test_three_pools_of_genuine_engines_come_up_and_survive_the_death_of_each(processes: Processes) -> None:
    """Bar 1: strict tasks give the same bytes before and after."""
    pools = [
        genuine_pool("one", tiny()),
        genuine_pool("two", tiny(), tiny()),
        pool("other", fake(2, token_interval_ms=2)),
    ]
    service = processes.serve(make_config(pools, streams=KEEPING), replicas=4, expected=WARNINGS)
    operator = Operator(service)
    shown = operator.command("pools")
    for replica_id in ("one/0", "two/0", "two/1", "other/0"):
        assert any(line.startswith(replica_id) and "ready" in line for line in shown.splitlines()), shown
    texts: dict[tuple[str, int, int], str] = {}
    prompts, seeds = ["Once upon a time", "The lighthouse"], [1, 2, 3]
    strict = Want("tiny", is_strict=True, max_tokens=(40, 40), prompts=prompts, seeds=seeds)
    with Load(service.url, [strict, Want("fake")], clients=6, may_fail=HONEST) as load:
        load.wait_succeeded(20)
        for replica_id in ("one/0", "two/0", "two/1", "other/0"):
            kill(operator.engine(replica_id))
            operator.wait_restarted(replica_id, ["signal"], 1)
        load.wait_succeeded(20)
        load.stop()
        for ticket in load.tickets:
            if ticket.outcome == "succeeded" and ticket.body["model_ref"] == "tiny":
                key = (ticket.body["prompt"], ticket.body["seed"], ticket.body["max_tokens"])
                assert texts.setdefault(key, ticket.text) == ticket.text, "the same strict task, another answer"
    assert texts
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)


@pytest.mark.chaos
@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_genuine_engines_that_die_hang_and_die_again_under_load(processes: Processes, model: str) -> None:
    """With the default supervision but for the time that silence is borne."""
    path = {} if model == "tiny" else {"model_path": str(locate_demo_model())}
    patient = {"supervision": {"unresponsive_s": 5}}
    both = genuine_pool("both", tiny(), tiny(), model=model, **path, **patient)
    service = processes.serve(make_config([both], streams=KEEPING), replicas=2, expected=WARNINGS)
    operator = Operator(service)
    prompts, seeds = ["Once upon a time", "The lighthouse"], [1, 2, 3]
    wants = [
        Want(model, is_strict=True, max_tokens=(24, 24), prompts=prompts, seeds=seeds),
        Want(model, priority="batch", max_tokens=(8, 40), prompts=prompts, share=0.5),
    ]
    with Load(service.url, wants, clients=4, may_fail=HONEST) as load:
        load.wait_succeeded(12, 120)
        for replica_id in ("both/0", "both/1", "both/0"):
            failures = operator.replica(replica_id)["process"]["restarts"] + 1
            operator.wait(replica_id, lambda found: found["slots_busy"] > 0, "decodes")
            kill(operator.engine(replica_id))
            operator.wait_restarted(replica_id, ["signal"], failures)
            load.wait_succeeded(4, 120)
        operator.engine("both/1").send_signal(signal.SIGSTOP)
        operator.wait_restarted("both/1", ["unresponsive"], 2)
        load.wait_succeeded(12, 120)
        report = load.stop(120)
        texts: dict[tuple[str, int], str] = {}
        for ticket in load.tickets:
            if ticket.outcome == "succeeded" and ticket.body["determinism"] == "strict":
                key = (ticket.body["prompt"], ticket.body["seed"])
                assert texts.setdefault(key, ticket.text) == ticket.text, "the same strict task, another answer"
    print(f"{model}: {report.outcomes} over four deaths")  # noqa: T201 (`pytest -s`)
    assert len(report.failures) <= 4
    operator.close()
    service.stop()
    assert_none_left(service.pid, within_s=5)
