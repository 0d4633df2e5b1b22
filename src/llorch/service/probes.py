"""One replica as its probes find it: how it is, what it is, and what went wrong last.

A replica becomes Ready only when a probe found it able and what it is agrees with what its pool says.
"""

import asyncio
from dataclasses import dataclass

from llorch.domain.pool import Replica, ReplicaState
from llorch.domain.task import Cohort
from llorch.errors import LlorchError, PoolUnavailable, PoolUnready
from llorch.service.inventory import Fact, LastError
from llorch.service.ports import Clock, Engine, EngineFacts
from llorch.service.routes import Route

UNVERIFIED = Fact(None, "unverified")


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas under one configuration entry. `notice` is what every user of it should know."""

    pool_id: str
    route: Route
    notice: str | None = None


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """A replica as it is configured. Facts that are stated or were measured at its launch are taken as told.

    `slots` is how many attempts it may run at once.
    """

    replica_id: str
    pool: Pool
    engine: Engine
    slots: int
    engine_version: Fact = UNVERIFIED
    model_digest: Fact = UNVERIFIED


class Watched:
    """One replica: its configuration and what the last probe found."""

    def __init__(self, config: ReplicaConfig, clock: Clock) -> None:
        self.config = config
        self.last_error: LastError | None = None
        self._clock = clock
        self.foreign_slots = 0
        """Slots that work for somebody else, as last told to the scheduler."""
        self._facts: EngineFacts | None = None
        self._poked = asyncio.Event()
        self.state = ReplicaState.STARTING

    def replica(self) -> Replica:
        """What the scheduler is told. Until the engine has answered, its slots are taken for what is configured."""
        slots = self._facts.slots if self._facts is not None else self.config.slots
        return Replica(
            replica_id=self.config.replica_id,
            pool_id=self.config.pool.pool_id,
            slots=self.config.slots,
            cohort=Cohort(self.engine_version.value, self.model_digest.value, exact=slots == 1),
            state=self.state,
            can_interrupt=self.config.engine.can_interrupt,
        )

    @property
    def engine_version(self) -> Fact:
        """Stated, measured at launch, or told by the engine."""
        return self._fact(self.config.engine_version, self._facts.engine_version if self._facts else None)

    @property
    def model_digest(self) -> Fact:
        """Stated, measured at launch, or told by the engine."""
        return self._fact(self.config.model_digest, self._facts.model_digest if self._facts else None)

    def fail(self, error: LlorchError) -> None:
        """It will not come back by itself."""
        self.state = ReplicaState.FAILED
        self._note(error)

    def suspect(self) -> None:
        """It failed a task: look at once."""
        if self.state is ReplicaState.READY:
            self.state = ReplicaState.UNREADY
        self._poked.set()

    async def probe(self) -> None:
        """Ask the replica how it is, and what it is unless it was Ready all the time."""
        try:
            await self.config.engine.check_health()
            if self._facts is None or self.state is not ReplicaState.READY:
                self._facts = await self.config.engine.read_facts()
            self._compare(self._facts)
        except PoolUnavailable as mismatch:
            self._set(ReplicaState.UNREADY, mismatch)
        except PoolUnready as error:
            self._set(ReplicaState.LOADING if not self._was_ready else ReplicaState.UNREADY, error)
        except LlorchError as error:
            self._set(ReplicaState.STARTING if not self._was_ready else ReplicaState.UNREADY, error)
        else:
            self._set(ReplicaState.READY, None)

    async def count_busy(self) -> int | None:
        """How many slots the engine says are working; None where it does not tell, or not now."""
        try:
            return await self.config.engine.count_busy_slots()
        except LlorchError:
            return None

    async def wait(self, seconds: float) -> None:
        """Until the next probe is due, or something speaks for an earlier one."""
        try:
            async with asyncio.timeout(seconds):
                await self._poked.wait()
        except TimeoutError:
            return
        self._poked.clear()

    @property
    def _was_ready(self) -> bool:
        return self.state in (ReplicaState.READY, ReplicaState.UNREADY)

    def _set(self, state: ReplicaState, error: LlorchError | None) -> None:
        if self.state is ReplicaState.FAILED:
            return
        self.state = state
        if error is not None:
            self._note(error)

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
