"""Settings: frozen values read once at the edge from file, environment and command line, then passed down.

A service declares its settings as `Settings` structs, calls `load_settings` in its `main` and hands the parts
to whoever needs them; nothing else reads a file or the environment. Precedence: command line > environment >
file > default. What is unknown, of a wrong type or out of range is a `ConfigError` that names the dotted path
and the nearest valid key.

    class ServerSettings(Settings, frozen=True, kw_only=True):
        http: HttpSettings = HttpSettings(port=8084)
        log: LogSettings = LogSettings()

    parser = argparse.ArgumentParser(...)
    add_settings_arguments(parser)                     # --config FILE, --set dotted.key=value
    arguments = parser.parse_args(argv)
    settings = settings_from_arguments(ServerSettings, arguments, "RELAYRL_MODEL_REGISTRY", os.environ)
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import msgspec
from msgspec import Meta, inspect

from relayrl_shared.errors import ConfigError
from relayrl_shared.settings_types import (
    KeyPath,
    as_text,
    child_of,
    fields_of,
    leaf_paths,
    members,
    parse_text,
    struct_of,
    unknown_key,
)

S = TypeVar("S", bound="Settings")
Port = Annotated[int, Meta(ge=0, le=65535)]
"""A TCP port; 0 lets the system choose one where something binds."""
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

NO_OVERRIDES: Mapping[str, str] = MappingProxyType({})


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every settings struct; subclasses say `frozen=True, kw_only=True`.

    A rule across fields belongs in `__post_init__` and raises ValueError, which arrives as a ConfigError with
    the path.
    """

    standard_variables: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Field → a well-known environment variable that sets it too, below the service's own variables."""

    @classmethod
    def normalise(cls, raw: Any) -> Any:
        """Turns another way to write this struct into the tree of its fields; unchanged by default."""
        return raw


class Address(Settings, frozen=True, kw_only=True):
    """A ZMQ endpoint; may also be written `"host:port"` or `"tcp://host:port"`, and the port as a string."""

    host: str = "127.0.0.1"
    port: Port = 0

    @property
    def zmq(self) -> str:
        """The endpoint as ZMQ takes it, for binding and connecting."""
        return f"tcp://{self.host}:{self.port}"

    @classmethod
    def normalise(cls, raw: Any) -> Any:
        """Accepts `"[tcp://]host:port"` and a port in quotes."""
        if isinstance(raw, str) and ":" in raw:
            host, _, port = raw.removeprefix("tcp://").rpartition(":")
            raw = {"host": host, "port": port}
        if isinstance(raw, dict) and isinstance(raw.get("port"), str) and raw["port"].isdecimal():
            raw = {**raw, "port": int(raw["port"])}
        return raw

    @classmethod
    def parse(cls, text: str) -> Self:
        """The address in `"[tcp://]host:port"`. Raises ConfigError if it is none."""
        try:
            return msgspec.convert(cls.normalise(text), cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{text!r} is no address: write host:port ({error})") from error


class HttpSettings(Settings, frozen=True, kw_only=True):
    """Where a process serves its control plane."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Port = 0


class LogSettings(Settings, frozen=True, kw_only=True):
    """What is logged and how. `levels`: logger name → level, over `level`. `file` gets the same lines."""

    level: LogLevel = "info"
    levels: dict[str, LogLevel] = {}
    format: Literal["console", "json"] = "json"
    stderr: bool = True
    file: str | None = None


class TelemetrySettings(Settings, frozen=True, kw_only=True):
    """Traces leave only where an OTLP gRPC endpoint is set, such as `http://127.0.0.1:4317`."""

    otlp_endpoint: str | None = None

    standard_variables: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT"}
    )


def load_settings(
    cls: type[S],
    *,
    environment_prefix: str,
    file: Path | None = None,
    environment: Mapping[str, str] = NO_OVERRIDES,
    overrides: Mapping[str, str] = NO_OVERRIDES,
) -> S:
    """Settings of one service.

    Args:
        cls: the struct to fill.
        environment_prefix: with `RELAYRL_X`, the variable `RELAYRL_X__HTTP__PORT=1` sets `http.port`.
        file: JSON file, or None.
        environment: usually `os.environ`.
        overrides: dotted key → text, from the command line.

    Raises:
        ConfigError: if the file cannot be read, or a key is unknown, of a wrong type or out of range.
    """
    root = inspect.type_info(cls)
    tree = _struct_defaults(cls)
    if file is not None:
        _merge(tree, _checked(_read_tree(file), root, str(file)), root)
    for source, path, text in _assignments(cls, environment_prefix, environment, overrides):
        _assign(tree, root, path, text, source)
    return _convert(_checked(tree, root, "settings"), cls)


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--config FILE` and `--set dotted.key=value` (repeatable) to a service's command line."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON configuration file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="one setting by its dotted key, such as log.level=debug; over file and environment",
    )


def settings_from_arguments(
    cls: type[S], arguments: argparse.Namespace, environment_prefix: str, environment: Mapping[str, str]
) -> S:
    """`load_settings` with what `add_settings_arguments` parsed. Raises ConfigError like it."""
    return load_settings(
        cls,
        environment_prefix=environment_prefix,
        file=arguments.config,
        environment=environment,
        overrides=parse_overrides(arguments.overrides),
    )


def parse_overrides(pairs: Sequence[str]) -> dict[str, str]:
    """`["http.port=1"]` → `{"http.port": "1"}`. Raises ConfigError for a pair without `=`."""
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--set {pair}: write dotted.key=value")
    return dict(pair.split("=", 1) for pair in pairs)


def as_overrides(settings: Settings) -> dict[str, str]:
    """Every field as dotted key → text; `load_settings` with these overrides gives the same settings back."""
    tree: dict[str, Any] = {}
    for field in inspect.type_info(type(settings)).fields:  # type: ignore[attr-defined]
        value = getattr(settings, field.name)
        if isinstance(value, Settings):
            tree |= {f"{field.encode_name}.{key}": text for key, text in as_overrides(value).items()}
        else:
            tree[field.encode_name] = as_text(value, field.type)
    return tree


def as_environment(settings: Settings, environment_prefix: str) -> dict[str, str]:
    """Every field as environment variable → text; `load_settings` with it gives the same settings back."""
    prefix = _variable_prefix(environment_prefix)
    return {prefix + key.upper().replace(".", "__"): text for key, text in as_overrides(settings).items()}


def as_json(settings: Settings) -> bytes:
    """The settings as an indented JSON file that `load_settings` reads."""
    return msgspec.json.format(msgspec.json.encode(settings), indent=2)


def json_schema(cls: type[Settings]) -> dict[str, Any]:
    """The JSON Schema of a settings file; the file may name it under `$schema`."""
    schema = msgspec.json.schema(cls)
    for definition in schema.get("$defs", {}).values():
        definition.setdefault("additionalProperties", False)
    return schema


def valid_keys(cls: type[Settings]) -> list[str]:
    """Every dotted key that a file, a variable or `--set` may give."""
    return sorted(".".join(path) for path in leaf_paths(inspect.type_info(cls)))


# ---- reading ----------------------------------------------------------------------------------------------


def _read_tree(file: Path) -> dict[str, Any]:
    try:
        tree = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected one JSON object, got {type(tree).__name__}")
    tree.pop("$schema", None)
    return tree


def _struct_defaults(cls: type[Settings]) -> dict[str, Any]:
    """The defaults that are trees themselves, so that setting one key of them keeps the others."""
    tree: dict[str, Any] = {}
    for field in inspect.type_info(cls).fields:  # type: ignore[attr-defined]
        default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        if isinstance(default, (msgspec.Struct, dict)):
            tree[field.encode_name] = msgspec.to_builtins(default)
    return tree


def _merge(into: dict[str, Any], tree: dict[str, Any], node: inspect.Type) -> None:
    """Puts `tree` over `into`: structs field by field, everything else whole."""
    fields = fields_of(node)
    for key, value in tree.items():
        child = fields.get(key)
        if (
            child is not None
            and struct_of(child)
            and isinstance(value, dict)
            and isinstance(into.get(key), dict)
        ):
            _merge(into[key], value, child)
        else:
            into[key] = value


def _assignments(
    cls: type[Settings], prefix: str, environment: Mapping[str, str], overrides: Mapping[str, str]
) -> Iterator[tuple[str, KeyPath, str]]:
    """(source, path, text), weakest first: standard variables, own variables, overrides."""
    for path, variable in _standard_variables(cls):
        if variable in environment:
            yield variable, path, environment[variable]
    own = _variable_prefix(prefix)
    for variable in sorted(environment):
        if variable.startswith(own):
            yield variable, tuple(variable.removeprefix(own).lower().split("__")), environment[variable]
    for key, text in overrides.items():
        yield f"--set {key}", tuple(key.split(".")), text


def _standard_variables(cls: type[Settings], path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    for field, variable in cls.standard_variables.items():
        yield (*path, field), variable
    for name, node in fields_of(inspect.type_info(cls)).items():
        struct = struct_of(node)
        if struct is not None and issubclass(struct.cls, Settings):
            yield from _standard_variables(struct.cls, (*path, name))


def _variable_prefix(prefix: str) -> str:
    return prefix.removesuffix("__") + "__"


def _assign(tree: dict[str, Any], root: inspect.Type, path: KeyPath, text: str, source: str) -> None:
    node: inspect.Type = root
    for depth, key in enumerate(path):
        child = child_of(node, key)
        if child is None:
            raise ConfigError(unknown_key(path[: depth + 1], root, source))
        node = child
        if depth < len(path) - 1:
            tree = _descend(tree, key)
    tree[path[-1]] = parse_text(text, node)


def _descend(tree: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(tree.get(key), dict):
        tree[key] = {}
    child: dict[str, Any] = tree[key]
    return child


# ---- checking ---------------------------------------------------------------------------------------------


def _checked(tree: Any, root: inspect.Type, source: str) -> Any:
    """The tree with every other way of writing resolved. Raises ConfigError that lists all unknown keys."""
    problems: list[str] = []
    tree = _walk(tree, root, (), lambda path: problems.append(unknown_key(path, root, source)))
    if problems:
        raise ConfigError("\n".join(problems))
    return tree


def _walk(tree: Any, node: inspect.Type, path: KeyPath, report: Any) -> Any:
    struct = struct_of(node)
    if struct is not None:
        if issubclass(struct.cls, Settings):
            tree = struct.cls.normalise(tree)
        return _walk_struct(tree, node, path, report) if isinstance(tree, dict) else tree
    for member in members(node):
        if isinstance(member, inspect.DictType) and isinstance(tree, dict):
            return {key: _walk(value, member.value_type, (*path, key), report) for key, value in tree.items()}
        if isinstance(member, (inspect.ListType, inspect.VarTupleType)) and isinstance(tree, (list, tuple)):
            return [_walk(value, member.item_type, (*path, str(i)), report) for i, value in enumerate(tree)]
    return tree


def _walk_struct(tree: dict[str, Any], node: inspect.Type, path: KeyPath, report: Any) -> dict[str, Any]:
    fields = fields_of(node)
    for key in tree.keys() - fields.keys():
        report((*path, key))
    return {
        key: _walk(value, fields[key], (*path, key), report) for key, value in tree.items() if key in fields
    }


_PLACE = re.compile(r"^(?P<what>.*?) - at `(?P<place>[^`]*)`$", re.DOTALL)


def _convert(tree: Any, cls: type[S]) -> S:
    try:
        return msgspec.convert(tree, cls)
    except msgspec.ValidationError as error:
        found = _PLACE.match(str(error))
        place = found["place"].removeprefix("$").removeprefix(".") if found else ""
        what = found["what"] if found else str(error)
        raise ConfigError(f"{place or 'settings'}: {what}{_shown(tree, place)}") from error


def _shown(tree: Any, place: str) -> str:
    for key in filter(None, place.split(".")):
        if not isinstance(tree, dict) or key not in tree:
            return ""
        tree = tree[key]
    return f" (it is {tree!r})" if place and not isinstance(tree, dict) else ""
