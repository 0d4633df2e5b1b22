"""Replicas as the scheduler sees them: which there are, what they are, and which can take a task now.

How a replica's state is found out is not known here; it comes in as ReplicaChanged.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

from llorch.domain.ledger import Ledger
from llorch.domain.placement import Entry, Place, ReplicaSet
from llorch.domain.replica import Replica, ReplicaState
from llorch.domain.task import Cohort, Need

__all__ = ["FRESH_S", "Fleet", "Replica", "ReplicaState"]

FRESH_S = 6.0
"""How long what an engine told of its load is believed, in seconds; after it own leases alone count."""


class Fleet:
    """The replicas of one route, in the order of the configuration, which breaks ties.

    A replica is free when it is Ready and has a slot that neither an own lease nor foreign work fills. Its leases are
    read from the ledger whenever take, give_back, put or a report says that something changed; nothing walks over all
    replicas.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._busy = ledger.busy_slots
        self._replicas: dict[str, Replica] = {}
        self._places: dict[str, Place] = {}
        self._sets: dict[Cohort, ReplicaSet] = {}
        self._fresh_until: OrderedDict[str, float] = OrderedDict()
        self._ready_count = 0
        self._ready_slots = 0
        self._last_rank = 0

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def get(self, replica_id: str) -> Replica | None:
        """The replica as last told."""
        return self._replicas.get(replica_id)

    # What is told of replicas

    def put(self, replica: Replica) -> None:
        """Take over what was told of a replica. Costs O(log n)."""
        place, before = self._places.get(replica.replica_id), self._replicas.get(replica.replica_id)
        if place is not None and before is not None:
            self._discount(place, before)
        replica_set = self._sets.get(replica.cohort)
        if replica_set is None:
            replica_set = self._sets[replica.cohort] = ReplicaSet(replica.cohort)
        if place is None:
            place = self._places[replica.replica_id] = Place(replica.replica_id, 0, replica_set)
        if before is None:
            self._last_rank += 1
            place.rank = self._last_rank
        self._replicas[replica.replica_id] = replica
        self._count(place, replica, replica_set)
        replica_set.update(place, self._busy(replica.replica_id))

    def remove(self, replica_id: str) -> None:
        """The replica is no more. Idempotent.

        Leases that are still held there are settled as ever, and count should a replica of this id come again.
        """
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return
        place = self._places[replica_id]
        self._discount(place, replica)
        place.slots = place.foreign = 0
        self._fresh_until.pop(replica_id, None)
        if not self._busy(replica_id):
            del self._places[replica_id]

    def suspect(self, replica_id: str) -> None:
        """Take a Ready replica that just failed a task out of service until it is told Ready again.

        A replica that fails fast would else look idle and attract all the load.
        """
        replica = self._replicas.get(replica_id)
        if replica is not None and replica.state is ReplicaState.READY:
            self.put(replace(replica, state=ReplicaState.UNREADY))

    def note_foreign(self, replica_id: str, foreign_slots: int, now: float) -> None:
        """The engine says that so many of its slots work for somebody else; believed for FRESH_S seconds.

        `now` is never smaller than before.
        """
        if replica_id not in self._replicas:
            return
        if foreign_slots > 0:
            self._fresh_until[replica_id] = now + FRESH_S
            self._fresh_until.move_to_end(replica_id)
        else:
            self._fresh_until.pop(replica_id, None)
        self._set_foreign(self._places[replica_id], max(0, foreign_slots))

    def next_stale(self) -> float | None:
        """When the oldest report of foreign work must be dropped; None when there is none."""
        return next(iter(self._fresh_until.values())) if self._fresh_until else None

    def drop_stale(self, now: float) -> bool:
        """Believe own leases alone where the engine has not told its load for FRESH_S; True where that was so.

        An engine whose metrics fail would else keep the slots that it reported last closed for ever.
        """
        is_stale = False
        while (stale_at := self.next_stale()) is not None and stale_at <= now:
            replica_id, _ = self._fresh_until.popitem(last=False)
            self._set_foreign(self._places[replica_id], 0)
            is_stale = True
        return is_stale

    # What a task may expect

    def can_serve(self, need: Need) -> bool:
        """Some replica that meets the need is Ready or may yet become it. Costs O(cohorts)."""
        for replica_set in self._sets.values():  # noqa: SIM110 (asked for every task; a generator takes twice as long)
            if replica_set.alive and replica_set.suits(need):
                return True
        return False

    def can_start(self, need: Need) -> bool:
        """Some replica that meets the need is free. Costs O(cohorts)."""
        for replica_set in self._sets.values():  # noqa: SIM110 (as above)
            if replica_set.free and replica_set.suits(need):
                return True
        return False

    def ready(self, need: Need) -> bool:
        """Some replica that meets the need is Ready, if busy. Costs O(cohorts)."""
        return any(replica_set.ready and replica_set.suits(need) for replica_set in self._sets.values())

    @property
    def has_free(self) -> bool:
        """Some replica is free."""
        for replica_set in self._sets.values():  # noqa: SIM110 (as above)
            if replica_set.free:
                return True
        return False

    @property
    def ready_count(self) -> int:
        """How many replicas are Ready."""
        return self._ready_count

    @property
    def ready_slots(self) -> int:
        """Slots of the Ready replicas, busy or not."""
        return self._ready_slots

    @property
    def cohorts(self) -> list[Cohort]:
        """Of the replicas as last told, each once."""
        return list(self._sets)

    # Choice

    def choose(self, need: Need, *, prefer: str | None = None, detour_s: float = 0.0) -> Replica:
        """The free replica that meets the need with the least predicted work per slot.

        Of equals the one with the smaller share of its slots taken, then the one configured first. The replica
        `prefer` comes before it as long as it is free, meets the need and has at most `detour_s` seconds of work per
        slot more. The caller leases the slot and calls take() before anything else is asked; LookupError when no
        replica is free.
        """
        least: Entry | None = None
        for replica_set in self._sets.values():
            entry = replica_set.least(need)
            if entry is not None and (least is None or entry < least):
                least = entry
        if least is None:
            raise LookupError(f"no free replica meets {need}")
        if prefer is not None:
            place = self._places.get(prefer)
            if (
                place is not None
                and place.entry is not None
                and place.replica_set.suits(need)
                and place.entry[0] - least[0] <= detour_s
            ):
                return self._replicas[prefer]
        return self._replicas[least[3].replica_id]

    def take(self, replica_id: str, work_s: float) -> None:
        """A slot of the replica was leased for work that is predicted to last `work_s` seconds. After hold_slot."""
        place = self._places.get(replica_id)
        if place is None:
            return  # it was removed meanwhile
        place.work_s += work_s
        place.replica_set.update(place, self._busy(replica_id))

    def give_back(self, replica_id: str, work_s: float) -> None:
        """The lease was settled; `work_s` as it was taken. After settle_slot, once for every take."""
        place = self._places.get(replica_id)
        if place is None:
            return  # as above
        busy = self._busy(replica_id)
        left = place.work_s - work_s
        place.work_s = left if busy and left > 0.0 else 0.0  # to zero when idle: rounding leaves nothing behind
        place.replica_set.update(place, busy)
        if not busy and replica_id not in self._replicas:
            del self._places[replica_id]

    def work_s(self, replica_id: str) -> float:
        """Predicted seconds of work placed there and not over, over all its slots; 0 where nothing was placed."""
        place = self._places.get(replica_id)
        return 0.0 if place is None else place.work_s

    # The index

    def _set_foreign(self, place: Place, foreign: int) -> None:
        if place.foreign != foreign:
            place.foreign = foreign
            place.replica_set.update(place, self._busy(place.replica_id))

    def _count(self, place: Place, replica: Replica, replica_set: ReplicaSet) -> None:
        is_ready = replica.state is ReplicaState.READY
        place.replica_set = replica_set
        place.slots = replica.slots if is_ready else 0
        replica_set.members += 1
        replica_set.alive += replica.may_serve
        replica_set.ready += is_ready
        self._ready_count += is_ready
        self._ready_slots += place.slots

    def _discount(self, place: Place, replica: Replica) -> None:
        """Undo _count() of what was told before; a replica set without members is forgotten."""
        is_ready = replica.state is ReplicaState.READY
        replica_set = place.replica_set
        replica_set.withdraw(place)
        replica_set.members -= 1
        replica_set.alive -= replica.may_serve
        replica_set.ready -= is_ready
        self._ready_count -= is_ready
        self._ready_slots -= place.slots
        if not replica_set.members:
            del self._sets[replica_set.cohort]
