"""Results as JSON values, and their JSON Schema: both are derived from the dataclasses of `results`."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from smolexport.parity.results import Comparison, Estimate

_NUMBER = {"type": ["number", "null"]}  # null: not finite
_TYPES: Mapping[object, Any] = {
    str: {"type": "string"},
    Path: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: _NUMBER,
    object: {},
}


def to_json(value: object) -> Any:
    """Plain JSON values: an object for a dataclass or mapping, an array for a sequence, None for NaN and infinities.

    Anything else, such as a path, becomes its text.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_json(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(part) for part in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return str(value)
    found: dict[str, Any] = {}
    for name, _, _, inline in _members(type(value)):
        part = getattr(value, name)
        if isinstance(part, Estimate):
            found |= {name: to_json(part.value), f"{name}_error": to_json(part.error)}
        elif inline:
            found |= to_json(part)
        else:
            found[name] = to_json(part)
    return found


def json_schema(result: type = Comparison) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what `to_json` makes of an instance of the dataclass `result`."""
    definitions: dict[str, Any] = {}
    _schema_of(result, definitions)
    root = definitions.pop(result.__name__)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


@cache
def _members(kind: type) -> list[tuple[str, Any, dict[str, Any], bool]]:
    """Fields and public properties: name, type, keywords of the schema, and whether its members go into the object."""
    hints = get_type_hints(kind, include_extras=True)
    found = [
        (field.name, *_annotated(hints[field.name]), field.metadata.get("inline", False))
        for field in dataclasses.fields(kind)
        if not field.metadata.get("hidden")
    ]
    for name, value in vars(kind).items():
        if isinstance(value, property) and not name.startswith("_"):
            hint, about = _annotated(get_type_hints(value.fget, include_extras=True)["return"])
            found.append((name, hint, {**about, "description": inspect.getdoc(value)}, False))
    return found


def _annotated(hint: Any) -> tuple[Any, dict[str, Any]]:
    """The type that a hint annotates, and the keywords of the schema that it adds: limits, then its description."""
    if get_origin(hint) is not Annotated:
        return hint, {}
    plain, *more = get_args(hint)
    return plain, dict(("description", one) if isinstance(one, str) else one for one in more)


def _object_schema(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, hint, about, inline in _members(kind):
        if inline:
            properties |= _object_schema(hint, definitions)["properties"]
        elif hint is Estimate:
            properties[name] = _NUMBER | about
            properties[f"{name}_error"] = {**_NUMBER, "minimum": 0, "description": "Standard error."}
        else:
            properties[name] = _schema_of(hint, definitions) | about
    summary = (inspect.getdoc(kind) or "").partition("\n\n")[0]
    return {
        "description": " ".join(summary.split()),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _schema_of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hint, about = _annotated(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = _object_schema(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is Literal:
        return {"const": arguments[0]}
    if origin in (Union, types.UnionType):
        return _nullable(_schema_of(next(part for part in arguments if part is not type(None)), definitions))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], definitions)}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": _schema_of(arguments[0], definitions)}
    return {**_TYPES[hint], **about}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if "type" not in schema:
        return {"oneOf": [{"type": "null"}, schema]}
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return schema | {"type": list(dict.fromkeys([*kinds, "null"]))}
