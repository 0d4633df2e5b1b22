"""Random histories of a route: after every event nothing is lost, doubled, overtaken or overfilled."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from llorch.domain import events as ev
from llorch.domain.ledger import Ledger, SessionLimits
from llorch.domain.policy import (
    NO_QUOTA,
    Fairness,
    FullPolicy,
    Order,
    PreemptionPolicy,
    Prices,
    QueuePolicy,
    Quota,
    Rate,
    RoutePolicy,
)
from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.scheduler import Scheduler
from llorch.domain.task import Budgets, Cohort, Fault, Priority, TaskKey, TaskSpec, TaskState
from llorch.errors import DecodeTimeout, Internal, InvalidParams, PoolUnready, WorkerReset
from tests.unit.domain.history_model import Model

WALL_S, GRACE_S, TTL_S, TURNS = 40.0, 10.0, 60.0, 20
CAPACITY = {Priority.INTERACTIVE: 3, Priority.BATCH: 4}
TENANTS = ("acme", "other", "third")
QUOTAS = {
    "other": Quota(max_concurrent=1, max_queued=4, tokens_per_minute=2000),
    "third": Quota(rate=dict.fromkeys(Priority, Rate(per_s=2.0, burst=3)), kv_tokens=60),
}
OTHER_QUOTAS: tuple[dict[str, Quota], ...] = (
    QUOTAS,
    {"acme": Quota(max_concurrent=1), "other": Quota(max_concurrent=2, max_queued=2, tokens_per_minute=2000)},
    {"other": Quota(tokens_per_minute=500), "third": Quota(max_concurrent=1, kv_tokens=20)},
    {},
)
BUDGETS = (None, None, Budgets(tokens=200), Budgets(time_s=30.0, cost=5.0))
POLICIES = st.builds(
    QueuePolicy,
    capacity=st.just(CAPACITY),
    full_policy=st.fixed_dictionaries({p: st.sampled_from([FullPolicy.REJECT, FullPolicy.DROP_LRU]) for p in Priority}),
    fairness=st.sampled_from(Fairness),
    order=st.sampled_from(Order),
    weights=st.sampled_from([{}, {"acme": 3.0}]),
)
OTHER_POLICIES = st.builds(
    replace,
    POLICIES,
    capacity=st.sampled_from([CAPACITY, dict.fromkeys(Priority, 1), dict.fromkeys(Priority, 9)]),
    level_weights=st.sampled_from([dict.fromkeys(Priority, 1.0), {Priority.INTERACTIVE: 8.0, Priority.BATCH: 1.0}]),
    output_cost=st.sampled_from([1.0, 2.0, 8.0]),
    edf_default_s=st.sampled_from([5.0, 60.0]),
)
PREEMPTION = st.sampled_from(
    [
        PreemptionPolicy(),
        PreemptionPolicy(hard=True),
        PreemptionPolicy(hard=True, per_task=1, per_minute=1),
        PreemptionPolicy(hard=True, protected=frozenset(Priority)),
    ]
)
NAMES = st.sampled_from([("acme", f"t{number}") for number in range(20)] + [("other", "t0"), ("other", "t1")])
SESSIONS = st.sampled_from([f"s{number}" for number in range(6)])
FAILURES = [None, None, WorkerReset, WorkerReset, WorkerReset, PoolUnready, DecodeTimeout, InvalidParams, Internal]
FAULTS = st.sampled_from(FAILURES)
STATES = st.sampled_from([*ReplicaState, *[ReplicaState.READY] * 12])
REPLICAS = st.tuples(st.integers(1, 3), st.booleans())
INDEX = st.integers(0, 11)
WISHES = st.integers(0, 4 * 4 * 4 * 6 * 30 - 1)
"""A whole submission in one draw, which is what makes histories long within little time."""


def wishes_of(number: int) -> dict[str, Any]:
    number, flags = divmod(number, 4)
    number, strictness = divmod(number, 4)
    number, hurry = divmod(number, 4)
    deadline, session = divmod(number, 6)
    return {
        "session": f"s{session}",
        "priority": Priority.BATCH if flags & 1 else Priority.INTERACTIVE,
        "strict": strictness == 0,
        "deadline_s": float(deadline) if hurry == 0 else None,
        "abort_late": bool(flags & 2),
        "cancel_unread": bool(flags & 2),
        "prompt_tokens": 5 * session,
        "can_continue": strictness != 1,
        "tenant": TENANTS[(session + flags) % 3],
    }


SHORT = settings(
    max_examples=50, stateful_step_count=40, derandomize=True, database=None, deadline=None,
    phases=(Phase.generate,),  # to shrink a history takes minutes; the first one found says enough
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
LONG = settings(SHORT, max_examples=500, stateful_step_count=100)


class Histories(RuleBasedStateMachine):
    """Every rule is an event that the dispatcher may post, or a stale or doubled one that it should survive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.added = 0
        self.model: Model = Model(RoutePolicy())

    def post(self, event: ev.Event) -> list[ev.Command]:
        self.model.take(event)
        commands = self.scheduler.handle(event, self.now)
        self.model.follow(event, commands, self.now)
        self.scheduler.check_invariants()
        self.model.check(self.ledger, self.now)
        self.model.check_bounds()
        assert self.scheduler.tasks == self.model.live
        if not isinstance(event, ev.FirstToken | ev.TokensProduced | ev.FollowerJoined | ev.FollowerLeft):
            self.model.check_time(self.now)
            wakeup = self.scheduler.next_wakeup()
            assert wakeup is None or wakeup > self.now
        return commands

    @initialize(fleet=st.lists(REPLICAS, min_size=1, max_size=3), queue=POLICIES, hard=st.booleans())
    def configure(self, fleet: list[tuple[int, bool]], queue: QueuePolicy, hard: bool) -> None:
        policy = RoutePolicy(
            queue, WALL_S, GRACE_S, attempts=3, preemption=PreemptionPolicy(hard), prices=Prices(0.001, 0.01)
        )
        self.ledger = Ledger(SessionLimits(ttl_s=TTL_S, turns=TURNS), QUOTAS)
        self.scheduler = Scheduler(policy, self.ledger)
        self.model = Model(policy, QUOTAS)
        for number, (slots, is_exact) in enumerate(fleet):
            self.post(ev.ReplicaChanged(Replica(f"r{number}", "pool", slots, Cohort("v1", None, exact=is_exact))))
        for number in range(len(fleet)):
            self.change(number, ReplicaState.READY, "v1")

    @rule(index=INDEX, state=STATES, version=st.sampled_from(["v1", "v1", "v1", "v2"]))
    def change(self, index: int, state: ReplicaState, version: str) -> None:
        known = list(self.model.replicas.values())[index % len(self.model.replicas)]
        cohort = Cohort(version, None, exact=known.cohort.exact)
        told = Replica(known.replica_id, "pool", known.slots, cohort, state, index % 4 > 0, comes_back=index % 3 == 0)
        self.post(ev.ReplicaChanged(told))

    @rule(index=INDEX, comes_back=st.booleans(), is_removed=st.booleans())
    def empty(self, index: int, comes_back: bool, is_removed: bool) -> None:
        """A replica drains, its deadline passes, and perhaps it goes for good, before or after its engine let go."""
        known = list(self.model.replicas.values())[index % len(self.model.replicas)]
        self.post(ev.ReplicaChanged(replace(known, state=ReplicaState.DRAINING, comes_back=comes_back)))
        self.vacate(known.replica_id)
        if is_removed and not comes_back:
            self.added += 1
            fresh = replace(known, replica_id=f"n{self.added}", state=ReplicaState.READY, comes_back=False)
            if index % 3 or len(self.model.replicas) == 1:
                self.post(ev.ReplicaChanged(fresh))
            self.post(ev.ReplicaRemoved(known.replica_id))
            assert not self.post(ev.ReplicaRemoved(known.replica_id))

    def vacate(self, replica_id: str) -> None:
        """Everything leaves, and nothing ends that could have gone on."""
        runs = self.model.stays(replica_id)
        could_move = [self.model.can_move(run) for run in runs]
        self.post(ev.ReplicaVacated(replica_id))
        assert not self.model.stays(replica_id)
        assert [run.is_moved for run in runs] == could_move
        for run in runs:
            assert run.is_moved or (run.task.fault is not None and run.task.fault.policy_label == "drain")
        self.post(ev.ReplicaVacated(replica_id))

    @rule(index=INDEX, is_removed=st.booleans())
    def lose(self, index: int, is_removed: bool) -> None:
        """A replica is vacated or goes while it serves, and comes again under its id before its attempts have ended."""
        known = list(self.model.replicas.values())[index % len(self.model.replicas)]
        self.post(ev.ReplicaRemoved(known.replica_id) if is_removed else ev.ReplicaVacated(known.replica_id))
        self.post(ev.ReplicaChanged(known))

    @rule(queue=OTHER_POLICIES, preemption=PREEMPTION, wall_s=st.sampled_from([WALL_S, 15.0]), bindings=INDEX)
    def configure_anew(self, queue: QueuePolicy, preemption: PreemptionPolicy, wall_s: float, bindings: int) -> None:
        self.post(ev.Tick())  # what is due ends by that, and not by the change
        before = set(self.model.live)
        known = self.model.policy
        new = replace(known, queue=queue, preemption=preemption, wall_s=wall_s, bindings=bindings)
        commands = self.post(ev.ConfigChanged(new))
        assert all(isinstance(command, ev.Start | ev.Abort) for command in commands), commands
        assert self.model.live.keys() == before

    @rule(quotas=st.sampled_from(OTHER_QUOTAS), ttl_s=st.sampled_from([TTL_S, 10.0]))
    def set_quotas(self, quotas: dict[str, Quota], ttl_s: float) -> None:
        reserved = sorted(self.ledger.outstanding())
        self.ledger.reconfigure(quotas, NO_QUOTA, SessionLimits(ttl_s=ttl_s, turns=TURNS))
        assert sorted(self.ledger.outstanding()) == reserved
        self.model.take_quotas(quotas)
        for tenant in self.ledger.take_lifted():  # before all are told, one may wait in vain
            event = ev.LimitLifted(tenant)
            self.model.follow(event, self.scheduler.handle(event, self.now), self.now)
        self.post(ev.Tick())

    @rule(wishes=st.lists(WISHES, min_size=1, max_size=6))
    def submit(self, wishes: list[int]) -> None:
        for wish in wishes:
            self.submit_one(**wishes_of(wish))

    @rule(key=NAMES, wish=WISHES)
    def submit_under_an_old_name(self, key: TaskKey, wish: int) -> None:
        if key not in self.model.live:  # whoever posts has looked whether it is there
            self.submit_one(**wishes_of(wish), key=key)

    def submit_one(self, session: str, tenant: str, key: TaskKey | None = None, **wishes: Any) -> None:
        key = key or (tenant, f"t{len(self.model.admitted)}")
        if key in self.model.live or any(run.task.key == key for run in self.model.runs.values()):
            return
        budgets = BUDGETS[len(session) + int(session[1:]) - 2 & 3]
        spec = TaskSpec(key=key, session=(key[0], session), max_tokens=8, expected_tokens=8, budgets=budgets, **wishes)
        self.post(ev.Tick())  # what is due ends by that, and not by the submission
        before = self._footprint(spec)
        commands = self.post(ev.TaskSubmitted(spec))
        if any(isinstance(command, ev.Reject) for command in commands):
            assert not any(isinstance(command, ev.Admit) for command in commands)
            assert self._footprint(spec) == before, "a refused submission changed something"
        else:
            assert isinstance(commands[0], ev.Admit)

    def _footprint(self, spec: TaskSpec) -> object:
        session = self.ledger.sessions.get(spec.session, self.now)
        turns = None if session is None else (session.turns, session.expires_at)
        reserved = sorted(self.ledger.outstanding())
        return turns, reserved, len(self.ledger.sessions), spec.key in self.scheduler.tasks, len(self.model.admitted)

    @rule(key=NAMES)
    def cancel(self, key: TaskKey) -> None:
        task = self.model.live.get(key)
        bystanders = {k: (t.state, t.attempt) for k, t in self.model.live.items() if k != key}
        commands = self.post(ev.CancelRequested(key))
        if task is None:
            assert not any(isinstance(c, ev.Abort) and c.attempt.task == key for c in commands)
            return
        assert task.state is TaskState.CANCELED
        for other, (state, attempt) in bystanders.items():
            if state is TaskState.RUNNING and (now := self.model.live.get(other)) is not None:
                assert now.attempt is attempt

    @precondition(lambda self: self.model.runs)
    @rule(indices=st.lists(INDEX, min_size=1, max_size=3), kind=FAULTS)
    def end_attempts(self, indices: list[int], kind: Any) -> None:
        for index in indices:
            if self.model.runs:
                self.end_attempt(index, kind)

    def end_attempt(self, index: int, kind: Any) -> None:
        attempt_id = sorted(self.model.runs)[index % len(self.model.runs)]
        fault = None if kind is None else Fault(kind, "drawn")
        self.post(ev.AttemptEnded(self.model.runs[attempt_id].task.key, attempt_id, fault))

    @precondition(lambda self: self.model.runs)
    @rule(index=INDEX)
    def stall(self, index: int) -> None:
        attempt_id = sorted(self.model.runs)[index % len(self.model.runs)]
        run = self.model.runs[attempt_id]
        self.post(ev.AttemptStalled(run.task.key, attempt_id, Fault(DecodeTimeout, "silent")))
        assert run.is_aborted, "its slot is not released"

    @precondition(lambda self: self.model.runs)
    @rule(index=INDEX, count=st.integers(1, 3))
    def produce(self, index: int, count: int) -> None:
        attempt_id = sorted(self.model.runs)[index % len(self.model.runs)]
        run = self.model.runs[attempt_id]
        assert self.post(ev.FirstToken(run.task.key, attempt_id)) == []
        before = run.task.tokens_out
        assert self.post(ev.TokensProduced(run.task.key, attempt_id, count)) == []
        assert run.task.tokens_out == before + count, "what was given is counted, whoever ended the task"

    @precondition(lambda self: self.model.ended)
    @rule(index=INDEX, kind=FAULTS)
    def hear_of_an_old_attempt(self, index: int, kind: Any) -> None:
        attempt_id = sorted(self.model.ended)[index % len(self.model.ended)]
        task = self.model.ended[attempt_id].task
        before = (task.tokens_out, task.first_token_at)
        self.post(ev.FirstToken(task.key, attempt_id))
        self.post(ev.TokensProduced(task.key, attempt_id, 5))
        assert (task.tokens_out, task.first_token_at) == before
        self.post(ev.AttemptStalled(task.key, attempt_id, Fault(DecodeTimeout, "stale")))
        self.post(ev.AttemptEnded(task.key, attempt_id, None if kind is None else Fault(kind, "stale")))

    @rule(key=NAMES)
    def join(self, key: TaskKey) -> None:
        self.post(ev.FollowerJoined(key))

    @rule(key=NAMES)
    def leave(self, key: TaskKey) -> None:
        self.post(ev.FollowerLeft(key))
        task = self.model.live.get(key)
        assert task is None or task.readers >= 0

    @rule(tenant=st.sampled_from(TENANTS), session=SESSIONS)
    def delete_session(self, tenant: str, session: str) -> None:
        self.post(ev.SessionDeleted((tenant, session)))
        assert not [t for t in self.model.live.values() if t.spec.session == (tenant, session)]

    @rule(seconds=st.floats(0.0, 5.0), is_ticked=st.booleans())
    def pass_time(self, seconds: float, is_ticked: bool) -> None:
        self.now += seconds
        if is_ticked:
            self.post(ev.Tick())

    @rule()
    def wake_up(self) -> None:
        self.now = max(self.now, self.scheduler.next_wakeup() or self.now)
        self.post(ev.Tick())

    @rule(bursts=st.binary(min_size=30, max_size=90))
    def storm(self, bursts: bytes) -> None:
        """Many events in one draw, three bytes each; the mix keeps the queues full and the replicas failing."""
        for kind, one, other in zip(bursts[::3], bursts[1::3], bursts[2::3], strict=False):
            self._happen(kind % 16, one, other)

    def _happen(self, kind: int, one: int, other: int) -> None:
        runs = sorted(self.model.runs)
        if kind < 6:
            self.submit_one(**wishes_of(one * 256 + other))
        elif kind < 9 and runs:
            self.end_attempt(one, FAILURES[other % len(FAILURES)])
        elif kind == 9 and runs:
            self.produce(one, 1) if other % 3 else self.stall(one)
        elif kind == 10 and runs:
            self.cancel(self.model.runs[runs[one % len(runs)]].task.key)
        elif kind == 11 and self.model.waiting:
            self.cancel(list(self.model.waiting)[one % len(self.model.waiting)])
        elif kind == 12:
            self.pass_time(one / 50, is_ticked=other % 2 == 0)
        elif kind < 15:
            state = list(ReplicaState)[other % len(ReplicaState)] if other >= 190 else ReplicaState.READY
            self.change(one, state, "v2" if one >= 200 else "v1")
        elif self.model.live:
            key = list(self.model.live)[one % len(self.model.live)]
            (self.join if other % 3 else self.leave)(key)

    @precondition(lambda self: len(self.model.admitted) > 40)
    @rule(grace_s=st.sampled_from([0.0, 5.0]))
    def shut_down(self, grace_s: float) -> None:
        self.post(ev.ShutdownRequested(grace_s))

    def teardown(self) -> None:
        """Every history can be brought to an end, and then each admitted task has ended once and nothing is held."""
        if not self.model.replicas:
            return
        self.post(ev.ShutdownRequested(0.0))
        assert not self.model.live
        for attempt_id, run in sorted(self.model.runs.items()):
            assert run.is_aborted
            self.post(ev.AttemptEnded(run.task.key, attempt_id, None))
        assert self.model.finishes == {task.order: 1 for task in self.model.admitted}
        assert self.ledger.leases() == []
        assert self.ledger.outstanding() == []
        assert not self.scheduler.attempts
        assert not self.scheduler.sessions
        assert self.scheduler.next_wakeup() is None


def test_any_history_of_events_keeps_what_was_promised() -> None:
    """ORCH-3004, 3008, 3010, 3080, 3112, 3116..3118, 3140..3149, OC-CORE-1003; peer_bug_01..03, 05, 06, 11, 24."""
    run_state_machine_as_test(Histories, settings=SHORT)


@pytest.mark.prove
def test_any_long_history_of_events_keeps_what_was_promised() -> None:
    run_state_machine_as_test(Histories, settings=LONG)
