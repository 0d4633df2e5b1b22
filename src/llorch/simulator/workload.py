"""What arrives when: tasks with their true lengths, as columns, and the JSON Lines file that holds them.

A column is a typed array, so that a million tasks take some 60 MB. It knows no policy and no replica.
"""

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from llorch.domain.task import Priority
from llorch.errors import ConfigError

LEVELS: tuple[Priority, ...] = tuple(Priority)
NO_SESSION = -1

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Output = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class WorkloadError(ConfigError):
    """A workload file cannot be used; `line` counts from 1, `field` is None where no single one is to blame."""

    def __init__(self, file: str, line: int, what: str, *, field_name: str | None = None) -> None:
        self.line = line
        self.field = field_name
        place = f"{file}:{line}: {field_name}" if field_name else f"{file}:{line}"
        super().__init__(f"{place}: {what}")


class Misfit(ValueError):
    """A task does not fit into a workload, because of this field."""

    def __init__(self, field_name: str, what: str) -> None:
        self.field = field_name
        super().__init__(what)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task of a workload, as a line of its file.

    `arrival_s` counts from the begin, `deadline_s` from the arrival. `output_tokens` is what the model will generate;
    a scheduler is told `expected_tokens` (`max_tokens` when absent). A task without a session has one of its own.
    """

    arrival_s: Annotated[float, msgspec.Meta(ge=0)]
    tenant: _Name
    prompt_tokens: _Tokens
    output_tokens: _Output
    max_tokens: _Output
    priority: Priority = Priority.INTERACTIVE
    expected_tokens: _Output | None = None
    session: _Name | None = None
    deadline_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


@dataclass(slots=True)
class Workload:
    """Tasks in the order of their arrival; a task is an index into every column. A deadline of NaN is none."""

    tenants: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    arrival_s: "array[float]" = field(default_factory=lambda: array("d"))
    tenant: "array[int]" = field(default_factory=lambda: array("i"))
    level: "array[int]" = field(default_factory=lambda: array("b"))
    session: "array[int]" = field(default_factory=lambda: array("i"))
    prompt_tokens: "array[int]" = field(default_factory=lambda: array("i"))
    output_tokens: "array[int]" = field(default_factory=lambda: array("i"))
    expected_tokens: "array[int]" = field(default_factory=lambda: array("i"))
    max_tokens: "array[int]" = field(default_factory=lambda: array("i"))
    deadline_s: "array[float]" = field(default_factory=lambda: array("d"))
    _tenant_ids: dict[str, int] = field(default_factory=dict)
    _session_ids: dict[tuple[int, str], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def add(self, entry: Entry) -> None:
        """Append a task. Raises Misfit for what no schema can say."""
        if self.arrival_s and entry.arrival_s < self.arrival_s[-1]:
            raise Misfit("arrival_s", f"{entry.arrival_s:g} is before the task above it")
        expected = entry.max_tokens if entry.expected_tokens is None else entry.expected_tokens
        for name, value in (("output_tokens", entry.output_tokens), ("expected_tokens", expected)):
            if value > entry.max_tokens:
                raise Misfit(name, f"{value} is more than max_tokens, {entry.max_tokens}")
        tenant = self.tenant_id(entry.tenant)
        self.arrival_s.append(entry.arrival_s)
        self.tenant.append(tenant)
        self.level.append(LEVELS.index(entry.priority))
        self.session.append(NO_SESSION if entry.session is None else self._session_id(tenant, entry.session))
        self.prompt_tokens.append(entry.prompt_tokens)
        self.output_tokens.append(entry.output_tokens)
        self.expected_tokens.append(expected)
        self.max_tokens.append(entry.max_tokens)
        self.deadline_s.append(math.nan if entry.deadline_s is None else entry.deadline_s)

    def tenant_id(self, name: str) -> int:
        """The index of the tenant, which is added when it is new."""
        tenant = self._tenant_ids.get(name)
        if tenant is None:
            tenant = self._tenant_ids[name] = len(self.tenants)
            self.tenants.append(name)
        return tenant

    def _session_id(self, tenant: int, name: str) -> int:
        session = self._session_ids.get((tenant, name))
        if session is None:
            session = self._session_ids[tenant, name] = len(self.sessions)
            self.sessions.append(name)
        return session

    def session_name(self, index: int) -> str:
        """The session of a task; one of its own has a name that no other can have."""
        session = self.session[index]
        return f" {index}" if session == NO_SESSION else self.sessions[session]

    def entries(self) -> Iterator[Entry]:
        """Every task as a value, in order."""
        for index in range(len(self)):
            deadline, session = self.deadline_s[index], self.session[index]
            yield Entry(
                arrival_s=self.arrival_s[index],
                tenant=self.tenants[self.tenant[index]],
                prompt_tokens=self.prompt_tokens[index],
                output_tokens=self.output_tokens[index],
                max_tokens=self.max_tokens[index],
                priority=LEVELS[self.level[index]],
                expected_tokens=self.expected_tokens[index],
                session=None if session == NO_SESSION else self.sessions[session],
                deadline_s=None if math.isnan(deadline) else deadline,
            )


def write_workload(workload: Workload, file: Path) -> None:
    """Write one JSON object a line."""
    encode = msgspec.json.Encoder().encode
    with file.open("wb") as out:
        for entry in workload.entries():
            out.write(encode(entry))
            out.write(b"\n")


def read_workload(file: Path) -> Workload:
    """Read what `write_workload` writes. Raises WorkloadError naming line and field."""
    try:
        with file.open("rb") as lines:
            return parse_workload(lines, str(file))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error


def parse_workload(lines: Iterable[bytes], name: str) -> Workload:
    """A workload from lines of JSON; empty ones are skipped. `name` stands for the file in a WorkloadError."""
    workload = Workload()
    decode = msgspec.json.Decoder(Entry).decode
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            workload.add(decode(line))
        except msgspec.ValidationError as error:
            what, field_name = _place(str(error))
            raise WorkloadError(name, number, what, field_name=field_name) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WorkloadError(name, number, f"not JSON: {error}") from error
        except Misfit as error:
            raise WorkloadError(name, number, str(error), field_name=error.field) from error
    return workload


def _place(message: str) -> tuple[str, str | None]:
    """What msgspec complains of, and the field; it names one as `$.field` at the end, or back-quoted in the text."""
    what, _, path = message.partition(" - at `$")
    if path.startswith("."):
        return what, path[1:].rstrip("`")
    quoted = what.split("`")
    return what, quoted[1] if what.startswith("Object ") and len(quoted) == 3 else None
