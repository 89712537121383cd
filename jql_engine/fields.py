"""Decoded JSON -> dataclasses, with the type of every field checked."""

from __future__ import annotations

import sys
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NAMES = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false", types.NoneType: "null"}
LARGEST = sys.float_info.max


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`: a dataclass, list[...], dict[str, ...], Literal, a union, or a type of JSON itself.

    `where` names the value. Raises ValueError where a field is missing or of another type, and ignores unknown ones; a
    float may be given as an integer, and is finite. What a dataclass raises of itself comes out as it is.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _dataclass(kind, _expect(dict, "an object", value, where), where)
    if origin in (Union, types.UnionType):
        return _any_of(arguments, value, where)
    if origin is list:
        items = _expect(list, "a list", value, where)
        return [decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items)]
    if origin is dict:
        items = _expect(dict, "an object", value, where)
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in items.items()}
    if origin is Literal:
        return _any_of(arguments, value, where)
    if kind is float:
        return _finite(value, where)
    return _expect(kind, NAMES[kind], value, where)


def _dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    known, hints = {field.name: field for field in fields(kind)}, get_type_hints(kind)
    required = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    given = {name: item for name, item in value.items() if name in known}  # others are of later versions
    return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in given.items()})


def _any_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Of a union its first member that fits; of a Literal the value itself."""
    kinds = tuple(member for kind in kinds for member in (get_args(kind) if get_origin(kind) is Literal else [kind]))
    for kind in kinds:
        if isinstance(kind, type):
            if type(value) is kind or (kind is float and type(value) is int):
                return decode(kind, value, where)
        elif value == kind and type(value) is type(kind):
            return value
    expected = " or ".join(NAMES.get(kind) or repr(kind) for kind in kinds)
    raise ValueError(f"{where} is {_shown(value)}, expected {expected}")


def _finite(value: Any, where: str) -> Any:
    if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:  # of NaN nothing is true
        raise ValueError(f"{where} is {_shown(value)}, expected a finite number")
    return value


def _expect(kind: type, name: str, value: Any, where: str) -> Any:
    if type(value) is not kind:  # True is no integer here
        raise ValueError(f"{where} is {_shown(value)}, expected {name}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
