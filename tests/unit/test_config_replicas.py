"""ORCH-3250: how replicas are run is checked as a whole, and what is wrong is said with line, setting and remedy."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llorch import config
from llorch.config_replicas import ReplicaRules
from llorch.config_source import Document
from llorch.errors import ConfigError

HEAD = """\
pools:
  - id: a
    engine: llamacpp
    model: m
    model_path: /m.gguf
    replicas:
"""
LAUNCHERS = "llamacpp, llama-server, vllm, tgi, triton, command"
PLACEHOLDERS = "host, port, model, alias, slots, ctx, ctx_total, api_key, tensor_split"
SECRET = "canary-6b1f"
NODE = "sha256: " + "ab" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "llorch.yaml"


def settings(file: Path, text: str, **load: Any) -> config.Settings:
    file.write_text(text, encoding="utf-8")
    return config.load(file, {}, **load)


def problems(file: Path, text: str, **load: Any) -> list[str]:
    """The lines of the ConfigError, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        settings(file, text, **load)
    return caught.value.message.replace(f"{file}:", "").split("\n")


def replicas(*entries: str, pool: str = "", more: str = "") -> str:
    """A file of one pool; its first replica is in line 7."""
    head = HEAD.replace("    replicas:\n", f"    {pool}\n    replicas:\n") if pool else HEAD
    return head + "".join(f"      - {entry}\n" for entry in entries) + more


# One replica


@pytest.mark.parametrize(
    ("replica", "expected"),
    [
        ("{slots: 1}", ": needs url, where an engine listens already, or managed, for one that llorch starts"),
        (
            "{url: 'http://h:1', managed: {}}",
            ".managed: beside url: an engine either runs already or is started by llorch; remove one of the two",
        ),
        (
            "{url: 'http://h:1', devices: [0]}",
            ".devices: only with managed: the engine at a url has its GPUs already; remove it",
        ),
        (
            "{url: 'http://h:1', tensor_split: [1, 2]}",
            ".tensor_split: only with managed: the engine at a url has its GPUs already; remove it",
        ),
        (
            f"{{managed: {{}}, api_key: {SECRET}}}",
            ".api_key: only with url: an engine that llorch starts is given a new key at each start; remove it",
        ),
        (
            "{managed: {launcher: llama-server}, tensor_split: [1, 2]}",
            ".tensor_split: needs devices, the GPUs that the shares are of; add them, or remove it",
        ),
        (
            "{managed: {launcher: llama-server}, devices: [0, 1, 2], tensor_split: [1, 2]}",
            ".tensor_split: expected as many shares as devices has GPUs",
        ),
        (
            "{managed: {}, devices: [0, 1], tensor_split: [1, 2]}",
            ".tensor_split: this launcher cannot divide a model by ratios; use the launcher llama-server, or remove it",
        ),
        (
            "{managed: {launcher: vllm}}",
            ".managed.launcher: does not start the engine of its pool; use one of llamacpp, llama-server, command",
        ),
        (
            "{managed: {launcher: lama-server}}",
            f'.managed.launcher: expected one of {LAUNCHERS}; did you mean "llama-server"?',
        ),
        ("{managed: {launcher: command}}", ".managed.command: is missing; the launcher `command` runs nothing else"),
        (
            "{managed: {command: [x]}}",
            ".managed.command: only with the launcher `command`; set that one, or add arguments by args",
        ),
        (
            "{managed: {launcher: command, command: [x], binary: /bin/x}}",
            ".managed.binary: not with the launcher `command`, which runs the first word of its command; remove it",
        ),
        (
            "{managed: {launcher: command, command: [x, '--at={host}:{prot}']}}",
            '.managed.command[1]: no such placeholder; did you mean "port"?',
        ),
        (
            "{managed: {launcher: command, command: ['{zebra}']}}",
            f".managed.command[0]: no such placeholder; there are {PLACEHOLDERS}",
        ),
        (
            f"{{managed: {{env: {{'A=B': {SECRET}}}}}}}",
            ".managed.env.A=B: expected the name of an environment variable, which has no `=` and no NUL",
        ),
        (
            f"{{managed: {{env: {{LLORCH_MANAGER: {SECRET}}}}}}}",
            ".managed.env.LLORCH_MANAGER: names that begin with LLORCH_ are for llorch itself; remove it",
        ),
        (
            "{managed: {env: {CUDA_VISIBLE_DEVICES: '0'}}, devices: [1]}",
            ".managed.env.CUDA_VISIBLE_DEVICES: devices says which GPUs the process sees; remove one of the two",
        ),
        (
            '{managed: {args: [a, "b\\0c"]}}',
            ".managed.args[1]: has a NUL character, which no path, argument or variable can have; remove it",
        ),
        (
            '{managed: {health_path: "/\\0"}}',
            ".managed.health_path: has a NUL character, which no path, argument or variable can have; remove it",
        ),
        (
            '{managed: {env: {A: "\\0"}}}',
            ".managed.env.A: has a NUL character, which no path, argument or variable can have; remove it",
        ),
    ],
)
def test_faulty_replica_is_refused_with_line_and_remedy(file: Path, replica: str, expected: str) -> None:
    assert problems(file, replicas(replica)) == [f"7: pools[0].replicas[0]{expected}"]


@pytest.mark.parametrize(
    "replica",
    [
        "{managed: {}}",
        "{managed: {launcher: llama-server}, devices: [3, 1], tensor_split: [1, 2]}",
        "{managed: {launcher: command, command: [x, '{\"a\": 1}', '{ctx_total}{api_key}', '{}'], args: [y]}}",
        "{managed: {env: {CUDA_VISIBLE_DEVICES: MIG-1}}}",
    ],
)
def test_replica_of_each_kind_is_accepted(file: Path, replica: str) -> None:
    assert settings(file, replicas(replica)).pools[0].replicas[0].managed is not None


def test_replicas_without_a_url_are_not_the_same(file: Path) -> None:
    assert (
        len(settings(file, replicas("{managed: {}}", "{managed: {}}", pool="allow_cpu: true")).pools[0].replicas) == 2
    )


# One pool


@pytest.mark.parametrize("engine", ["vllm", "tgi", "triton"])
def test_engine_without_an_adapter_is_refused_once(file: Path, engine: str) -> None:
    text = replicas("{managed: {}}").replace("engine: llamacpp", f"engine: {engine}")
    assert problems(file, text) == [
        "3: pools[0].engine: llorch has a launcher for this engine, but no adapter that talks to it yet; use llamacpp"
    ]


@pytest.mark.parametrize(
    "managed", ["{}", "{launcher: llama-server}", "{launcher: command, command: [x, '--model={model}']}"]
)
def test_what_loads_a_model_needs_its_path(file: Path, managed: str) -> None:
    text = replicas(f"{{managed: {managed}}}").replace("    model_path: /m.gguf\n", "")
    expected = "pools[0].model_path: is missing; what llorch starts loads the model from there"
    assert problems(file, text) == [f"2: {expected}"]


def test_path_that_no_system_has_is_refused_and_not_looked_at(file: Path) -> None:
    text = replicas("{managed: {}}").replace("/m.gguf", '"/m\\0"')
    expected = "5: pools[0].model_path: has a NUL character, which no path, argument or variable can have; remove it"
    assert problems(file, text, inspect_model=lambda path: path.stat().st_size) == [expected]


def test_command_that_names_no_model_and_running_engines_need_no_path(file: Path) -> None:
    text = replicas("{managed: {launcher: command, command: [x]}, devices: [0]}", "{url: 'http://h:1'}")
    assert settings(file, text.replace("    model_path: /m.gguf\n", "")).pools[0].model_path is None


def test_first_wait_is_no_longer_than_the_longest(file: Path) -> None:
    text = replicas("{managed: {}}", pool="supervision: {backoff_max_s: 0.5}")
    assert problems(file, text) == [
        "6: pools[0].supervision.backoff_first_s: is more than backoff_max_s; lower it, or raise the other"
    ]


@pytest.mark.parametrize("how", ["url: 'http://h:1'", "managed: {}"])
def test_context_that_no_engine_can_count_is_refused(file: Path, how: str) -> None:
    text = replicas(f"{{{how}, slots: 128}}", pool="ctx: 16777216")
    why = f"ctx times slots is more than {2**31 - 1} tokens, which no engine can count; lower one of them"
    assert problems(file, text) == [f"8: pools[0].replicas[0].slots: {why}"]
    assert settings(file, text.replace("slots: 128", "slots: 127")).pools[0].replicas[0].slots == 127


def test_context_beyond_what_the_model_was_trained_for_is_refused(file: Path) -> None:
    asked: list[Path] = []

    def inspect(path: Path) -> int:
        asked.append(path)
        return 4096

    text = replicas("{managed: {}}", "{managed: {}}", pool="ctx: 4097").replace(
        "model: m", "model: m\n    allow_cpu: true"
    )
    assert problems(file, text, inspect_model=inspect) == [
        "7: pools[0].ctx: more than the 4096 tokens that the model was trained for; lower it"
    ]
    assert asked == [Path("/m.gguf")]
    assert settings(file, text.replace("4097", "4096"), inspect_model=inspect).pools[0].ctx == 4096


@pytest.mark.parametrize("told", [None, 0])
def test_model_that_tells_no_context_bounds_none(file: Path, told: int | None) -> None:
    assert settings(file, replicas("{managed: {}}"), inspect_model=lambda _: told).pools


@pytest.mark.parametrize("replica", ["{url: 'http://h:1'}", "{managed: {node: n}}"])
def test_model_of_another_host_is_not_looked_at(file: Path, replica: str) -> None:
    def inspect(path: Path) -> int:
        pytest.fail(f"looked at {path}")

    assert settings(file, replicas(replica, more=f"nodes: [{{id: n, {NODE}}}]\n"), inspect_model=inspect).pools


# What replicas of one host share


REMEDY = "give each GPU to one replica, or set managed.shares_devices in both"


def takes_all(line: int, index: int, other: int, other_line: int) -> str:
    place = f"pools[0].replicas[{other}] ({other_line})"
    why = f"without devices it takes every GPU of its host, also those of {place}"
    return f"{line}: pools[0].replicas[{index}]: {why}; {REMEDY}"


def test_masks_of_one_host_do_not_overlap(file: Path) -> None:
    """ORCH-3011."""
    text = replicas(
        "{managed: {}, devices: [0, 1]}", "{managed: {}, devices: [2]}", "{managed: {}, devices: [3, 1, 2]}"
    )
    text += "  - {id: b, engine: llamacpp, model: n, model_path: /n, replicas: [{managed: {}, devices: [2]}]}\n"
    assert problems(file, text) == [
        f"9: pools[0].replicas[2].devices: has a GPU that is also in pools[0].replicas[0].devices (7); {REMEDY}",
        f"10: pools[1].replicas[0].devices: has a GPU that is also in pools[0].replicas[1].devices (8); {REMEDY}",
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", ", devices: [0]", (7, 0, 1, 8)),
        (", devices: [0]", "", (8, 1, 0, 7)),
        ("", "", (8, 1, 0, 7)),
    ],
)
def test_replica_without_a_mask_takes_every_gpu(file: Path, first: str, second: str, expected: tuple[int, ...]) -> None:
    text = replicas(f"{{managed: {{}}{first}}}", f"{{managed: {{}}{second}}}")
    assert problems(file, text) == [takes_all(*expected)]


@pytest.mark.parametrize(
    "others",
    [
        ["{managed: {node: n}, devices: [0]}"],
        ["{url: 'http://h:1'}"],
        ["{managed: {}, devices: [1]}"],
    ],
)
def test_other_hosts_other_gpus_and_engines_of_others_do_not_overlap(file: Path, others: list[str]) -> None:
    text = replicas("{managed: {}, devices: [0]}", *others, more=f"nodes: [{{id: n, {NODE}}}]\n")
    assert settings(file, text).pools


def test_only_where_both_say_so_gpus_are_shared(file: Path) -> None:
    shared = ["{managed: {shares_devices: true}, devices: [0]}", "{managed: {shares_devices: true}}"]
    assert settings(file, replicas(*shared)).pools
    assert problems(file, replicas(shared[0], "{managed: {}}")) == [takes_all(8, 1, 0, 7)]


def test_replica_on_the_cpu_takes_no_gpu(file: Path) -> None:
    """ORCH-3018. With a mask it does, whatever the pool allows."""
    text = replicas("{managed: {}}", "{managed: {}, devices: [0]}", pool="allow_cpu: true")
    assert settings(file, text).pools
    found = problems(file, text.replace("{managed: {}}", "{managed: {}, devices: [0]}"))
    assert [line.split(": ")[1] for line in found] == ["pools[0].replicas[1].devices"]


@given(st.lists(st.tuples(st.sets(st.integers(0, 5), max_size=3), st.booleans()), min_size=1, max_size=5))
def test_a_host_is_accepted_exactly_when_no_gpu_has_two_owners(members: list[tuple[set[int], bool]]) -> None:
    pool = config.Pool.model_validate(
        {
            "id": "a", "engine": "llamacpp", "model": "m", "model_path": "/m",
            "replicas": [
                {"managed": {"shares_devices": shares}} | ({"devices": sorted(mask)} if mask else {})
                for mask, shares in members
            ],
        }
    )  # fmt: skip
    document = Document("x")
    ReplicaRules(document, [(("pools", 0), pool)], []).check(None)
    owners = [({*mask} or {*range(6)}, shares) for mask, shares in members]
    pairs = [(one, other) for number, one in enumerate(owners) for other in owners[:number]]
    assert bool(document.problems) == any(
        not a.isdisjoint(b) and not (a_shares and b_shares) for (a, a_shares), (b, b_shares) in pairs
    )


def test_port_of_a_host_is_given_once(file: Path) -> None:
    entries = ["{managed: {port: 9000}}", "{managed: {port: 9000}}", "{managed: {port: 9000, node: n}}"]
    entries += ["{managed: {}}", "{managed: {port: 0}}"]
    text = replicas(*entries, pool="allow_cpu: true", more=f"nodes: [{{id: n, {NODE}}}]\n")
    assert problems(file, text) == [
        "9: pools[0].replicas[1].managed.port: the same as pools[0].replicas[0].managed.port (8); each needs its own"
    ]


# Nodes


def on_node(node: str, nodes: str) -> str:
    return replicas(f"{{managed: {{node: {node}}}}}", more=f"nodes: {nodes}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            on_node("gpu-2", f"[{{id: gpu-1, {NODE}}}]"),
            '7: pools[0].replicas[0].managed.node: no such node; did you mean "gpu-1"?',
        ),
        (
            on_node("n", "[]"),
            "7: pools[0].replicas[0].managed.node: no such node; add it to nodes (`llorch nodes new`)",
        ),
        (
            on_node("n", f"[{{id: n, {NODE}, pools: [b]}}]"),
            "8: nodes[0].pools[0]: no such pool; name a pool of this file, or remove it",
        ),
        (
            f"nodes:\n  - id: n\n    {NODE}\n    networks: [10.0.0.0/8, 10.0.0.1/8]\n",
            "4: nodes[0].networks[1]: expected an address range, as 10.0.0.0/8, with no bit set behind the prefix",
        ),
        (
            f"nodes:\n  - id: n\n    {NODE}\n    ca: {SECRET}\n",
            "4: nodes[0].ca: there is no such file, or it has no certificates in PEM",
        ),
        (
            f"nodes:\n  - id: n\n    {NODE}\n    networks: [{SECRET}]\n",
            "4: nodes[0].networks[0]: expected an address range, as 10.0.0.0/8, with no bit set behind the prefix",
        ),
        (
            f"nodes:\n  - {{id: n, {NODE}}}\n  - {{id: n, sha256: {'cd' * 32}}}\n",
            "3: nodes[1].id: the same as nodes[0].id (2); each needs its own",
        ),
        (
            f"nodes:\n  - {{id: n, {NODE}}}\n  - {{id: o, {NODE}}}\n",
            "3: nodes[1].sha256: the same as nodes[0].sha256 (2); each needs its own",
        ),
        (
            f"nodes:\n  - {{id: n, {NODE}}}\nkeys:\n  - {{id: n, tenant: t, {NODE}}}\n",
            "2: nodes[0].sha256: the same as keys[0].sha256 (4); each needs its own",
        ),
    ],
)  # fmt: skip
def test_faulty_node_is_refused_with_line_and_remedy(file: Path, text: str, expected: str) -> None:
    assert expected in problems(file, text)


def test_pool_of_a_node_that_is_misspelt_is_told_with_the_nearest(file: Path) -> None:
    text = replicas("{url: 'http://h:1'}", more=f"nodes: [{{id: n, {NODE}, pools: [samll]}}]\n")
    assert problems(file, text.replace("id: a", "id: small")) == [
        '8: nodes[0].pools[0]: no such pool; did you mean "small"?'
    ]


def test_node_runs_only_pools_that_its_list_has(file: Path) -> None:
    """ORCH-3304."""
    text = replicas("{managed: {node: n}}") + (
        "  - {id: b, engine: llamacpp, model: o, replicas: [{url: 'http://h:1'}]}\n"
        f"nodes:\n  - id: n\n    {NODE}\n    pools: [b]\n"
    )
    remedy = "add the pool to nodes[0].pools (12), or remove that list"
    assert problems(file, text) == [f"7: pools[0].replicas[0].managed.node: the node may not run this pool; {remedy}"]
    assert settings(file, text.replace("pools: [b]", "pools: [b, a]")).nodes[0].pools == ["b", "a"]


def test_nodes_may_join_without_any_key(file: Path) -> None:
    assert settings(file, on_node("n", f"[{{id: n, {NODE}}}]")).keys == []


def test_a_part_of_wrong_form_does_not_make_its_name_unknown(file: Path) -> None:
    found = problems(file, on_node("n", "[{id: n, sha256: short, pools: [a]}]"))
    assert [line.split(": ")[1] for line in found] == ["nodes[0].sha256"]
    found = problems(file, replicas("{managed: 5}", more=f"nodes: [{{id: n, {NODE}, pools: [a]}}]\n"))
    assert [line.split(": ")[1] for line in found] == ["pools[0].replicas[0].managed"]


def test_no_value_of_a_replica_is_ever_printed(file: Path) -> None:
    managed: dict[str, Any] = {"launcher": "vllm", "command": [f"{{x}}{SECRET}"], "args": [f"\0{SECRET}"]}
    managed |= {"env": {"A=": SECRET}, "node": SECRET}
    found = problems(file, replicas(json.dumps({"managed": managed, "api_key": SECRET})))
    assert len(found) == 6
    assert SECRET not in "\n".join(found)


def test_what_is_the_pools_own_may_differ_within_a_route(file: Path) -> None:
    text = replicas("{managed: {}, devices: [0]}") + (
        "  - {id: b, engine: llamacpp, model: m, replicas: [{url: 'http://h:1'}], drain_s: 1, self_test: true,"
        " headroom: {vram_mib: 1}, supervision: {stop_s: 1}}\n"
    )
    assert len(settings(file, text).pools) == 2
