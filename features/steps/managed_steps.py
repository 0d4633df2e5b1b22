"""Steps about engines that llorch starts itself: their death, drain, reload, configuration, and a node."""

import httpx
from behave import then, when
from behave.runner import Context

from tests.support.identities import ADMIN
from tests.support.managed import Operator, kill
from tests.support.nodes import ManagerProcess
from tests.support.process_table import assert_none_left, engine_processes
from tests.support.processes import wait_for


def _operator(context: Context) -> Operator:
    """The admin, for one step."""
    operator = Operator(context.world.deployment.service)
    context.add_cleanup(operator.close)
    return operator


@when("the engine of {replica_id:S} is killed")
def step_kill(context: Context, replica_id: str) -> None:
    kill(_operator(context).engine(replica_id))


@then("the health of {replica_id:S} tells that its engine was ended by a signal")
def step_ended(context: Context, replica_id: str) -> None:
    found = _operator(context).replica(replica_id)
    assert found["process"]["cause"] == "signal", found
    assert "killed by SIGKILL" in found["last_error"]["message"], found


@when("the admin {kind:w}s {pool:w}")
def step_change(context: Context, kind: str, pool: str) -> None:
    begun = _operator(context).post(f"/v1/pools/{pool}/{kind}", {})
    assert (begun["kind"], begun["state"]) == (kind, "running"), begun


@then("the {kind:w} of {pool:w} is done with {moved:d} moved")
def step_changed(context: Context, kind: str, pool: str, moved: int) -> None:
    change = _operator(context).wait_change(pool)
    assert (change["kind"], change["state"], change["moved"]) == (kind, "done", moved), change
    assert change["replicas_done"] == change["replicas_total"], change


@then("the replicas of {pool:w} are {one:S} and {two:S}")
def step_replicas(context: Context, pool: str, one: str, two: str) -> None:
    assert sorted(_operator(context).replicas(pool)) == [one, two]


@when('the file says "{line}" in the end and the admin reloads the configuration')
def step_rewrite(context: Context, line: str) -> None:
    world = context.world
    file = world.deployment.service.log.with_suffix(".yaml")
    if not hasattr(world, "original"):
        world.original = file.read_text(encoding="utf-8")
        context.add_cleanup(file.write_text, world.original, encoding="utf-8")
        world.engines = {each.pid for each in engine_processes(world.deployment.service.pid)}
    kept = [row for row in world.original.splitlines() if not row.startswith("node_lease_s")]
    file.write_text("\n".join([*kept, line]) + "\n", encoding="utf-8")
    with httpx.Client(base_url=world.deployment.service.url, headers=ADMIN.headers, timeout=20) as http:
        world.reload = http.post("/v1/config/reload")


@then('the reload is refused with {status:d} {code:w} and names "{name:w}"')
def step_refused(context: Context, status: int, code: str, name: str) -> None:
    answer = context.world.reload
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert name in answer.json()["message"], answer.text


@then('the configuration in force has changed in "{path}"')
def step_in_force(context: Context, path: str) -> None:
    status = _operator(context).wait_config()
    assert status["change"]["state"] == "done", status
    assert any(each.startswith(path) for each in status["change"]["changed"]), status


@then("no engine was replaced by that")
def step_same_engines(context: Context) -> None:
    now = {each.pid for each in engine_processes(context.world.deployment.service.pid)}
    assert now == context.world.engines, (now, context.world.engines)


@when("the admin reverts the configuration")
def step_revert(context: Context) -> None:
    _operator(context).post("/v1/config/revert")


@when("the pool manager of {node:w} joins")
def step_join(context: Context, node: str) -> None:
    world = context.world
    log = world.deployment.service.log.with_name(f"{node}.log")
    world.manager = ManagerProcess(log, world.deployment.service.url, node)
    context.add_cleanup(world.manager.end)


@then("the node {node:w} is {state:w}")
def step_node(context: Context, node: str, state: str) -> None:
    operator = _operator(context)

    def look() -> bool:
        return {each["node_id"]: each["state"] for each in operator.get("/v1/nodes")["nodes"]}[node] == state

    wait_for(look, f"{node} is {state}", 20)


@when("the pool manager of {node:w} gets SIGTERM")
def step_end_manager(context: Context, node: str) -> None:
    assert context.world.manager.end() == 0


@then("nothing of the pool manager is left")
def step_nothing_left(context: Context) -> None:
    assert_none_left(context.world.manager.pid, within_s=5)
