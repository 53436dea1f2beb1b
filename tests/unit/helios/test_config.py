import pytest

from helios.config import load
from helios.errors import UsageError


def environ(tmp_path, **more):
    return {"HELIOS_HOME": str(tmp_path), **more}


def test_flags_beat_the_environment_which_beats_the_file_which_beats_defaults(tmp_path):
    (tmp_path / "helios.toml").write_text("[router]\nport = 1\nhost = '::1'\nhealth_interval_s = 9\n")
    env = environ(tmp_path, HELIOS_ROUTER__PORT="2", HELIOS_ROUTER__HEALTH_INTERVAL_S="3.5")
    config = load(env, {"router": {"port": 3, "host": None}})
    assert (config.router.port, config.router.host, config.router.health_interval_s) == (3, "::1", 3.5)
    assert config.router.max_body_mib == 64


def test_workers_come_from_the_file(tmp_path):
    (tmp_path / "helios.toml").write_text('[[router.workers]]\nmodel = "m"\nurl = "http://x"\nrole = "decode"\n')
    assert load(environ(tmp_path)).router.workers[0].role == "decode"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[router]\nprot = 1\n", "did you mean 'port'"),
        ("[rooter]\nport = 1\n", "did you mean 'router'"),
        ("[[router.workers]]\nmodel = 'm'\nurl = 'u'\nrol = 'both'\n", "rol"),
        ("[router]\nport = 'many'\n", "router.port"),
        ("[router]\nport = \n", "not valid TOML"),
        ("router = 3\n", "is a section"),
        ("[log]\nlevel = 'loud'\n", "loud"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_key(tmp_path, text, named):
    (tmp_path / "helios.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load(environ(tmp_path))
    assert named in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_variable_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"router\.prot"):
        load(environ(tmp_path, HELIOS_ROUTER__PROT="1"))


def test_variables_that_kubernetes_injects_for_a_service_are_no_settings(tmp_path):
    env = environ(tmp_path, HELIOS_ROUTER_PORT="tcp://10.0.0.1:80", HELIOS_REGISTRY_SERVICE_HOST="10.0.0.2")
    assert load(env).router.port == 8480


def test_lists_in_the_environment(tmp_path):
    assert load(environ(tmp_path, HELIOS_REGISTRY__URLS="http://a, http://b")).registry.urls == ["http://a", "http://b"]
    assert load(environ(tmp_path, HELIOS_REGISTRY__URLS='["http://a"]')).registry.urls == ["http://a"]
    with pytest.raises(UsageError, match="HELIOS_REGISTRY__URLS"):
        load(environ(tmp_path, HELIOS_REGISTRY__URLS="[oops"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("URLS", "http://good:8470,http://bob:TellNobody@reg:8470"),
        ("UPSTREAM", "https://bob:TellNobody@hub.example/x"),
        ("UPSTREAM", "https://bob:Tell/Nobody@hub.example/x"),
        ("ADVERTISE", "http://TellNobody@reg:8470"),
        ("PEERS", '[{"name": "core", "url": "http://bob:TellNobody@core:8470"}]'),
        ("STORE_OPTIONS", '{"endpoint": "http://key:TellNobody@minio:9000"}'),
    ],
)
def test_addresses_with_credentials_are_refused_without_repeating_them(tmp_path, key, value):
    """Whatever fails later would show the address; and what is in it would be sent nowhere."""
    with pytest.raises(UsageError, match="has a user name or a password in it") as caught:
        load(environ(tmp_path, **{f"HELIOS_REGISTRY__{key}": value}))
    assert "Nobody" not in f"{caught.value} {caught.value.hint}"


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.toml"):
        load(environ(tmp_path, HELIOS_CONFIG=str(tmp_path / "nothing.toml")))
