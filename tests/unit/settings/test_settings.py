"""Settings: what each allows, and the messages that name the setting and what it allows."""

import dataclasses
import sys
from ipaddress import ip_network
from pathlib import Path

import pytest

from app.errors import SettingsError
from app.settings import Settings, hash_key, is_loopback
from app.settings.parsers import ApiKey, PostgresUrl, RolloutRails
from tests.support.registry import REGISTRY

DIGEST = hash_key("key").hex()
OTHER = hash_key("other").hex()

GOOD: dict[str, dict[str, object]] = {
    "DATABASE": {"/data/profiles.db": Path("/data/profiles.db"), "with space.db": Path("with space.db")},
    "CACHE_URL": {
        "": None,
        "redis://cache:6379/0": "redis://cache:6379/0",
        "rediss://user:pass@cache": "rediss://user:pass@cache",
        "redis://[::1]:6379": "redis://[::1]:6379",
        "redis://one:26379,two:26379/0?sentinel=m": "redis://one:26379,two:26379/0?sentinel=m",
        "redis+cluster://one:6379,[::1]:6380/": "redis+cluster://one:6379,[::1]:6380/",
        "rediss+cluster://user:pw@one?ssl_ca_certs=/ca": "rediss+cluster://user:pw@one?ssl_ca_certs=/ca",
        "rediss://cache?ssl_check_hostname=false": "rediss://cache?ssl_check_hostname=false",
        "unix:///run/cache.sock?db=2": "unix:///run/cache.sock?db=2",
        "rediss://a,b/0?sentinel=pf&ssl_ca_certs=/ca.pem": "rediss://a,b/0?sentinel=pf&ssl_ca_certs=/ca.pem",
    },
    "QUEUE_URL": {"": None, "redis://queue/1": "redis://queue/1"},
    "HOST": {"0.0.0.0": "0.0.0.0", "::1": "::1", "api.example.com": "api.example.com"},  # noqa: S104  # only parsed
    "PORT": {"1": 1, "65535": 65535},
    "PROCESSES": {"1": 1, "64": 64},
    "ROOT_PATH": {"": "", "/": "", "/profiles": "/profiles", "/ml/user-profiles_v1.2~/": "/ml/user-profiles_v1.2~"},
    "TRUSTED_PROXIES": {
        "": (),
        "127.0.0.1, ::1,10.0.0.0/8": tuple(map(ip_network, ("127.0.0.1", "::1", "10.0.0.0/8"))),
    },
    "API_KEYS": {
        "": (),
        f"a:read:{DIGEST}": (ApiKey("a", frozenset({"read"}), hash_key("key")),),
        f" a.b-c_1:read+write:{DIGEST} , b:admin:{OTHER},": (
            ApiKey("a.b-c_1", frozenset({"read", "write"}), hash_key("key")),
            ApiKey("b", frozenset({"admin"}), hash_key("other")),
        ),
    },
    "RATE_LIMIT": {"0": 0, "200": 200},
    "RATE_BURST": {"1000000": 1_000_000},
    "RETENTION_DAYS": {"60": 60},
    "DECISION_RETENTION_DAYS": {"30": 30},
    "REWARDS": {
        "": (),
        "completed=1,none=0": (("completed", 1.0), ("none", 0.0)),
        " dismissed=0.05 , none=.1,": (("dismissed", 0.05), ("none", 0.1)),
    },
    "REWARD_WINDOW_HOURS": {"1": 1, "720": 720},
    "SCORING": {"0": False, "1": True},
    "SHADOW": {"0": False},
    "LOG_FORMAT": {"json": "json", "console": "console"},
    "LOG_LEVEL": {"debug": "debug", "error": "error"},
    "CACHE_TIMEOUT_MS": {"5": 5, "60000": 60_000},
    "LEASE_MS": {"50": 50},
    "READERS": {"64": 64},
    "KEEP_ALIVE_S": {"90": 90},
    "QUEUE_NAME": {"shop:profiles": "shop:profiles"},
    "STATEMENT_TIMEOUT_MS": {"50": 50},
    "FEATURES": {
        "": None,
        "shop.features:REGISTRY": "shop.features:REGISTRY",
        "/etc/a b:c/features.py:OURS": "/etc/a b:c/features.py:OURS",
    },
    "NEAR_USERS": {"0": 0, "10000000": 10_000_000},
    "DRAIN_S": {"300": 300},
    "SESSION_HOURS": {"1": 1, "720": 720},
    "AUDIT_USERS": {"0": 0, "1000": 1_000},
    "METRICS_PORT": {"0": 0, "9100": 9100},
    "WORKER_METRICS_PORT": {"0": 0},
    "EMBEDDED_CACHE_MB": {"1": 1},
    "ROLLOUT_MARGIN": {"0": 0.0, ".005": 0.005},
    "ROLLOUT_GUARDRAILS": {"": RolloutRails(), "no_profile=1, p99_ms=250": RolloutRails(p99_ms=250, no_profile=1)},
    "TRACES_URL": {"": None, "http://jaeger:4318/": "http://jaeger:4318", "https://t/a/v1/traces": "https://t/a"},
    "MODEL_URL": {
        "": None,
        "https://models.example/v1/": "https://models.example/v1",
        "http://[::1]:8080": "http://[::1]:8080",
        "https://models.example/v1/chat/completions": "https://models.example/v1",
    },
    "MODEL": {"": None, "meta-llama/Llama-3.1-8B:free": "meta-llama/Llama-3.1-8B:free"},
    "MODEL_KEY": {"": None, "sk-1_2.3": "sk-1_2.3"},
    "MODEL_CALLS": {"1": 1},
    "DEMO": {"0": False, "1": True},
}

# By setting and part of the message: the values that are refused.
BAD: dict[tuple[str, str], list[str]] = {
    ("DATABASE", "must be a file path"): ["", "a\0b"],
    ("DATABASE", "must be the path of a SQLite file or postgresql://…; no other"): ["mysql://host/db"],
    ("DATABASE", "must be postgresql://user@host:port/name?option=value"): ["postgresql://[::1/db"],
    ("DATABASE", 'invalid URI query parameter: "ssl"'): ["postgresql://host/db?ssl=1"],
    ("DATABASE", "'sslmode' must be one of disable, allow"): ["postgresql://host/db?sslmode=on"],
    ("DATABASE", "'target_session_attrs' must be one of read-write, primary"): [
        *("postgresql://a,b/db?target_session_attrs=any", "postgresql://a,b/db?target_session_attrs=prefer-standby"),
    ],
    ("DATABASE", "'connect_timeout' must be a whole number of seconds"): ["postgresql://host/db?connect_timeout=1s"],
    ("DATABASE", "each port must be"): [
        "postgresql://host:0/db",
        "postgresql://host:port/db",
        "postgresql://a:1,b:-2/d",
    ],
    ("DATABASE", "the option 'passfile' must name a file"): ["postgresql://host/db?passfile=/none"],
    ("ROOT_PATH", "must be a path"): [
        *("profiles", "https://host/profiles", "/a//b", "//", "/a/../b", "/.", "/a b", '/"><script>', "/a\n"),
    ],
    ("TRUSTED_PROXIES", "must be addresses or networks"): ["*", "proxy", "127.0.0.1;::1"],
    ("TRUSTED_PROXIES", "has host bits set"): ["10.0.0.1/8"],
    ("CACHE_URL", "must start with redis://, rediss:// or unix://"): ["http://cache", "cache:6379"],
    ("CACHE_URL", "must name a host"): ["redis://", "redis:///0"],
    ("CACHE_URL", "port from 1 to 65535"): ["redis://cache:port", "redis://cache:70000"],
    ("CACHE_URL", "redis://host:6379/0"): ["redis://cache:0", "redis://cache/first"],
    ("CACHE_URL", "must be a URL"): ["redis://[::1"],
    ("CACHE_URL", "must name nodes of the cluster and no database"): ["redis+cluster://one/1", "redis+cluster:///"],
    ("CACHE_URL", "the option 'sentinel' is not allowed"): ["redis+cluster://one?sentinel=m"],
    ("CACHE_URL", "with a port from 1 to 65535"): ["redis+cluster://one:6379,two:0/"],
    ("QUEUE_URL", "arq uses several keys in one transaction"): ["redis+cluster://one", "rediss+cluster://one,two"],
    ("CACHE_URL", "must name a socket"): ["unix://"],
    ("CACHE_URL", "the option 'family' is not allowed"): ["redis://cache?family=0"],
    ("CACHE_URL", "the option 'ssl_ca_certs' is not allowed"): [
        *(
            "redis://cache?ssl_ca_certs=/ca",
            "redis://one,two?sentinel=m&ssl_ca_certs=/ca",
            "unix:///s?ssl_ca_certs=/ca",
        ),
        "redis+cluster://one?ssl_ca_certs=/ca",
    ],
    ("CACHE_URL", "the option 'ssl_check_hostname' must be true or false"): ["rediss://cache?ssl_check_hostname=no"],
    ("CACHE_URL", "the option 'ssl_cert_reqs' is not allowed"): ["rediss://cache?ssl_cert_reqs=none"],
    ("CACHE_URL", "the option 'decode_responses' is not allowed"): ["redis://cache?decode_responses=true"],
    ("CACHE_URL", "the option 'sentinel' is not allowed, or has no value; allowed are db"): ["redis://cache?sentinel="],
    ("CACHE_URL", "the option 'db' must be a number"): ["unix:///s?db=x"],
    ("QUEUE_URL", "must start with redis://, rediss:// or unix://"): ["amqp://queue"],
    ("QUEUE_URL", "port from 1 to 65535"): ["redis://queue:port"],
    ("HOST", "must be an address or a host name"): ["", "a b", "http://localhost"],
    ("PORT", "from 1 to 65535"): ["0", "65536"],
    ("PORT", "whole number"): ["8000.0", "-1", " 8000", "٨٠٠٠", ""],
    ("API_KEYS", "key 1 must be name:scope+scope:sha256hex"): ["a"],
    ("API_KEYS", "key 2 must be name:scope+scope:sha256hex"): [f"a:read:{DIGEST},b:read"],
    ("API_KEYS", "key 1: the name must be"): [f":read:{DIGEST}", f"a b:read:{DIGEST}", f"{'a' * 65}:read:{DIGEST}"],
    ("API_KEYS", "key 1: the scopes must be"): [f"a:reed:{DIGEST}", f"a::{DIGEST}", f"a:read+:{DIGEST}"],
    ("API_KEYS", "key 1: the last part must be the SHA-256"): [f"a:read:{DIGEST[1:]}", f"a:read:{DIGEST.upper()}"],
    ("API_KEYS", "the name is used twice"): [f"a:read:{DIGEST},a:write:{OTHER}"],
    ("API_KEYS", "another name has the same key"): [f"a:read:{DIGEST},b:admin:{DIGEST}"],
    ("RATE_LIMIT", "from 0 to 1000000"): ["-1"],
    ("RATE_LIMIT", "whole number"): ["1.5"],
    ("RATE_BURST", "from 0 to 1000000"): ["1000001"],
    ("DRAIN_S", "from 0 to 300"): ["301"],
    ("RETENTION_DAYS", "from 1 to 36500"): ["0"],
    ("RETENTION_DAYS", "whole number"): ["half a year"],
    ("DECISION_RETENTION_DAYS", "from 1 to 36500"): ["0"],
    ("REWARDS", "the reward of completed must be a number from 0 to 1"): ["completed", "completed=1.1"],
    ("REWARDS", "the reward of snoozed must be a number from 0 to 1"): ["snoozed=-0.1"],
    ("REWARDS", "the reward of none must be a number from 0 to 1"): ["none=nan", "none=1e-1"],
    ("REWARDS", "none is given twice"): ["none=0,none=1"],
    ("REWARD_WINDOW_HOURS", "from 1 to 720"): ["0"],
    ("SCORING", "must be 0 or 1"): ["on", ""],
    ("SHADOW", "must be 0 or 1"): ["on"],
    ("ROLLOUT_MARGIN", "must be a number from 0 to 1"): ["-0.1", "2", "5%"],
    ("ROLLOUT_GUARDRAILS", "guardrails are dismissed, p99_ms, no_profile"): ["latency=1"],
    ("ROLLOUT_GUARDRAILS", "dismissed must be a number from 0 to 1"): ["dismissed"],
    ("ROLLOUT_GUARDRAILS", "no_profile must be a number from 0 to 1"): ["no_profile=nan"],
    ("ROLLOUT_GUARDRAILS", "p99_ms must be a whole number of milliseconds"): ["p99_ms=0"],
    ("ROLLOUT_GUARDRAILS", "p99_ms is given twice"): ["p99_ms=1,p99_ms=2"],
    ("LOG_FORMAT", "must be one of console, json"): ["xml"],
    ("LOG_LEVEL", "must be one of debug, info, warning, error"): ["INFO"],
    ("CACHE_TIMEOUT_MS", "from 5 to 60000"): ["4"],
    ("LEASE_MS", "from 50 to 600000"): ["49"],
    ("READERS", "from 1 to 64"): ["0"],
    ("KEEP_ALIVE_S", "from 1 to 3600"): ["0"],
    ("QUEUE_NAME", "must be 1 to 100 of A-Z a-z 0-9 : _ . -"): ["", "two words"],
    ("STATEMENT_TIMEOUT_MS", "from 50 to 600000"): ["49"],
    ("FEATURES", "must be package.module:NAME or /path/features.py:NAME"): [
        *("features", "shop.features:", "shop-features:REGISTRY", "/etc/features.txt:REGISTRY"),
    ],
    ("NEAR_USERS", "from 0 to 10000000"): ["-1"],
    ("SESSION_HOURS", "from 1 to 720"): ["0"],
    ("AUDIT_USERS", "from 0 to 1000"): ["1001"],
    ("PROCESSES", "from 1 to 64"): ["0", "65"],
    ("METRICS_PORT", "from 0 to 65535"): ["65536"],
    ("WORKER_METRICS_PORT", "from 0 to 65535"): ["65536"],
    ("EMBEDDED_CACHE_MB", "from 1 to 1000000"): ["0"],
    ("TRACES_URL", "such as http://host:4318"): ["jaeger:4318"],
    ("TRACES_URL", "set OTEL_EXPORTER_OTLP_HEADERS"): ["https://me:secret@jaeger"],
    ("MODEL_URL", "must start with http:// or https://"): ["models.example/v1", "ftp://models.example"],
    ("MODEL_URL", "name a host"): ["https://"],
    ("MODEL_URL", "port from 1"): ["https://models.example:0/v1", "https://models.example:port/v1"],
    ("MODEL_URL", "set the key in PROFILES_MODEL_KEY"): ["https://me:secret@models.example/v1"],
    ("MODEL_URL", "without a query"): ["https://models.example/v1?key=secret"],
    ("MODEL_URL", "or a fragment"): ["https://models.example/v1#x"],
    ("MODEL_URL", "must be ASCII"): ["https://models.example/a b"],
    ("MODEL", "ASCII characters without spaces"): ["a model"],
    ("MODEL", "1 to 200"): ["m" * 201],
    ("MODEL_KEY", "ASCII characters without spaces"): ["sk secret", "sk\nsecret"],
    ("MODEL_CALLS", "from 1 to 1000"): ["0"],
    ("DEMO", "must be 0 or 1"): ["yes", ""],
}


def read(**variables: str) -> Settings:
    """Settings from variables named without their prefix."""
    return Settings.from_environment({f"PROFILES_{name}": value for name, value in variables.items()})


def test_setting_is_read_when_its_value_is_allowed() -> None:
    model = {"MODEL_URL": "https://host/v1", "MODEL": "m"}  # set together or not at all
    for name, values in GOOD.items():
        for text, value in values.items():
            others = model if text and name in (*model, "MODEL_KEY") else {}
            assert getattr(read(**{**others, name: text}), name.lower()) == value, (name, text)


def refusal(name: str, text: str) -> SettingsError:
    """The error with which a value of a setting is refused."""
    with pytest.raises(SettingsError) as caught:
        read(**{name: text})
    return caught.value


def test_bad_value_is_refused_with_the_setting() -> None:
    for (name, allowed), texts in BAD.items():
        for text in texts:
            error = refusal(name, text)
            assert str(error).startswith(f"PROFILES_{name}: "), text
            assert allowed in str(error), text


def test_every_setting_is_tried_with_good_and_bad_values() -> None:
    names = {item.name.upper() for item in dataclasses.fields(Settings)}
    assert GOOD.keys() == {name for name, _ in BAD} == names


def test_defaults_stand_when_nothing_is_set() -> None:
    settings = Settings.from_environment({"PATH": "/bin", "OTHER_PROFILES_PORT": "x"})
    assert settings == Settings()
    assert settings.database == Path("var/profiles.db")
    assert (settings.cache_url, settings.queue_url, settings.api_keys) == (None, None, ())
    assert (settings.host, settings.port, settings.retention_days) == ("127.0.0.1", 8000, 180)
    assert settings.log_format == "console"


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROFILES_PORT", "8123")
    assert Settings.from_environment().port == 8123


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PROFILES_RETENTION", "did you mean PROFILES_RETENTION_DAYS?"),
        ("PROFILES_APIKEYS", "did you mean PROFILES_API_KEYS?"),
        ("PROFILES_port", "did you mean PROFILES_PORT?"),
        ("PROFILES_ZZZZZZZZZZZZZ", "settings are PROFILES_DATABASE"),
    ],
)
def test_unknown_setting_is_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(SettingsError, match="unknown setting") as caught:
        Settings.from_environment({name: "a-secret"})
    assert str(caught.value).startswith(f"{name}: ")
    assert "a-secret" not in str(caught.value)
    assert hint in str(caught.value)


def test_value_is_read_from_a_file(tmp_path: Path) -> None:
    keys, url = tmp_path / "keys", tmp_path / "url"
    keys.write_text(f"reader:read:{DIGEST}\n")
    url.write_text("redis://:top-secret@cache:6379/0\r\n")
    files = {"PROFILES_API_KEYS_FILE": str(keys), "PROFILES_CACHE_URL_FILE": str(url)}
    found = Settings.from_environment({**files, "PROFILES_API_KEYS": ""})  # as a compose file passes on what is not set
    assert (found.api_keys[0].name, found.cache_url) == ("reader", "redis://:top-secret@cache:6379/0")


@pytest.mark.parametrize(
    ("content", "others", "reason"),
    [
        (None, {}, "PROFILES_MODEL_KEY_FILE: names a file that cannot be read: .*No such file"),
        (b"\n", {}, "PROFILES_MODEL_KEY_FILE: names an empty file"),
        (b"\xff", {}, "PROFILES_MODEL_KEY_FILE: names a file that cannot be read: .*utf-8"),
        (b"x", {"PROFILES_MODEL_KEY": "y"}, "PROFILES_MODEL_KEY_FILE: cannot be combined with PROFILES_MODEL_KEY"),
        (b"x", {"PROFILES_MODEL_KEYS_FILE": "y"}, "PROFILES_MODEL_KEYS_FILE: unknown setting"),
        (b"x", {"PROFILES_PORT_FILE": "y"}, "PROFILES_PORT_FILE: unknown setting"),
        (b"top secret\n", {}, "PROFILES_MODEL_KEY: (?!.*top)"),
    ],
)
def test_file_is_refused_when_it_gives_no_value(
    tmp_path: Path, content: bytes | None, others: dict[str, str], reason: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=reason):
        Settings.from_environment({"PROFILES_MODEL_KEY_FILE": str(path), **others})


# What `kubectl exec … env` shows in a pod beside two Services, `profiles` and `profiles-cache`.
SERVICE_LINKS = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "PROFILES_SERVICE_HOST": "10.96.7.1",
    "PROFILES_SERVICE_PORT": "8000",
    "PROFILES_SERVICE_PORT_HTTP": "8000",
    "PROFILES_PORT": "tcp://10.96.7.1:8000",
    "PROFILES_PORT_8000_TCP": "tcp://10.96.7.1:8000",
    "PROFILES_PORT_8000_TCP_PROTO": "tcp",
    "PROFILES_PORT_8000_TCP_PORT": "8000",
    "PROFILES_PORT_8000_TCP_ADDR": "10.96.7.1",
    "PROFILES_CACHE_SERVICE_HOST": "10.96.7.2",
    "PROFILES_CACHE_PORT": "tcp://10.96.7.2:6379",
    "PROFILES_CACHE_PORT_6379_TCP_ADDR": "10.96.7.2",
}


def test_kubernetes_service_variables_are_ignored() -> None:
    assert Settings.from_environment(SERVICE_LINKS) == Settings()
    assert Settings.from_environment({**SERVICE_LINKS, "PROFILES_PORT": "8080"}).port == 8080
    with pytest.raises(SettingsError, match="PROFILES_RETENTION"):
        Settings.from_environment({**SERVICE_LINKS, "PROFILES_RETENTION": "1"})
    with pytest.raises(SettingsError, match="PROFILES_PORT"):
        Settings.from_environment({"PROFILES_PORT": "tcp://10.96.7.1:8000"})


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("API_KEYS", ["top-secret", "a:top-secret:read", "a:read:top-secret", "a:read+top-secret:" + DIGEST]),
        ("CACHE_URL", ["redis://user:top-secret@cache:port", "redis://user:top-secret@[::1", "top-secret"]),
        ("TRACES_URL", ["https://me:top-secret@host"]),
        ("MODEL_URL", ["https://me:top-secret@host", "https://host/?key=top-secret", "top-secret"]),
        (
            "DATABASE",
            [
                *("postgresql://me:top-secret@host/db?ssl=1", "postgresql://me:top-secret%@host/db"),
                *("postgresql://me:1@top-secret@host/db", "postgresql://me:1/top-secret@host/db"),
                *("postgresql://me:top-secret/1@host/db", "postgresql://h/db?password=top-secret&sslmode=on"),
            ],
        ),
        ("MODEL", ["top-secret of a model"]),
        ("MODEL_KEY", ["top-secret \n"]),
    ],
)
def test_message_never_shows_a_secret(name: str, texts: list[str]) -> None:
    for text in texts:
        error = refusal(name, text)
        assert "top-secret" not in str(error), text
        assert error.__cause__ is None


def test_message_shows_a_wrong_value_without_password() -> None:
    for name, text, shown in (
        ("PORT", "80O0", "(given: '80O0')"),
        ("HOST", "a b" * 100, f"(given: {('a b' * 100)[:80]!r})"),
    ):
        assert str(refusal(name, text)).endswith(shown)


def test_settings_do_not_show_passwords_and_keys() -> None:
    url, key = "https://host/top-secret", "top-secret"
    assert "top-secret" not in repr(read(CACHE_URL=f"redis://:{key}@host", MODEL_URL=url, MODEL="m", MODEL_KEY=key))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:top-secret@host/db", "postgresql://me@host/db"),
        ("postgres://host:5433/db?user=me&password=top-secret", "postgresql://me@host:5433/db"),
        ("postgresql://a:1,b:2/db?target_session_attrs=read-write&sslmode=verify-full", "postgresql://a:1,b:2/db"),
        ("postgresql://a,b:2/db", "postgresql://a,b:2/db"),
        ("postgresql:///db?host=a,b&port=5", "postgresql://a:5,b:5/db"),
        ("postgresql:///db?host=/run/postgresql", "postgresql:///run/postgresql/db"),
    ],
)
def test_database_is_shown_without_password_and_options(url: str, shown: str) -> None:
    database = read(DATABASE=url).database
    assert isinstance(database, PostgresUrl)
    assert (database.url, str(database)) == (url, shown)
    assert "top-secret" not in repr(database)


def test_database_needs_psycopg_when_it_is_one_of_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "pip install 'profiles[postgres]'" in str(refusal("DATABASE", "postgresql://host/db"))


def test_scoring_needs_numpy_only_when_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert "pip install 'profiles[scoring]'" in str(refusal("SCORING", "1"))
    assert read(SCORING="0").scoring is False


def test_file_is_required_when_the_database_is_one_of_postgresql() -> None:
    assert read(DATABASE="var/a.db").require_file() == Path("var/a.db")
    with pytest.raises(SettingsError, match="PROFILES_DATABASE: names a PostgreSQL database; use pg_dump"):
        read(DATABASE="postgresql://host/db").require_file("use pg_dump")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"MODEL": "m"}, "PROFILES_MODEL_URL"),
        ({"MODEL_KEY": "k"}, "PROFILES_MODEL_URL"),
        ({"MODEL_URL": "https://host/v1", "MODEL_KEY": "k"}, "PROFILES_MODEL"),
    ],
)
def test_settings_are_refused_when_the_model_is_incomplete(given: dict[str, str], missing: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**given)
    assert str(caught.value).startswith(f"{missing}: ")
    assert read(MODEL_URL="https://host/v1", MODEL="m").model == "m"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_no_keys_are_needed_on_loopback(host: str) -> None:
    assert is_loopback(host)
    Settings(host=host).require_safe_binding()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.168.1.1", "api", "localhost.example.com", "127.1"])  # noqa: S104  # refused
def test_start_is_refused_when_exposed_without_keys(host: str) -> None:
    with pytest.raises(SettingsError, match="PROFILES_API_KEYS: must hold at least one key when PROFILES_HOST is"):
        Settings(host=host).require_safe_binding()
    with pytest.raises(SettingsError, match="PROFILES_TRUSTED_PROXIES is set"):
        Settings(trusted_proxies=(ip_network("127.0.0.1"),)).require_safe_binding()
    Settings(host=host, api_keys=(ApiKey("a", frozenset({"read"}), hash_key("key")),)).require_safe_binding()


def test_start_is_refused_when_a_server_is_not_named() -> None:
    Settings(cache_url="redis://cache", queue_url="redis://queue").require_servers()
    with pytest.raises(SettingsError, match="PROFILES_CACHE_URL: must be set"):
        Settings(queue_url="redis://queue").require_servers()
    with pytest.raises(SettingsError, match="PROFILES_QUEUE_URL: must be set"):
        Settings(cache_url="redis://cache").require_servers()


def test_retention_is_refused_when_shorter_than_windows() -> None:
    longest_ms = REGISTRY.longest_window_ms()
    Settings(retention_days=60).require_retention(longest_ms)
    with pytest.raises(SettingsError, match="PROFILES_RETENTION_DAYS: must be at least 60"):
        Settings(retention_days=59).require_retention(longest_ms)
    with pytest.raises(SettingsError, match="PROFILES_RETENTION_DAYS: must be at least 61"):
        Settings(retention_days=60).require_retention(longest_ms + 1)


def test_retention_of_decisions_must_leave_time_for_their_rewards() -> None:
    Settings(decision_retention_days=4).require_retention(0)
    Settings(decision_retention_days=33, reward_window_hours=720).require_retention(0)
    for days, hours in ((3, 24), (4, 25), (32, 720)):
        with pytest.raises(SettingsError, match=f"PROFILES_DECISION_RETENTION_DAYS: must be at least {days + 1}"):
            Settings(decision_retention_days=days, reward_window_hours=hours).require_retention(0)


def test_settings_never_change() -> None:
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]  # that is the point
    with pytest.raises(AttributeError, match="immutable"):
        ApiKey("a", frozenset(), b"").name = "b"  # type: ignore[misc]  # that is the point
