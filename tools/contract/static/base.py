"""What the generated classes share."""

import math
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def _is_json(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_json, value.values()))
    return all(map(_is_json, value)) if isinstance(value, list) else True


def _only_json(value: dict[str, Any]) -> dict[str, Any]:
    if not _is_json(value):
        raise PydanticCustomError("finite_number", "Numbers must be finite")
    return value


# The parser lets NaN and Infinity through where any value is welcome; JSON has neither.
FreeObject = Annotated[dict[str, Any], AfterValidator(_only_json)]


class Model(BaseModel):
    """A body of the wire. Loose types and non-numbers are refused, as the schema refuses them."""

    model_config = ConfigDict(allow_inf_nan=False)


class Constrained(Model):
    """A body with a rule over its fields; null counts as carried where it is allowed.

    Exactly one of `exactly_one` is carried (when it names any), and at least `min_properties` fields are.
    """

    exactly_one: ClassVar[tuple[str, ...]] = ()
    min_properties: ClassVar[int] = 0

    @model_validator(mode="after")
    def _keeps_rules(self) -> Self:
        carried = self.model_fields_set
        if self.exactly_one and len(carried.intersection(self.exactly_one)) != 1:
            names = ", ".join(self.exactly_one)
            raise PydanticCustomError("exactly_one", "Exactly one of {names} is required", {"names": names})
        if len(carried) < self.min_properties:
            least = {"min_properties": self.min_properties}
            raise PydanticCustomError("min_properties", "At least {min_properties} field(s) are required", least)
        return self


class Settings(BaseModel):
    """A part of the configuration: immutable once read, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
