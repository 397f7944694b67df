"""What the types of settings say: their keys, what a text means for them, and which key was meant.

Knows msgspec's type descriptions only; `settings` drives it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import NoneType
from typing import Any

import msgspec
from msgspec import inspect

KeyPath = tuple[str, ...]


def members(node: inspect.Type) -> tuple[inspect.Type, ...]:
    """The alternatives of a union; the type itself where it is none."""
    if isinstance(node, inspect.Metadata):
        return members(node.type)
    return node.types if isinstance(node, inspect.UnionType) else (node,)


def struct_of(node: inspect.Type) -> inspect.StructType | None:
    """The struct that the type is, or may be."""
    return next((member for member in members(node) if isinstance(member, inspect.StructType)), None)


def is_text(node: inspect.Type) -> bool:
    """Whether every value of the type is a string, so that a text needs no quotes."""
    return all(
        isinstance(member, inspect.StrType)
        or (isinstance(member, inspect.LiteralType) and all(isinstance(v, str) for v in member.values))
        for member in members(node)
    )


def is_optional_text(node: inspect.Type) -> bool:
    """Whether anything but `null` and a quoted string can only be meant as text, as `5` for `str | None`."""
    return all(isinstance(member, (inspect.StrType, inspect.NoneType)) for member in members(node))


def fields_of(node: inspect.Type) -> dict[str, inspect.Type]:
    """Key → type of a struct; empty for every other type."""
    struct = struct_of(node)
    return {field.encode_name: field.type for field in struct.fields} if struct else {}


def child_of(node: inspect.Type, key: str) -> inspect.Type | None:
    """The type below a key, None if there is no such key."""
    if struct_of(node) is not None:
        return fields_of(node).get(key)
    for member in members(node):
        if isinstance(member, inspect.DictType):
            return member.value_type
        if isinstance(member, inspect.AnyType):
            return member
    return None


def leaf_paths(node: inspect.Type, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of all keys that are no struct themselves."""
    for name, child in fields_of(node).items():
        if struct_of(child):
            yield from leaf_paths(child, (*path, name))
        else:
            yield (*path, name)


def parse_text(text: str, node: inspect.Type) -> Any:
    """Text of a variable or `--set` → value: as JSON where the type wants that, else the text itself."""
    if is_text(node) or (struct_of(node) is not None and not text.lstrip().startswith("{")):
        return text
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return _parse_loosely(text, node)
    return value if isinstance(value, (str, NoneType)) or not is_optional_text(node) else text


def _parse_loosely(text: str, node: inspect.Type) -> Any:
    """`True` for a bool, as shells and YAML files write it; everything else stays text."""
    takes_bool = any(isinstance(member, inspect.BoolType) for member in members(node))
    if takes_bool and text.lower() in {"true", "false"}:
        return text.lower() == "true"
    return text


def as_text(value: Any, node: inspect.Type) -> str:
    """The text that `parse_text` turns back into the value."""
    return str(value) if is_text(node) else msgspec.json.encode(value).decode()


def unknown_key(path: KeyPath, root: inspect.Type, source: str) -> str:
    """The message for a key that is not there."""
    dotted = ".".join(path)
    nearest = nearest_key(path, root)
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    return f"{source}: unknown key '{dotted}'{hint}"


def nearest_key(path: KeyPath, root: inspect.Type) -> str | None:
    """A sibling that is spelt alike, else the key anywhere whose last part or whole path is nearest."""
    node: inspect.Type | None = root
    for key in path[:-1]:
        node = child_of(node, key) if node is not None else None
    siblings = difflib.get_close_matches(
        path[-1], fields_of(node) if node is not None else (), n=1, cutoff=0.6
    )
    if siblings:
        return ".".join((*path[:-1], siblings[0]))
    everywhere = {".".join(candidate): candidate for candidate in leaf_paths(root)}
    same_name = [dotted for dotted, parts in everywhere.items() if parts[-1] == path[-1]]
    return next(
        iter(same_name or difflib.get_close_matches(".".join(path), everywhere, n=1, cutoff=0.0)), None
    )
