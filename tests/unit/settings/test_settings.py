"""Settings: what each allows, and the messages that name the setting and what it allows."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_network
from pathlib import Path

import pytest

from app.errors import SettingsError
from app.settings import Settings, described, hash_key, is_loopback, variable
from app.settings.parsers import ApiKey, RolloutRails
from tests.support.registry import REGISTRY

DIGEST = hash_key("key").hex()
OTHER = hash_key("other").hex()

GOOD: list[tuple[str, str, object]] = [
    ("DATABASE", "/data/profiles.db", Path("/data/profiles.db")),
    ("DATABASE", "with space.db", Path("with space.db")),
    ("CACHE_URL", "redis://cache:6379/0", "redis://cache:6379/0"),
    ("CACHE_URL", "rediss://user:pass@cache", "rediss://user:pass@cache"),
    ("CACHE_URL", "redis://[::1]:6379", "redis://[::1]:6379"),
    ("CACHE_URL", "unix:///run/cache.sock", "unix:///run/cache.sock"),
    ("CACHE_URL", "unix:///run/cache.sock?db=2", "unix:///run/cache.sock?db=2"),
    ("CACHE_URL", "rediss://a,b/0?sentinel=pf&ssl_ca_certs=/ca.pem", "rediss://a,b/0?sentinel=pf&ssl_ca_certs=/ca.pem"),
    ("CACHE_URL", "", None),
    ("QUEUE_URL", "redis://queue/1", "redis://queue/1"),
    ("QUEUE_URL", "", None),
    ("HOST", "0.0.0.0", "0.0.0.0"),  # noqa: S104  # a value to parse, nothing listens
    ("HOST", "::1", "::1"),
    ("HOST", "api.example.com", "api.example.com"),
    ("PORT", "1", 1),
    ("PORT", "65535", 65535),
    ("ROOT_PATH", "", ""),
    ("ROOT_PATH", "/", ""),
    ("ROOT_PATH", "/profiles", "/profiles"),
    ("ROOT_PATH", "/ml/user-profiles_v1.2~/", "/ml/user-profiles_v1.2~"),
    ("TRUSTED_PROXIES", "", ()),
    ("TRUSTED_PROXIES", "127.0.0.1, ::1,10.0.0.0/8", tuple(map(ip_network, ("127.0.0.1", "::1", "10.0.0.0/8")))),
    ("API_KEYS", "", ()),
    ("API_KEYS", f"a:read:{DIGEST}", (ApiKey("a", frozenset({"read"}), hash_key("key")),)),
    (
        "API_KEYS",
        f" a.b-c_1:read+write:{DIGEST} , b:admin:{OTHER},",
        (
            ApiKey("a.b-c_1", frozenset({"read", "write"}), hash_key("key")),
            ApiKey("b", frozenset({"admin"}), hash_key("other")),
        ),
    ),
    ("RATE_LIMIT", "0", 0),
    ("RATE_LIMIT", "200", 200),
    ("RATE_BURST", "1000000", 1_000_000),
    ("RETENTION_DAYS", "60", 60),
    ("DECISION_RETENTION_DAYS", "30", 30),
    ("REWARDS", "", ()),
    ("REWARDS", "completed=1,none=0", (("completed", 1.0), ("none", 0.0))),
    ("REWARDS", " dismissed=0.05 , none=.1,", (("dismissed", 0.05), ("none", 0.1))),
    ("REWARD_WINDOW_HOURS", "1", 1),
    ("REWARD_WINDOW_HOURS", "720", 720),
    ("SHADOW", "0", False),
    ("LOG_FORMAT", "json", "json"),
    ("LOG_FORMAT", "console", "console"),
    ("LOG_LEVEL", "debug", "debug"),
    ("LOG_LEVEL", "error", "error"),
    ("CACHE_TIMEOUT_MS", "5", 5),
    ("CACHE_TIMEOUT_MS", "60000", 60_000),
    ("LEASE_MS", "50", 50),
    ("READERS", "64", 64),
    ("KEEP_ALIVE_S", "90", 90),
    ("QUEUE_NAME", "shop:profiles", "shop:profiles"),
    ("STATEMENT_TIMEOUT_MS", "50", 50),
    ("FEATURES", "", None),
    ("FEATURES", "shop.features:REGISTRY", "shop.features:REGISTRY"),
    ("FEATURES", "/etc/a b:c/features.py:OURS", "/etc/a b:c/features.py:OURS"),
    ("NEAR_USERS", "0", 0),
    ("DRAIN_S", "300", 300),
    ("SESSION_HOURS", "1", 1),
    ("SESSION_HOURS", "720", 720),
    ("NEAR_USERS", "10000000", 10_000_000),
    ("AUDIT_USERS", "0", 0),
    ("AUDIT_USERS", "1000", 1_000),
    ("WORKER_METRICS_PORT", "0", 0),
    ("EMBEDDED_CACHE_MB", "1", 1),
    ("ROLLOUT_MARGIN", "0", 0.0),
    ("ROLLOUT_MARGIN", ".005", 0.005),
    ("ROLLOUT_GUARDRAILS", "", RolloutRails()),
    ("ROLLOUT_GUARDRAILS", "no_profile=1, p99_ms=250", RolloutRails(p99_ms=250, no_profile=1)),
    ("MODEL_URL", "https://models.example/v1/", "https://models.example/v1"),
    ("MODEL_URL", "http://[::1]:8080", "http://[::1]:8080"),
    ("MODEL_URL", "https://models.example/v1/chat/completions", "https://models.example/v1"),
    ("MODEL_URL", "", None),
    ("MODEL", "meta-llama/Llama-3.1-8B:free", "meta-llama/Llama-3.1-8B:free"),
    ("MODEL", "", None),
    ("MODEL_KEY", "sk-1_2.3", "sk-1_2.3"),
    ("MODEL_KEY", "", None),
    ("MODEL_CALLS", "1", 1),
    ("DEMO", "0", False),
    ("DEMO", "1", True),
]

BAD: list[tuple[str, str, str]] = [
    ("DATABASE", "", "must be a file path"),
    ("DATABASE", "a\0b", "must be a file path"),
    ("ROOT_PATH", "profiles", "must be a path"),
    ("ROOT_PATH", "https://host/profiles", "must be a path"),
    ("ROOT_PATH", "/a//b", "must be a path"),
    ("ROOT_PATH", "//", "must be a path"),
    ("ROOT_PATH", "/a/../b", "must be a path"),
    ("ROOT_PATH", "/.", "must be a path"),
    ("ROOT_PATH", "/a b", "must be a path"),
    ("ROOT_PATH", '/"><script>', "must be a path"),
    ("ROOT_PATH", "/a\n", "must be a path"),
    ("TRUSTED_PROXIES", "*", "must be addresses or networks"),
    ("TRUSTED_PROXIES", "proxy", "must be addresses or networks"),
    ("TRUSTED_PROXIES", "10.0.0.1/8", "has host bits set"),
    ("TRUSTED_PROXIES", "127.0.0.1;::1", "must be addresses or networks"),
    ("CACHE_URL", "http://cache", "must start with redis://, rediss:// or unix://"),
    ("CACHE_URL", "cache:6379", "must start with redis://, rediss:// or unix://"),
    ("CACHE_URL", "redis://", "must name a host"),
    ("CACHE_URL", "redis:///0", "must name a host"),
    ("CACHE_URL", "redis://cache:port", "port from 1 to 65535"),
    ("CACHE_URL", "redis://cache:0", "redis://host:6379/0"),
    ("CACHE_URL", "redis://cache:70000", "port from 1 to 65535"),
    ("CACHE_URL", "redis://[::1", "must be a URL"),
    ("CACHE_URL", "redis://cache/first", "redis://host:6379/0"),
    ("CACHE_URL", "unix://", "must name a socket"),
    ("CACHE_URL", "redis://cache?family=0", "the option 'family' is not allowed"),
    ("CACHE_URL", "rediss://cache?ssl_cert_reqs=none", "the option 'ssl_cert_reqs' is not allowed"),
    ("CACHE_URL", "redis://cache?decode_responses=true", "the option 'decode_responses' is not allowed"),
    ("CACHE_URL", "redis://cache?sentinel=", "the option 'sentinel' is not allowed, or has no value; allowed are db"),
    ("CACHE_URL", "unix:///s?db=x", "the option 'db' must be a number"),
    ("QUEUE_URL", "amqp://queue", "must start with redis://, rediss:// or unix://"),
    ("QUEUE_URL", "redis://queue:port", "port from 1 to 65535"),
    ("HOST", "", "must be an address or a host name"),
    ("HOST", "a b", "must be an address or a host name"),
    ("HOST", "http://localhost", "must be an address or a host name"),
    ("PORT", "0", "from 1 to 65535"),
    ("PORT", "65536", "from 1 to 65535"),
    ("PORT", "8000.0", "whole number"),
    ("PORT", "-1", "whole number"),
    ("PORT", " 8000", "whole number"),
    ("PORT", "٨٠٠٠", "whole number"),
    ("PORT", "", "whole number"),
    ("API_KEYS", "a", "key 1 must be name:scope+scope:sha256hex"),
    ("API_KEYS", f"a:read:{DIGEST},b:read", "key 2 must be name:scope+scope:sha256hex"),
    ("API_KEYS", f":read:{DIGEST}", "the name must be"),
    ("API_KEYS", f"a b:read:{DIGEST}", "the name must be"),
    ("API_KEYS", f"{'a' * 65}:read:{DIGEST}", "the name must be"),
    ("API_KEYS", f"a:reed:{DIGEST}", "allowed are read, write, admin"),
    ("API_KEYS", f"a::{DIGEST}", "allowed are read, write, admin"),
    ("API_KEYS", f"a:read+:{DIGEST}", "allowed are read, write, admin"),
    ("API_KEYS", f"a:read:{DIGEST[1:]}", "64 lower-case hex digits"),
    ("API_KEYS", f"a:read:{DIGEST.upper()}", "64 lower-case hex digits"),
    ("API_KEYS", f"a:read:{DIGEST},a:write:{OTHER}", "the name is used twice"),
    ("API_KEYS", f"a:read:{DIGEST},b:admin:{DIGEST}", "another name has the same key"),
    ("RATE_LIMIT", "-1", "from 0 to 1000000"),
    ("RATE_LIMIT", "1.5", "whole number"),
    ("RATE_BURST", "1000001", "from 0 to 1000000"),
    ("DRAIN_S", "301", "from 0 to 300"),
    ("RETENTION_DAYS", "0", "from 1 to 36500"),
    ("RETENTION_DAYS", "half a year", "whole number"),
    ("DECISION_RETENTION_DAYS", "0", "from 1 to 36500"),
    ("REWARDS", "completed", "the reward of completed must be a number from 0 to 1"),
    ("REWARDS", "completed=1.1", "the reward of completed must be a number from 0 to 1"),
    ("REWARDS", "snoozed=-0.1", "the reward of snoozed must be a number from 0 to 1"),
    ("REWARDS", "none=nan", "the reward of none must be a number from 0 to 1"),
    ("REWARDS", "none=1e-1", "the reward of none must be a number from 0 to 1"),
    ("REWARDS", "none=0,none=1", "none is given twice"),
    ("REWARD_WINDOW_HOURS", "0", "from 1 to 720"),
    ("SHADOW", "on", "must be 0 or 1"),
    ("ROLLOUT_MARGIN", "-0.1", "must be a number from 0 to 1"),
    ("ROLLOUT_MARGIN", "2", "must be a number from 0 to 1"),
    ("ROLLOUT_MARGIN", "5%", "must be a number from 0 to 1"),
    ("ROLLOUT_GUARDRAILS", "latency=1", "guardrails are dismissed, p99_ms, no_profile"),
    ("ROLLOUT_GUARDRAILS", "dismissed", "dismissed must be a number from 0 to 1"),
    ("ROLLOUT_GUARDRAILS", "no_profile=nan", "no_profile must be a number from 0 to 1"),
    ("ROLLOUT_GUARDRAILS", "p99_ms=0", "p99_ms must be a whole number of milliseconds"),
    ("ROLLOUT_GUARDRAILS", "p99_ms=1,p99_ms=2", "p99_ms is given twice"),
    ("LOG_FORMAT", "xml", "must be one of console, json"),
    ("LOG_LEVEL", "INFO", "must be one of debug, info, warning, error"),
    ("CACHE_TIMEOUT_MS", "4", "from 5 to 60000"),
    ("LEASE_MS", "49", "from 50 to 600000"),
    ("READERS", "0", "from 1 to 64"),
    ("KEEP_ALIVE_S", "0", "from 1 to 3600"),
    ("QUEUE_NAME", "", "must be 1 to 100 of A-Z a-z 0-9 : _ . -"),
    ("QUEUE_NAME", "two words", "must be 1 to 100 of"),
    ("STATEMENT_TIMEOUT_MS", "49", "from 50 to 600000"),
    ("FEATURES", "features", "must be package.module:NAME or /path/features.py:NAME"),
    ("FEATURES", "shop.features:", "must be package.module:NAME"),
    ("FEATURES", "shop-features:REGISTRY", "must be package.module:NAME"),
    ("FEATURES", "/etc/features.txt:REGISTRY", "must be package.module:NAME"),
    ("NEAR_USERS", "-1", "from 0 to 10000000"),
    ("SESSION_HOURS", "0", "from 1 to 720"),
    ("AUDIT_USERS", "1001", "from 0 to 1000"),
    ("WORKER_METRICS_PORT", "65536", "from 0 to 65535"),
    ("EMBEDDED_CACHE_MB", "0", "from 1 to 1000000"),
    ("MODEL_URL", "models.example/v1", "must start with http:// or https://"),
    ("MODEL_URL", "ftp://models.example", "must start with http:// or https://"),
    ("MODEL_URL", "https://", "name a host"),
    ("MODEL_URL", "https://models.example:0/v1", "a port from 1"),
    ("MODEL_URL", "https://models.example:port/v1", "port from 1 to 65535"),
    ("MODEL_URL", "https://me:secret@models.example/v1", "set the key in PROFILES_MODEL_KEY"),
    ("MODEL_URL", "https://models.example/v1?key=secret", "without a query"),
    ("MODEL_URL", "https://models.example/v1#x", "or a fragment"),
    ("MODEL_URL", "https://models.example/a b", "must be ASCII"),
    ("MODEL", "a model", "ASCII characters without spaces"),
    ("MODEL", "m" * 201, "1 to 200"),
    ("MODEL_KEY", "sk secret", "ASCII characters without spaces"),
    ("MODEL_KEY", "sk\nsecret", "ASCII characters without spaces"),
    ("MODEL_CALLS", "0", "from 1 to 1000"),
    ("DEMO", "yes", "must be 0 or 1"),
    ("DEMO", "", "must be 0 or 1"),
]


def read(**variables: str) -> Settings:
    """Settings from variables named without their prefix."""
    return Settings.from_environment({f"PROFILES_{name}": value for name, value in variables.items()})


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_setting_is_read_when_its_value_is_allowed(name: str, text: str, value: object) -> None:
    assert getattr(read(**{name: text}), name.lower()) == value


@pytest.mark.parametrize(("name", "text", "allowed"), BAD)
def test_bad_value_is_refused_with_the_setting(name: str, text: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**{name: text})
    assert str(caught.value).startswith(f"PROFILES_{name}: ")
    assert allowed in str(caught.value)
    assert caught.value.setting == f"PROFILES_{name}"


def test_every_setting_is_tried_with_good_and_bad_values() -> None:
    names = {item.name.upper() for item in dataclasses.fields(Settings)}
    assert {name for name, _, _ in GOOD} == {name for name, _, _ in BAD} == names


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
    "text", ["top-secret", "a:top-secret:read", "a:read:top-secret", "a:read+top-secret:" + DIGEST]
)
def test_message_never_shows_a_misplaced_key(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(API_KEYS=text)
    assert "top-secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["redis://user:top-secret@cache:port", "redis://user:top-secret@[::1", "top-secret"])
def test_message_never_shows_a_password_when_a_url_is_wrong(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(CACHE_URL=text)
    assert "top-secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MODEL_URL", "https://me:top-secret@host"),
        ("MODEL_URL", "https://host/?key=top-secret"),
        ("MODEL_URL", "top-secret"),
        ("MODEL", "top-secret of a model"),
        ("MODEL_KEY", "top-secret \n"),
    ],
)
def test_message_never_shows_the_key_of_a_model(name: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**{name: text})
    assert "top-secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_message_shows_a_wrong_value_without_password() -> None:
    for name, text, shown in (
        ("PORT", "80O0", "(given: '80O0')"),
        ("HOST", "a b" * 100, f"(given: {('a b' * 100)[:80]!r})"),
        ("DATABASE", "postgresql://me:top-secret@host/db", "(given: 'postgresql://…@host/db')"),
    ):
        with pytest.raises(SettingsError) as caught:
            read(**{name: text})
        assert str(caught.value).endswith(shown)


def test_settings_do_not_show_passwords_and_keys() -> None:
    assert "top-secret" not in repr(read(CACHE_URL="redis://:top-secret@host", MODEL_URL="https://host/top-secret"))


def test_settings_do_not_show_the_key_of_a_model() -> None:
    assert "top-secret" not in repr(read(MODEL_KEY="top-secret"))


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (Settings(model="m"), "PROFILES_MODEL_URL"),
        (Settings(model_key="k"), "PROFILES_MODEL_URL"),
        (Settings(model_url="https://host/v1", model_key="k"), "PROFILES_MODEL"),
    ],
)
def test_start_is_refused_when_the_model_is_incomplete(settings: Settings, missing: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.require_whole_model()
    assert caught.value.setting == missing
    Settings().require_whole_model()
    Settings(model_url="https://host/v1", model="m").require_whole_model()


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
    Settings(decision_retention_days=4).require_decision_retention()
    Settings(decision_retention_days=33, reward_window_hours=720).require_decision_retention()
    for days, hours in ((3, 24), (4, 25), (32, 720)):
        with pytest.raises(SettingsError, match=f"PROFILES_DECISION_RETENTION_DAYS: must be at least {days + 1}"):
            Settings(decision_retention_days=days, reward_window_hours=hours).require_decision_retention()


def test_settings_never_change() -> None:
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]  # that is the point
    with pytest.raises(dataclasses.FrozenInstanceError):
        ApiKey("a", frozenset(), b"").name = "b"  # type: ignore[misc]  # that is the point


def test_every_setting_is_described_with_its_default() -> None:
    rows = {name: (default, text) for name, default, text in described()}
    assert list(rows) == [variable(item) for item in dataclasses.fields(Settings)]
    assert all(text.endswith(".") for _, text in rows.values())
    assert rows["PROFILES_PORT"][0] == "8000"
    assert rows["PROFILES_DEMO"][0] == "1"
    assert rows["PROFILES_CACHE_URL"][0] == rows["PROFILES_API_KEYS"][0] == ""
