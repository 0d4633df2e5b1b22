"""Which free replica of a replica set has the least work, found without looking at all of them.

Owns the predicted work placed on each replica and the order among those that are free. Knows neither states nor
leases nor time: the Fleet says which replica is free and how much of it is taken.
"""

from heapq import heapify, heappop, heappush, heapreplace

from llorch.domain.task import Cohort, Need

_SLACK = 64


class Place:
    """What placement keeps of one replica. `rank` is its place in the configuration, which breaks ties.

    `slots` are those that may be leased, none while the replica is not Ready; `foreign` ones work for somebody else.
    `work_s` is predicted work placed here and not over. `entry` is where it stands in the order of its replica set,
    None while it is not free.
    """

    __slots__ = ("entry", "foreign", "rank", "replica_id", "replica_set", "slots", "work_s")

    def __init__(self, replica_id: str, rank: int, replica_set: "ReplicaSet") -> None:
        self.replica_id = replica_id
        self.rank = rank
        self.replica_set = replica_set
        self.slots = 0
        self.foreign = 0
        self.work_s = 0.0
        self.entry: Entry | None = None


Entry = tuple[float, float, int, Place]
"""(seconds of work per slot, share of the slots taken, rank, place): the smallest is the least loaded.

The share decides while nothing is predicted yet. Ranks differ, so that places are never compared.
"""


class ReplicaSet:
    """The replicas of one cohort: how many there are, how many may serve now or later, and the order of the free ones.

    The order is a heap in which entries that no longer hold stay until they come up, or until they outnumber the
    free replicas: a change costs O(log n), amortised.
    """

    __slots__ = ("_heap", "alive", "cohort", "free", "is_exact", "members", "ready")

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.is_exact = cohort.exact
        self.members = 0
        self.alive = 0
        self.ready = 0
        self.free = 0
        self._heap: list[Entry] = []

    @property
    def entries(self) -> int:
        """Size of the heap, with the entries that no longer hold."""
        return len(self._heap)

    def suits(self, need: Need) -> bool:
        """A task with this need may run here."""
        if need.cohort is not None:
            return self.cohort == need.cohort
        return self.is_exact or not need.exact

    def update(self, place: Place, busy: int) -> None:
        """Put the replica where it belongs now that so many of its slots are leased: it is free, or it is not."""
        slots, taken = place.slots, busy + place.foreign
        if taken >= slots:
            self.withdraw(place)
            return
        if place.entry is None:
            self.free += 1
        place.entry = entry = (place.work_s / slots, taken / slots, place.rank, place)
        heap = self._heap
        if heap and (first := heap[0])[3].entry is not first:
            heapreplace(heap, entry)
            return
        heappush(heap, entry)
        if len(heap) > 2 * self.free + _SLACK:
            self._tidy()

    def withdraw(self, place: Place) -> None:
        """The replica is not free here any more. Idempotent."""
        if place.entry is not None:
            place.entry = None
            self.free -= 1

    def least(self, need: Need) -> Entry | None:
        """The entry of the free replica with the least work per slot; None when none is free or none may be used."""
        if not self.free or not self.suits(need):
            return None
        heap = self._heap
        first = heap[0]
        while first[3].entry is not first:
            heappop(heap)
            first = heap[0]
        return first

    def _tidy(self) -> None:
        self._heap = [entry for entry in self._heap if entry[3].entry is entry]
        heapify(self._heap)
