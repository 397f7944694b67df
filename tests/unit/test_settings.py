"""Settings: precedence, strictness, and that any valid tree reads back from file, environment and command."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import Meta

from relayrl_shared import settings as module
from relayrl_shared.errors import ConfigError
from relayrl_shared.settings import (
    Address,
    HttpSettings,
    LogSettings,
    Settings,
    TelemetrySettings,
    load_settings,
)

PREFIX = "RELAYRL_EXAMPLE"


class Limits(Settings, frozen=True, kw_only=True):
    """Nested, with a rule across fields."""

    soft: int = 1
    hard: int = 10

    def __post_init__(self) -> None:
        """The soft limit stays below the hard one."""
        if self.soft > self.hard:
            raise ValueError(f"soft {self.soft} is above hard {self.hard}; lower soft")


class Example(Settings, frozen=True, kw_only=True):
    """One field of every kind that services use."""

    http: HttpSettings = HttpSettings(port=8084)
    listener: Address = Address(port=7777)
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    limits: Limits = Limits()
    rate: Annotated[float, Meta(ge=0)] = 0.5
    enabled: bool = False
    strict: bool | None = None
    directory: str = "data"
    title: str | None = None
    workers: int | None = None
    mode: Literal["block", "free"] = "block"
    hyperparameters: dict[str, Any] = msgspec.field(default_factory=lambda: {"gamma": 0.99})
    policies: tuple[str, ...] = ()
    peers: tuple[Address, ...] = ()

    extra: ClassVar[MappingProxyType[str, str]] = MappingProxyType({})


def load(file: Path | None = None, environment: dict[str, str] | None = None, **overrides: str) -> Example:
    dotted = {key.replace("__", "."): text for key, text in overrides.items()}
    return load_settings(
        Example, environment_prefix=PREFIX, file=file, environment=environment or {}, overrides=dotted
    )


def load_one(key: str, text: str) -> Example:
    return load_settings(Example, environment_prefix=PREFIX, overrides={key: text})


def write(directory: Path, tree: object) -> Path:
    file = directory / "config.json"
    file.write_bytes(msgspec.json.encode(tree))
    return file


# ---- round trips ------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
ADDRESSES = st.builds(Address, host=TEXT, port=st.integers(0, 65535))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=6,
)
EXAMPLES = st.builds(
    Example,
    http=st.builds(HttpSettings, enabled=st.booleans(), host=TEXT, port=st.integers(0, 65535)),
    listener=ADDRESSES,
    log=st.builds(
        LogSettings, file=st.none() | TEXT, levels=st.dictionaries(TEXT, st.just("debug"), max_size=2)
    ),
    limits=st.builds(Limits, soft=st.integers(-5, 5), hard=st.integers(5, 9)),
    rate=st.floats(0, 1e300),
    enabled=st.booleans(),
    directory=TEXT,
    title=st.none() | TEXT | st.sampled_from(["null", "5", "true", '"quoted"', "{}", "[]"]),
    workers=st.none() | st.integers(-(2**53), 2**53),
    mode=st.sampled_from(["block", "free"]),
    hyperparameters=st.dictionaries(TEXT, VALUES, max_size=3),
    policies=st.lists(TEXT, max_size=3).map(tuple),
    peers=st.lists(ADDRESSES, max_size=2).map(tuple),
)
ROUND_TRIP = hypothesis_settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ROUND_TRIP
@given(example=EXAMPLES)
def test_any_settings_read_back_from_a_file(example: Example, tmp_path: Path) -> None:
    """What `as_json` writes is what `load_settings` reads."""
    file = tmp_path / "config.json"
    file.write_bytes(module.as_json(example))

    assert load(file) == example


@ROUND_TRIP
@given(example=EXAMPLES)
def test_any_settings_read_back_from_the_environment(example: Example) -> None:
    """What `as_environment` writes is what `load_settings` reads."""
    assert load(environment=module.as_environment(example, PREFIX)) == example


@ROUND_TRIP
@given(example=EXAMPLES)
def test_any_settings_read_back_from_the_command_line(example: Example) -> None:
    """What `as_overrides` writes is what `load_settings` reads, through the real argument parser."""
    parser = argparse.ArgumentParser()
    module.add_settings_arguments(parser)
    arguments = parser.parse_args(
        [part for key, text in module.as_overrides(example).items() for part in ("--set", f"{key}={text}")]
    )

    assert module.settings_from_arguments(Example, arguments, PREFIX, {}) == example


# ---- precedence -------------------------------------------------------------------------------------------


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    """Each source wins over all weaker ones, key by key."""
    file = write(tmp_path, {"http": {"port": 1, "host": "file"}, "rate": 0.1, "directory": "file"})
    environment = {f"{PREFIX}__HTTP__PORT": "2", f"{PREFIX}__RATE": "0.2"}

    loaded = load(file, environment, http__port="3")

    assert (loaded.http.port, loaded.rate, loaded.http.host, loaded.directory) == (3, 0.2, "file", "file")
    assert loaded.http.enabled is True


def test_one_key_of_a_fragment_keeps_the_defaults_of_the_others() -> None:
    """A default port of the service survives when only the host is set."""
    assert load(listener__host="0.0.0.0").listener == Address(host="0.0.0.0", port=7777)


def test_the_standard_variable_of_opentelemetry_sets_the_endpoint_below_our_own() -> None:
    """OTEL_EXPORTER_OTLP_ENDPOINT counts unless the service's own variable says otherwise."""
    standard = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://standard:4317"}
    own = {f"{PREFIX}__TELEMETRY__OTLP_ENDPOINT": "http://own:4317"}

    assert load(environment=standard).telemetry.otlp_endpoint == "http://standard:4317"
    assert load(environment=standard | own).telemetry.otlp_endpoint == "http://own:4317"


def test_variables_of_others_are_left_alone() -> None:
    """Only variables under the service's prefix count, so two services can share an environment."""
    assert load(environment={"RELAYRL_EXAMPLE2__FOO": "1", "PATH": "/bin"}) == Example()


# ---- other ways to write a value --------------------------------------------------------------------------


@pytest.mark.parametrize("raw", ["tcp://10.0.0.1:9", "10.0.0.1:9", {"host": "10.0.0.1", "port": "9"}])
def test_an_address_has_several_spellings(tmp_path: Path, raw: object) -> None:
    """A string with or without scheme, and a port in quotes as the original's files have it."""
    address = load(write(tmp_path, {"listener": raw})).listener

    assert (address, address.zmq) == (Address(host="10.0.0.1", port=9), "tcp://10.0.0.1:9")


def test_an_address_can_be_overridden_whole_or_in_part(tmp_path: Path) -> None:
    """`--set listener=host:port` replaces both, a key below it only that one, also over a file's string."""
    file = write(tmp_path, {"listener": "a:1"})

    assert load(file, listener="b:2").listener == Address(host="b", port=2)
    assert load(file, listener__port="3").listener == Address(host="a", port=3)


def test_a_spelling_that_is_no_address_says_how_to_write_one() -> None:
    """`Address.parse` names the text and the form."""
    with pytest.raises(ConfigError, match=r"'nowhere' is no address: write host:port"):
        Address.parse("nowhere")


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False)])
def test_booleans_are_read_as_shells_write_them(text: str, value: bool) -> None:
    """JSON's spelling and a capital letter."""
    assert load(enabled=text).enabled is value
    assert load(strict=text).strict is value


@pytest.mark.parametrize(
    ("text", "value"),
    [("null", None), ('"null"', "null"), ("5", "5"), ('{"a": 1}', '{"a": 1}'), ("plain", "plain")],
)
def test_optional_text_is_text_unless_it_is_null_or_quoted(text: str, value: str | None) -> None:
    """A title of digits stays a title."""
    assert load(title=text).title == value


def test_keys_below_a_free_form_dictionary_are_added_to_its_default() -> None:
    """Hyperparameters can be set one by one, as numbers where they read as such."""
    loaded = load(hyperparameters__pi_lr="3e-4", hyperparameters__activation="tanh")

    assert loaded.hyperparameters == {"gamma": 0.99, "pi_lr": 3e-4, "activation": "tanh"}


def test_a_file_may_name_its_schema(tmp_path: Path) -> None:
    """`$schema` is for editors and is no setting."""
    assert load(write(tmp_path, {"$schema": "./example.schema.json", "rate": 1.5})).rate == 1.5


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("htp", "http"), ("http.prt", "http.port"), ("port", "http.port"), ("limits.sotf", "limits.soft")],
)
def test_an_unknown_key_is_named_with_the_nearest_one(key: str, nearest: str) -> None:
    """Siblings first, else the same word elsewhere in the tree."""
    with pytest.raises(ConfigError, match=rf"--set {key}: unknown key '{key}'; did you mean '{nearest}'\?"):
        load_one(key, "1")


def test_all_unknown_keys_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    """The message lists each with the file's name."""
    file = write(tmp_path, {"htp": {}, "log": {"lvl": "info"}, "rate": 1.0})

    with pytest.raises(ConfigError) as caught:
        load(file)

    assert f"{file}: unknown key 'htp'" in str(caught.value)
    assert "unknown key 'log.lvl'; did you mean 'log.level'?" in str(caught.value)


def test_an_unknown_variable_under_our_prefix_is_refused() -> None:
    """A misspelt variable is never ignored."""
    with pytest.raises(ConfigError, match=r"unknown key 'http.prot'; did you mean 'http.port'\?"):
        load(environment={f"{PREFIX}__HTTP__PROT": "1"})


def test_unknown_keys_inside_lists_are_found(tmp_path: Path) -> None:
    """The path has the index of the element."""
    with pytest.raises(ConfigError, match=r"unknown key 'peers.1.prt'"):
        load(write(tmp_path, {"peers": ["a:1", {"prt": 2}]}))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("http.port", "99999", r"http.port: Expected `int` <= 65535 \(it is 99999\)"),
        ("http.port", "eighty", r"http.port: Expected `int`, got `str` \(it is 'eighty'\)"),
        ("rate", "-1", r"rate: Expected `float` >= 0.0"),
        ("mode", "blok", r"mode: Invalid enum value 'blok'"),
        ("limits.soft", "11", r"limits: soft 11 is above hard 10; lower soft"),
        ("http", "x", r"http: Expected `object`, got `str`"),
    ],
)
def test_a_value_of_a_wrong_type_or_range_is_named_with_its_path(key: str, text: str, message: str) -> None:
    """The message has the dotted path, what was expected and what was found."""
    with pytest.raises(ConfigError, match=message):
        load_one(key, text)


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not JSON"), (b"[]", "expected one JSON object, got list")]
)
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Truncated and wrong files are told apart."""
    file = tmp_path / "config.json"
    file.write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        load(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    """A configuration that was asked for is never silently absent."""
    with pytest.raises(ConfigError, match=r"cannot read .*absent.json: No such file"):
        load(tmp_path / "absent.json")


def test_an_override_without_an_equals_sign_is_refused() -> None:
    """The message shows the form."""
    with pytest.raises(ConfigError, match=r"--set rate: write dotted.key=value"):
        module.parse_overrides(["rate"])


# ---- schema -----------------------------------------------------------------------------------------------


def test_the_json_schema_lists_every_field_and_forbids_others() -> None:
    """Editors complete from it, and refuse what `load_settings` refuses."""
    schema = module.json_schema(Example)

    definition = schema["$defs"]["Example"]
    assert set(definition["properties"]) == set(Example.__struct_fields__)
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


def test_valid_keys_are_dotted_leaves() -> None:
    """They are what the command line takes."""
    keys = module.valid_keys(Example)

    assert {"http.port", "limits.hard", "hyperparameters", "telemetry.otlp_endpoint"} <= set(keys)
    assert "http" not in keys
