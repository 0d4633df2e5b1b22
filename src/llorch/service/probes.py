"""One replica as its probes and its pool manager find it: how it is, what it is, and what went wrong last.

A replica becomes Ready only when a probe found it able, what it is agrees with what its pool says, and it passed its
self-test where it must. What the news mean for tasks is the scheduler's.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llorch.domain.replica import Replica, ReplicaState, check_move
from llorch.domain.task import Cohort
from llorch.errors import LlorchError, PoolUnavailable, PoolUnready
from llorch.service.inventory import Fact, LastError
from llorch.service.launching import Cause, LaunchOrder, LaunchReport, Phase
from llorch.service.ports import Clock, Engine, EngineFacts, SlotLoad
from llorch.service.routes import Route
from llorch.service.selftest import self_test

UNVERIFIED = Fact(None, "unverified")


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas under one configuration entry. `notice` is what every user of it should know.

    `drain_s` is how long running tasks may go on when a replica is drained, unless an order says otherwise.
    """

    pool_id: str
    route: Route
    notice: str | None = None
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True)
class EngineTimeouts:
    """How long an engine may take, in seconds: to be connected to, to its first byte, and between two pieces."""

    connect_s: float = 5.0
    first_byte_s: float = 60.0
    idle_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """A replica as it is configured. Facts that are stated are taken as told.

    `slots` is how many attempts it may run at once. One that somebody else started listens at `url` (or its client is
    given as `engine`); one without both is started by the pool manager of `node` (None: of this host) by `order`.
    `must_test`: it passes a self-test of at most `self_test_s` seconds whenever it is to become Ready. `rank` is its
    place in the configuration.
    """

    replica_id: str
    pool: Pool
    engine: Engine | None
    slots: int
    engine_version: Fact = UNVERIFIED
    model_digest: Fact = UNVERIFIED
    order: LaunchOrder | None = None
    node: str | None = None
    must_test: bool = False
    self_test_s: float = 30.0
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeouts: EngineTimeouts = field(default_factory=EngineTimeouts)
    ca_file: str | None = None
    """Certificates that the engine's is checked against where it speaks TLS; None: those of the system."""
    rank: int = 0


Connect = Callable[[ReplicaConfig, str, str | None], Engine]
"""Makes the client of an engine: configuration of its replica, URL, key."""

OnChange = Callable[["Watched"], None]
OnTest = Callable[["Watched", bool], None]


class Watched:
    """One replica: its configuration, what its manager told, and what the last probe found.

    `on_change` is called when what the scheduler is told of it may have changed, `on_test` after each self-test.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        clock: Clock,
        connect: Connect | None = None,
        *,
        on_change: OnChange | None = None,
        on_test: OnTest | None = None,
    ) -> None:
        self.config = config
        self.last_error: LastError | None = None
        self.launch: LaunchReport | None = None
        self.load: SlotLoad | None = None
        self.failed_tests = 0
        self.state = ReplicaState.STARTING
        self.comes_back = False
        self.foreign_slots = 0
        """Slots that work for somebody else, as last told to the scheduler."""
        self._clock = clock
        self._connect = connect
        self._on_change = on_change
        self._on_test = on_test
        self.engine = self._client()
        self._facts: EngineFacts | None = None
        self._cohort: Cohort | None = None
        self._launched_at = 0.0
        self._poked = asyncio.Event()
        self.news = asyncio.Event()
        """Set at every change, for whoever waits for one; they clear it."""

    # What is known

    @property
    def replica_id(self) -> str:
        """Its id in the server."""
        return self.config.replica_id

    @property
    def route_id(self) -> str:
        """The route that it serves."""
        return self.config.pool.route.route_id

    def replica(self) -> Replica:
        """What the scheduler is told. Until the engine has answered, its slots are taken for what is configured.

        A process that is started again counts as what the one before was, until it says otherwise: strict tasks that
        wait for it would else be stranded.
        """
        if self._facts is not None or self._cohort is None:
            slots = self._facts.slots if self._facts is not None else self.config.slots
            self._cohort = Cohort(self.engine_version.value, self.model_digest.value, exact=slots == 1)
        return Replica(
            replica_id=self.config.replica_id,
            pool_id=self.config.pool.pool_id,
            slots=self.config.slots,
            cohort=self._cohort,
            state=self.state,
            can_interrupt=self.engine is not None and self.engine.can_interrupt,
            comes_back=self.comes_back,
        )

    @property
    def engine_version(self) -> Fact:
        """Stated, measured at launch, or told by the engine."""
        launched = self.launch.engine_version if self.launch else None
        return self._fact(self.config.engine_version, launched or (self._facts.engine_version if self._facts else None))

    @property
    def model_digest(self) -> Fact:
        """Stated, measured at launch, or told by the engine."""
        if self.launch is not None and self.launch.model_digest is not None:
            return Fact(self.launch.model_digest, "measured")
        return self._fact(self.config.model_digest, self._facts.model_digest if self._facts else None)

    @property
    def process(self) -> LaunchReport | None:
        """What its manager told last, as it is now: the time until the next start has run on."""
        launch = self.launch
        if launch is None or launch.next_start_s is None:
            return launch
        elapsed_s = self._clock.monotonic() - self._launched_at
        return replace(launch, next_start_s=max(0.0, launch.next_start_s - elapsed_s))

    # What becomes of it

    def move(self, state: ReplicaState, *, comes_back: bool = False) -> None:
        """Be in this state from now on. Raises IllegalTransition."""
        if (state, comes_back) == (self.state, self.comes_back):
            return
        check_move(self.state, state)
        self.state, self.comes_back = state, comes_back
        self._tell()

    def suspect(self) -> None:
        """It failed a task: look at once."""
        if self.state is ReplicaState.READY:
            self.move(ReplicaState.UNREADY)
        self._poked.set()

    def exchange(self, config: ReplicaConfig) -> Engine | None:
        """Be another process under the same id from now on; returns the client that is of no more use."""
        old = self.engine
        self.config, self.launch, self.load, self._facts = config, None, None, None
        self.engine = self._client()
        self.failed_tests = 0
        self.move(ReplicaState.STARTING)
        self._poked.set()
        return old if old is not self.engine else None

    def reconfigure(self, config: ReplicaConfig) -> None:
        """Go on with the same process under other settings.

        A client that is replaced goes on with what it has under way, and drops its connections as they grow old.
        """
        is_other = (config.timeouts, config.ca_file) != (self.config.timeouts, self.config.ca_file)
        self.config = config
        if is_other and self.engine is not None:
            self.engine = self._client()
        self._poked.set()
        self._tell()

    def _client(self) -> Engine | None:
        """The client of the engine as it is known now; None while there is none."""
        config, launch = self.config, self.launch
        if config.engine is not None or self._connect is None:
            return config.engine
        if config.url is not None:
            return self._connect(config, config.url, config.api_key)
        if launch is not None and launch.url is not None and launch.phase in _ANSWERING:
            return self._connect(config, launch.url, launch.api_key)
        return None

    def take_launch(self, report: LaunchReport) -> Engine | None:
        """Take over what its manager told; returns the client that is of no more use, to be closed."""
        before, self.launch = self.launch, report
        self._launched_at = self._clock.monotonic()
        old = None
        if before is None or (report.incarnation, report.url) != (before.incarnation, before.url):
            self.failed_tests = 0
        is_up = report.phase in _ANSWERING and report.url is not None
        if self.engine is not None and not (is_up and before is not None and _is_same(before, report)):
            old, self.engine = self.engine, None
            self._facts = self.load = None
        if self.engine is None:
            self.engine = self._client()
        if report.error is not None and (before is None or before.error != report.error):
            self.last_error = report.error
        self._follow(report, is_up=is_up)
        self._poked.set()
        self._tell()
        return old

    def _follow(self, report: LaunchReport, *, is_up: bool) -> None:
        """Be in the state that the process leaves; while it is up, the probes say which."""
        state = self.state
        if state is ReplicaState.DRAINING:
            return
        if report.phase is Phase.STOPPED:
            self.move(ReplicaState.STOPPED)
        elif is_up:
            if state.is_gone:
                self.move(ReplicaState.STARTING)
        elif report.phase is Phase.WAITING and report.cause is Cause.GPU:
            self.move(ReplicaState.FAILED)  # ORCH-3018: tasks are not to wait for a GPU that is not there
        elif state is not ReplicaState.FAILED:
            self.move(ReplicaState.STARTING)

    # Probes

    async def probe(self) -> None:
        """Ask the replica how it is, and what it is unless it was Ready all the time."""
        engine = self.engine
        if engine is None or self.state in _SETTLED:
            return
        try:
            found = await self._ask(engine)
        except LlorchError as error:
            found = error
        if engine is self.engine and self.state not in _SETTLED:  # it may have gone meanwhile
            self._conclude(found)

    async def _ask(self, engine: Engine) -> LlorchError | None:
        """None when it is able and what it should be; else why not."""
        await engine.check_health()
        if self._facts is None or self.state is not ReplicaState.READY:
            self._facts = await engine.read_facts()
        self._compare(self._facts)
        if self.state is not ReplicaState.READY and self.config.must_test:
            return await self._test(engine)
        return None

    async def _test(self, engine: Engine) -> LlorchError | None:
        """The self-test, once nothing works there any more: neither tasks of ours nor what a lost node left behind."""
        load = await engine.read_load()
        if engine is not self.engine or self.state in _SETTLED:
            return None
        self.move(ReplicaState.SELF_TEST)
        if load is not None and load.busy_slots:
            return PoolUnready(f"{load.busy_slots} of its slots still work; it is tested once they are idle")
        try:
            await self_test(engine, timeout_s=self.config.self_test_s)
        except PoolUnready as error:
            self.failed_tests += 1
            self._note_test(is_passed=False)
            return error
        self.failed_tests = 0
        self._note_test(is_passed=True)
        return None

    def _note_test(self, *, is_passed: bool) -> None:
        if self._on_test is not None:
            self._on_test(self, is_passed)

    def _conclude(self, found: LlorchError | None) -> None:
        if found is None:
            self.move(ReplicaState.READY)
        else:
            self._note(found)
            self.move(self._state_after(found))
        self._tell()

    def _state_after(self, found: LlorchError) -> ReplicaState:
        """Unready once it was more than that, or is not what it should be; else as far as it has come up."""
        if isinstance(found, PoolUnavailable) or self.state in (ReplicaState.READY, ReplicaState.UNREADY):
            return ReplicaState.UNREADY
        if isinstance(found, PoolUnready):
            return ReplicaState.UNREADY if self.state is ReplicaState.SELF_TEST else ReplicaState.LOADING
        return ReplicaState.STARTING

    async def read_load(self) -> SlotLoad | None:
        """What the engine says its slots do; None where it does not tell, or not now."""
        if self.engine is None:
            return None
        try:
            self.load = await self.engine.read_load()
        except LlorchError:
            self.load = None
        return self.load

    async def wait(self, seconds: float | None) -> None:
        """Until the next probe is due, or something speaks for an earlier one."""
        try:
            async with asyncio.timeout(seconds):
                await self._poked.wait()
        except TimeoutError:
            return
        self._poked.clear()

    def _tell(self) -> None:
        self.news.set()
        if self._on_change is not None:
            self._on_change(self)

    def _note(self, error: LlorchError) -> None:
        self.last_error = LastError(error.code, error.message, self._clock.wall())

    def _compare(self, facts: EngineFacts) -> None:
        """Raise PoolUnavailable when the engine is not what its pool says."""
        ctx, slots = self.config.pool.route.ctx, self.config.slots
        if facts.slots is not None and facts.slots < slots:
            raise PoolUnavailable(f"the engine has {facts.slots} slots, the configuration says {slots}")
        if facts.ctx_per_slot is not None and facts.ctx_per_slot < ctx:
            raise PoolUnavailable(f"the engine has a context of {facts.ctx_per_slot} per slot, the pool says {ctx}")
        for name, said, told in (
            ("version", self.config.engine_version, facts.engine_version),
            ("model digest", self.config.model_digest, facts.model_digest),
        ):
            if said.source == "stated" and told is not None and told != said.value:
                raise PoolUnavailable(f"the engine's {name} is {told}, the configuration says {said.value}")

    @staticmethod
    def _fact(configured: Fact, told: str | None) -> Fact:
        if configured.value is None and told is not None:
            return Fact(told, "measured")
        return configured


_ANSWERING = (Phase.LOADING, Phase.UP)
_SETTLED = (ReplicaState.DRAINING, ReplicaState.STOPPED, ReplicaState.FAILED)


def _is_same(before: LaunchReport, now: LaunchReport) -> bool:
    """It is the same process at the same address, and was within reach all the time."""
    return (before.incarnation, before.url, before.api_key) == (
        now.incarnation, now.url, now.api_key,
    ) and before.phase in _ANSWERING  # fmt: skip
