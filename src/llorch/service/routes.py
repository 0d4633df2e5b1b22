"""Which route serves a request: the configured {engine, model, quant, ctx, sampler profile} behind a model_ref."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from llorch.errors import InvalidParams, NotFound
from llorch.service.ports import Sampling


@dataclass(frozen=True, slots=True)
class Route:
    """What a model_ref resolves to. `ctx` in tokens; `sampling` are the sampler profile's parameters."""

    route_id: str
    engine: str
    model: str
    quant: str
    ctx: int
    sampler_profile_version: str
    allow_cpu: bool = False
    can_be_strict: bool = True
    features: frozenset[str] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    workloads: frozenset[str] = frozenset({"completion"})


class Routes:
    """The routes of the configuration, by model and engine."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._by_id = {route.route_id: route for route in routes}

    def __iter__(self) -> Iterator[Route]:
        return iter(self._by_id.values())

    def get(self, route_id: str) -> Route:
        """The route with this id; raises KeyError."""
        return self._by_id[route_id]

    def resolve(self, model_ref: str, engine: str | None, workload: str) -> Route:
        """The one route that serves this.

        Raises NotFound when none does, InvalidParams (naming the engines) when several do and `engine` is missing.
        """
        fits = [r for r in self if r.model == model_ref and engine in (None, r.engine) and workload in r.workloads]
        if not fits:
            wanted = f"{workload} with model {model_ref!r}" + (f" on engine {engine!r}" if engine else "")
            raise NotFound(f"nothing here serves {wanted}")
        if len(fits) > 1:
            engines = sorted(route.engine for route in fits)
            raise InvalidParams(
                f"several engines serve {model_ref!r}: name one of {', '.join(engines)}", details={"engines": engines}
            )
        return fits[0]
