"""ORCH-3030: configuration is strictly validated, and what is wrong is said with line, setting and remedy."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llorch import config
from llorch.config_source import setting_names
from llorch.errors import ConfigError
from llorch_contract.specs import load_config_schema

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "llorch.example.yaml"

POOL = """
pools:
  - id: a
    engine: llamacpp
    model: m
    replicas:
      - url: http://127.0.0.1:8081
"""
SECRET = "canary-6b1f"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "llorch.yaml"


def problems(file: Path, text: str, **environ: str) -> list[str]:
    """The lines of the ConfigError, without the folder of the file."""
    file.write_text(text.lstrip("\n"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load(file, environ)
    assert caught.value.details == {"problems": caught.value.message.split("\n")}
    return caught.value.message.replace(f"{file.parent}/", "").split("\n")


def settings(file: Path, text: str, **environ: str) -> config.Settings:
    file.write_text(text.lstrip("\n"), encoding="utf-8")
    return config.load(file, environ)


# The file


def test_without_a_file_the_defaults_hold() -> None:
    loaded = config.load(None, {"HOME": "/root", "LLORCH_URL": "http://elsewhere"})
    assert (loaded.server.host, loaded.server.port, loaded.pools, loaded.keys) == ("127.0.0.1", 8080, [], [])


def test_an_empty_file_means_the_defaults(file: Path) -> None:
    assert settings(file, "# nothing yet\n") == config.load(None, {})


def test_settings_cannot_be_changed_once_loaded(file: Path) -> None:
    loaded = settings(file, POOL)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(loaded.server, "port", 1)  # noqa: B010 (mypy knows that it cannot be set)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        config.load(tmp_path / "nowhere.yaml", {})


def test_unknown_key_names_line_path_and_nearest_name(file: Path) -> None:
    text = POOL.replace("    model: m", "    model: m\n    engin: llamacpp")
    assert problems(file, text) == ['llorch.yaml:5: pools[0].engin: unknown key; did you mean "engine"?']


def test_unknown_key_without_a_near_name_lists_what_is_expected(file: Path) -> None:
    assert problems(file, "log: {zebra: 1}\n") == [
        "llorch.yaml:1: log.zebra: unknown key; expected one of format, level"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server:\n  port: x\n", "llorch.yaml:2: server.port: expected a whole number"),
        ("server:\n  port: 70000\n", "llorch.yaml:2: server.port: expected at most 65535"),
        ("server: 5\n", "llorch.yaml:1: server: expected settings, as `name: value` lines"),
        ("streams: {heartbeat_s: 0}\n", "llorch.yaml:1: streams.heartbeat_s: expected more than 0"),
        ("compat: yes\n", "llorch.yaml:1: compat: expected true or false"),
        ("log:\n\n  format: jso\n", 'llorch.yaml:3: log.format: expected one of json, console; did you mean "json"?'),
        ("server: {tls: {cert: /dev/null/x}}\n", "llorch.yaml:1: server.tls.key: is missing; it has no default"),
        ("sessions: {turns: 1.0}\n", "llorch.yaml:1: sessions.turns: Input should be a valid integer"),
        ("sampler_profiles: {v1: {top_k: -1}}\n", "llorch.yaml:1: sampler_profiles.v1.top_k: expected at least 0"),
        ("- a\n", "llorch.yaml:1: expected settings, as `name: value` lines"),
        ("compat: !!python/name:os.system x\n", "llorch.yaml:1: compat: tags such as `!name` are not supported"),
        ("a: [1\nb: 2\n", "llorch.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_what_was_expected(file: Path, text: str, expected: str) -> None:
    assert expected in problems(file, text)


def test_context_below_the_least_is_refused(file: Path) -> None:
    text = POOL.replace("model: m", "model: m\n    ctx: 8")
    assert problems(file, text) == ["llorch.yaml:5: pools[0].ctx: expected at least 16"]


def test_name_that_looks_like_a_number_is_asked_to_be_quoted(file: Path) -> None:
    expected = "llorch.yaml:2: pools[0].id: expected text; put it in quotes when it looks like a number"
    assert problems(file, POOL.replace("id: a", "id: 7")) == [expected]


@pytest.mark.parametrize("text", ["no", "010", "1:30", "2026-01-01"])
def test_text_that_older_yaml_reads_as_something_else_stays_text(file: Path, text: str) -> None:
    assert settings(file, POOL.replace("id: a", "id: a\n    engine_version: " + text)).pools[0].engine_version == text


def test_duplicate_key_is_refused_with_both_lines(file: Path) -> None:
    assert problems(file, "log:\n  level: info\n  level: debug\n") == [
        "llorch.yaml:3: log.level: given twice, first at llorch.yaml:2; remove one of them"
    ]


def test_all_problems_are_told_at_once_in_the_order_of_the_lines(file: Path) -> None:
    text = "log: {level: 5}\nserver:\n  prot: 1\n  host: 0.0.0.0\ncompat: 3\n"
    lines = [line.split(": ")[0] for line in problems(file, text, LLORCH_NOPE="1")]
    assert lines == ["LLORCH_NOPE", "llorch.yaml:1", "llorch.yaml:3", "llorch.yaml:4", "llorch.yaml:5"]


def test_yaml_bomb_is_refused_without_being_unfolded(file: Path) -> None:
    levels = ["l0: &l0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    levels += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "counting every use of an alias" in problems(file, "\n".join(levels))[0]


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: " + "[" * 5000])
def test_endless_or_deep_nesting_is_refused(file: Path, text: str) -> None:
    assert "nested deeper than 32 levels" in problems(file, text)[0]


def test_alias_of_a_part_is_read(file: Path) -> None:
    text = POOL.replace("    replicas:", "    queue: &queue {capacity: 3}\n    replicas:")
    text += "  - {id: b, engine: llamacpp, model: m, queue: *queue, replicas: [{url: 'http://127.0.0.1:8082'}]}\n"
    assert [pool.queue.capacity for pool in settings(file, text).pools] == [3, 3]


@pytest.mark.parametrize("content", [b"a: \xff\n", b"a: \x00\n", b"# " + b"x" * 1024 * 1024])
def test_a_file_that_is_no_configuration_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"not UTF-8|does not allow|larger than"):
        config.load(file, {})


# Compat


def test_compat_tells_unknown_keys_and_leaves_them_out(file: Path) -> None:
    file.write_text("compat: true\nlog: {levle: debug}\nfuture: {a: 1}\n", encoding="utf-8")
    told: list[str] = []
    loaded = config.load(file, {"LLORCH_NEXT": "1"}, warn=told.append)
    assert loaded.log.level.value == "info"
    assert [line.replace(f"{file.parent}/", "") for line in told] == [
        "LLORCH_NEXT: unknown setting",
        'llorch.yaml:2: log.levle: unknown key; did you mean "level"?',
        f"llorch.yaml:3: future: unknown key; expected one of {', '.join(sorted(config.Settings.model_fields))}",
    ]


def test_compat_still_refuses_wrong_values(file: Path) -> None:
    text = "compat: true\nlog: {level: 5}\n"
    assert problems(file, text) == ["llorch.yaml:2: log.level: expected one of debug, info, warning, error"]


# The environment


def test_environment_goes_over_the_file_typed_by_the_schema(file: Path) -> None:
    loaded = settings(
        file,
        POOL + "server: {port: 1}\nsampler_profiles: {V2: {top_k: 3}}\n",
        LLORCH_SERVER__PORT="9000",
        LLORCH_STREAMS__HEARTBEAT_S="2.5",
        LLORCH_POOLS__0__CTX="4096",
        LLORCH_POOLS__0__ALLOW_CPU="true",
        LLORCH_POOLS__0__ENGINE_VERSION="123",
        LLORCH_SAMPLER_PROFILES__V2__STOP="[a, 'b']",
        LLORCH_KEY="not a setting",
    )
    pool = loaded.pools[0]
    assert (loaded.server.port, loaded.streams.heartbeat_s) == (9000, 2.5)
    assert (pool.ctx, pool.allow_cpu, pool.engine_version) == (4096, True, "123")
    assert (loaded.sampler_profiles["V2"].top_k, loaded.sampler_profiles["V2"].stop) == (3, ["a", "b"])


def test_environment_alone_can_make_a_list(file: Path) -> None:
    parts = {"ID": "a", "ENGINE": "llamacpp", "MODEL": "m"}
    environ = {f"LLORCH_POOLS__0__{name}": value for name, value in parts.items()}
    for number in range(11):  # as text, 10 would sort before 2
        environ[f"LLORCH_POOLS__0__REPLICAS__{number}__URL"] = f"http://127.0.0.1:{number + 1}"
    assert len(config.load(None, environ).pools[0].replicas) == 11


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LLORCH_SERVER__PROT", "unknown setting; did you mean LLORCH_SERVER__PORT?"),
        ("LLORCH_PORT", "unknown setting; did you mean LLORCH_SERVER__PORT?"),
        ("LLORCH_POOLS__1__CTX", "expected a number from 0 to 0 for the item of the list, not '1'"),
        ("LLORCH_POOLS__A__CTX", "expected a number from 0 to 0 for the item of the list, not 'a'"),
    ],
)
def test_unknown_name_of_the_environment_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(None, {name: SECRET})
    assert caught.value.message == f"{name}: {message}"


def test_environment_reaches_replicas_that_llorch_starts(file: Path) -> None:
    """ORCH-3241. Variables of the process keep their case, or that of the file."""
    pool, replica = "LLORCH_POOLS__0__", "LLORCH_POOLS__0__REPLICAS__0__"
    environ = {
        "LLORCH_NODE_LEASE_S": "3",
        pool + "MODEL_PATH": "/m.gguf",
        pool + "SUPERVISION__STORM_FAILURES": "9",
        replica + "DEVICES": "[1, 0]",
        replica + "MANAGED__ENV__OMP_NUM_THREADS": "4",
        replica + "MANAGED__ENV__HTTP_PROXY": "none",
    }
    text = POOL.replace("- url: http://127.0.0.1:8081", "- managed: {env: {http_proxy: there}}")
    loaded = settings(file, text, **environ)
    [managed] = [replica.managed for replica in loaded.pools[0].replicas]
    assert managed is not None
    assert managed.env == {"OMP_NUM_THREADS": "4", "http_proxy": "none"}
    assert (loaded.node_lease_s, loaded.pools[0].supervision.storm_failures) == (3, 9)
    assert (loaded.pools[0].model_path, loaded.pools[0].replicas[0].devices) == ("/m.gguf", [1, 0])


def test_environment_of_engine_processes_is_no_setting() -> None:
    names = ("LLORCH_ENGINE_KEY", "LLORCH_MANAGER")
    assert config.load(None, dict.fromkeys(names, SECRET)) == config.load(None, {})


@pytest.mark.parametrize("value", ["x", "", "1.5", "[1", "1\nserver: 2"])
def test_wrong_value_of_the_environment_names_the_variable(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^LLORCH_SERVER__PORT: server\.port: "):
        config.load(None, {"LLORCH_SERVER__PORT": value})


# Rules


def two_pools(first: str = "", second: str = "") -> str:
    def pool(name: str, port: int, more: str) -> str:
        return f"  - {{id: {name}, engine: llamacpp, model: m, replicas: [{{url: 'http://h:{port}'}}]{more}}}\n"

    return "pools:\n" + pool("a", 1, first) + pool("b", 2, second)


def test_pools_that_agree_are_one_route(file: Path) -> None:
    assert len(settings(file, two_pools(", ctx: 4096", ", ctx: 4096")).pools) == 2


@pytest.mark.parametrize("name", ["quant: q8", "ctx: 4096", "sampler_profile_version: v2"])
def test_routes_that_model_and_engine_cannot_tell_apart_are_refused(file: Path, name: str) -> None:
    found = problems(file, two_pools("", f", {name}") + "sampler_profiles: {v2: {}}\n")
    setting = name.partition(":")[0]
    expected = f"llorch.yaml:3: pools[1].{setting}: differs from pools[0].{setting} (llorch.yaml:2): tasks name model"
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    "part",
    [
        "queue: {capacity: 3}",
        "queue: {full_policy: {batch: reject}}",
        "queue: {level_weights: {interactive: 2}}",
        "timeouts: {idle_s: 3}",
        "preemption: {mode: hard}",
        "price: {output_per_1k: 3}",
    ],
)
def test_pools_of_one_route_must_agree_in_what_is_the_routes(file: Path, part: str) -> None:
    found = problems(file, two_pools("", f", {part}"))
    assert len(found) == 1
    assert found[0].endswith("pools of one route must agree here; make them equal")


def test_duplicate_pools_replicas_and_keys_are_refused(file: Path) -> None:
    digest = "ab" * 32
    text = two_pools(", id: a").replace(", id: a}", "}").replace("id: b", "id: a").replace("http://h:2", "http://H:1/")
    text += f"keys:\n  - {{id: k, tenant: t, sha256: {digest}}}\n  - {{id: k, tenant: u, sha256: {digest}}}\n"
    found = problems(file, text)
    assert [line.split(": ")[1] for line in found] == [
        "pools[1].id", "pools[1].replicas[0].url", "keys[1].id", "keys[1].sha256",
    ]  # fmt: skip
    assert found[0] == "llorch.yaml:3: pools[1].id: the same as pools[0].id (llorch.yaml:2); each needs its own"


def test_replica_names_of_one_pool_are_unique_given_or_not(file: Path) -> None:
    text = POOL + "      - {url: 'http://h:2', id: '0'}\n"
    assert problems(file, text)[0].startswith("llorch.yaml:7: pools[0].replicas[1].id: the same as")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "'::'", "example.org"])
def test_without_keys_only_loopback_may_be_bound(file: Path, host: str) -> None:
    found = problems(file, f"server: {{host: {host}}}\n")
    assert found[0].startswith("llorch.yaml:1: server.host: without keys llorch binds loopback only; bind 127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "'::1'"])
def test_loopback_needs_no_key(file: Path, host: str) -> None:
    assert settings(file, f"server: {{host: {host}}}\n").keys == []


def test_with_a_key_any_host_may_be_bound(file: Path) -> None:
    text = f"server: {{host: 0.0.0.0}}\nkeys: [{{id: k, tenant: t, sha256: {'ab' * 32}}}]\n"
    assert settings(file, text).server.host == "0.0.0.0"


def test_unknown_sampler_profile_is_refused_and_v1_always_exists(file: Path) -> None:
    text = POOL.replace("model: m", "model: m\n    sampler_profile_version: calm")
    assert problems(file, text) == [
        "llorch.yaml:5: pools[0].sampler_profile_version: no such sampler profile; add it to sampler_profiles"
    ]
    assert settings(file, POOL).pools[0].sampler_profile_version == config.EMPTY_PROFILE
    assert config.EMPTY_PROFILE not in settings(file, POOL).sampler_profiles


def test_tls_files_must_be_there(file: Path) -> None:
    file.with_name("cert.pem").write_text("x", encoding="utf-8")
    text = f"server:\n  tls:\n    cert: {file.parent}/cert.pem\n    key: {file.parent}/key.pem\n"
    assert problems(file, text) == ["llorch.yaml:4: server.tls.key: there is no such file"]


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        f"keys: [{{id: k, tenant: t, sha256: {SECRET}}}]\n",
        f"keys: {SECRET}\n",
        POOL.replace("8081", f"8081\n        api_key: [{SECRET}]"),
        POOL.replace("127.0.0.1", f"user:{SECRET}@h"),
        POOL.replace("id: a", f"id: a {SECRET}"),
        f"server: {{port: {SECRET}}}\n",
        f"log: {{level: {SECRET}}}\n",
        f"api_key: *{SECRET}\n",
        f"api_key: '{SECRET}\n",
        f"api_key: @{SECRET}\n",
        f"api_key: !{SECRET} x\n",
        f"api_key: x\n{SECRET}\nb: 1",
    ],
)
def test_no_value_is_ever_printed(file: Path, text: str) -> None:
    assert SECRET not in "\n".join(problems(file, text))


def test_engine_key_is_not_shown_with_the_settings(file: Path) -> None:
    loaded = settings(file, POOL, LLORCH_POOLS__0__REPLICAS__0__API_KEY=SECRET)
    key: Any = loaded.pools[0].replicas[0].api_key
    assert key.get_secret_value() == SECRET
    assert SECRET not in repr(loaded)


# The example


def test_example_file_is_valid_and_shows_the_defaults() -> None:
    example, defaults = config.load(EXAMPLE, {}), config.load(None, {})
    for part in ("server", "tenant_defaults", "sessions", "streams", "node_lease_s", "log", "compat"):
        assert getattr(example, part) == getattr(defaults, part)
    pool = example.pools[0]
    assert (pool.queue, pool.timeouts) == (config.Queue(), config.Timeouts())
    assert (pool.preemption, pool.price) == (config.Preemption(), config.Price())
    assert (pool.headroom, pool.supervision) == (config.Headroom(), config.Supervision())
    assert (pool.drain_s, pool.self_test) == (config.Pool.model_fields["drain_s"].default, None)
    managed, *others = [replica.managed for replica in pool.replicas if replica.managed is not None]
    assert (managed.model_copy(update={"launcher": config.Managed().launcher}), others) == (config.Managed(), [])
    [node] = example.nodes
    assert node.networks == config.Node(id="n", sha256=node.sha256).networks


def test_example_file_mentions_every_setting() -> None:
    names = {part for name in setting_names(load_config_schema()) for part in name.lower().split("__")}
    names = {name.removeprefix("llorch_") for name in names} - {"0", "name"}
    text = EXAMPLE.read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"{name}:" not in text] == []


def test_every_line_of_the_example_has_a_comment_or_opens_a_group() -> None:
    bare = [line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip() and "#" not in line]
    assert [line for line in bare if not line.endswith(":")] == []
