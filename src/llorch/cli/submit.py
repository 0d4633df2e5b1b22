"""The command submit: one task from the text to the end of its answer."""

import asyncio
import sys
from contextlib import aclosing
from typing import Any

import click

from llorch.cli.connection import Connection, connects
from llorch.cli.exits import Complaint, Exit, task_complaint
from llorch.cli.show import Show, ShowAnswer, ShowLines
from llorch.client import Accepted, AsyncClient, Determinism, ErrorEvent, Event, OnDeadline, Priority, SessionBudgets


@click.command()
@click.argument("text")
@click.option("--model", help="The model; needed only where the server has several.")
@click.option("--system", help="A system message before the text.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens to generate.")
@click.option("--priority", type=click.Choice([level.value for level in Priority]), help="Priority of the task.")
@click.option("--seed", type=click.IntRange(0, 4294967294), help="Seed of the sampler.")
@click.option("--strict", is_flag=True, help="Run only where equal inputs give equal tokens.")
@click.option("--temperature", type=click.FloatRange(0, 5), help="0 always takes the likeliest token.")
@click.option("--expected-tokens", type=click.IntRange(min=1), help="Tokens that you expect; charged to your share.")
@click.option("--deadline-ms", type=click.IntRange(min=1), help="Milliseconds until the task must have ended.")
@click.option(
    "--on-deadline", type=click.Choice([way.value for way in OnDeadline]), help="What a running task does then."
)
@click.option("--session", metavar="UUID", help="The session that the task belongs to.")
@click.option("--budget-tokens", type=click.IntRange(min=1), help="Tokens, in and out, that a new session may use.")
@click.option("--budget-time-ms", type=click.IntRange(min=1), help="Milliseconds that its tasks may run.")
@click.option("--budget-cost", type=click.FloatRange(min=0), help="Cost that they may cause.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for every event.")
@connects
def submit(
    connection: Connection,
    text: str,
    *,
    model: str | None,
    system: str | None,
    raw: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Submit TEXT (- reads it from stdin) and print the answer as it comes. Ctrl-C cancels the task."""
    if raw and system is not None:
        raise click.UsageError("--raw takes no --system: a raw prompt has no messages")
    content = sys.stdin.read() if text == "-" else text
    if not content:
        raise click.UsageError("there is no text")
    fields = {**_prompt(content, system, is_raw=raw), **_parameters(**options)}
    show: Show = ShowLines() if as_json else ShowAnswer()
    try:
        outcome = asyncio.run(_follow(connection, model, fields, show))
    finally:
        show.close()
    if isinstance(outcome, ErrorEvent):
        raise task_complaint(outcome.frame)


def _prompt(text: str, system: str | None, *, is_raw: bool) -> dict[str, Any]:
    if is_raw:
        return {"prompt": text}
    messages = [("system", system), ("user", text)]
    return {"messages": [{"role": role, "content": content} for role, content in messages if content is not None]}


def _parameters(*, strict: bool, temperature: float | None, session: str | None, **others: Any) -> dict[str, Any]:
    """The fields of a TaskRequest that were given."""
    budgets = {kind: others.pop(f"budget_{kind}") for kind in SessionBudgets.model_fields}
    fields = {name: value for name, value in {**others, "session_id": session}.items() if value is not None}
    if any(value is not None for value in budgets.values()):
        fields["session_budgets"] = {kind: value for kind, value in budgets.items() if value is not None}
    if strict:
        fields["determinism"] = Determinism.strict
    if temperature is not None:
        fields["sampling"] = {"temperature": temperature}
    return fields


async def _follow(connection: Connection, model: str | None, fields: dict[str, Any], show: Show) -> Event | None:
    """Run one task to its end; its last event."""
    last: Event | None = None
    async with connection.client(show.wait) as client:
        model_ref = model or await _only_model(client)
        async with aclosing(client.generate(model_ref=model_ref, **fields)) as events:
            async for event in events:
                show.event(event)
                last = None if isinstance(event, Accepted) else event
    return last


async def _only_model(client: AsyncClient) -> str:
    models = sorted({route.model for route in (await client.get_capabilities()).routes})
    if len(models) != 1:
        found = f"it has {', '.join(models)}" if models else "it has none"
        hint = f"Name one with --model: {found}."
        raise Complaint.line("INVALID_PARAMS", "the server has not exactly one model", hint, Exit.USAGE)
    return models[0]
