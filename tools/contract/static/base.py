"""What the generated classes share."""

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


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
