"""Recipes: YAML files and `--set a.b=value` into frozen, strictly typed pydantic models.

A recipe may hold other recipes and frozen dataclasses. A key that is given replaces that key alone:
what is left out of a nested part keeps the default of the recipe that holds it.
"""

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names key, value and what would be right."""


class Recipe(BaseModel):
    """Base of all recipes: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_recipe(
    cls: type[AnyRecipe], path: str | Path | None, overrides: Sequence[str] = ()
) -> AnyRecipe:
    """Read a recipe, apply the overrides in order and check every key and type.

    path       YAML file; None takes the defaults
    overrides  `a.b=value`, the value is YAML: `steps=500`, `optimizer.decay_all=true`, `name=null`
    Raises RecipeError for a file that cannot be read, an unknown key, a wrong type or value.
    """
    where = "recipe" if path is None else f"recipe {path}"
    given: Mapping[str, object] = {} if path is None else _read(Path(path))
    for override in overrides:
        keys, value = _parse_override(override)
        given = _replaced(given, keys, value, override)
    given = _over_class_defaults(cls, given)
    try:
        text = json.dumps(given)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{where}: values must be text, numbers, true, false, null, lists or mappings: {error}"
        ) from error
    try:
        # From JSON, strict means: a list is a tuple and text is a path, but "5" is not a number.
        return cls.model_validate_json(text)
    except ValidationError as error:
        problems = dict.fromkeys(_explain(cls, given, detail) for detail in error.errors())
        raise RecipeError(f"{where}: " + "; ".join(problems)) from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the whole recipe, defaults filled in, as YAML that `load_recipe` reads back equal."""
    return yaml.dump(
        to_jsonable_python(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 3e-4 is a number, `no` and `off` are text; a key may stand only once."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  the parent's table is a class attribute too

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key!r} is not text"
            elif key in mapping:
                problem = f"the key {key!r} stands twice"
            else:
                mapping[key] = self.construct_object(value_node, deep=deep)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Only double quotes escape line separators, such as U+0085, that reading would fold.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


_EXPONENT = r"[eE][-+]?[0-9]+"
_SCALARS: list[tuple[str, str, list[str]]] = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(\.[0-9]+({_EXPONENT})?|[0-9]+(\.[0-9]*({_EXPONENT})?|{_EXPONENT}))",
        list("-+.0123456789"),
    ),
]
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
        )


def _read(path: Path) -> Mapping[str, object]:
    try:
        content = _parse(path.read_text(encoding="utf-8"), f"recipe {path}")
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} holds {_shown(content)}; it must be `key: value` lines")
    return content


def _parse(text: str, where: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise RecipeError(f"{where}{place}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


def _parse_override(override: str) -> tuple[list[str], object]:
    name, is_assigned, text = override.partition("=")
    keys = name.strip().split(".")
    if not is_assigned or not all(keys):
        raise RecipeError(f"{override!r} is not a setting; write key=value or part.key=value")
    return keys, _parse(text, f"the value of {override!r}")


def _replaced(
    given: Mapping[str, object], keys: list[str], value: object, override: str
) -> dict[str, object]:
    # A copy along the path: parts that a YAML alias shares must not change with it.
    key, *rest = keys
    if rest:
        part = given.get(key)
        if part is None:
            part = {}
        if not isinstance(part, dict):
            raise RecipeError(f"{override!r}: {key} is {_shown(part)}, which has no keys")
        value = _replaced(part, rest, value, override)
    return {**given, key: value}


def _over_class_defaults(cls: type[Recipe], given: Mapping[str, object]) -> dict[str, object]:
    full = dict(given)
    for name, field in cls.model_fields.items():
        part = given.get(name)
        if not isinstance(part, dict):
            continue
        if not field.is_required():
            full[name] = _over_default(field.get_default(call_default_factory=True), part)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Recipe):
            full[name] = _over_class_defaults(field.annotation, part)
    return full


def _over_default(default: object, given: Mapping[str, object]) -> Mapping[str, object]:
    if not (isinstance(default, Recipe) or is_dataclass(default)):
        return given
    full: dict[str, object] = to_jsonable_python(default)
    for key, value in given.items():
        full[key] = (
            _over_default(getattr(default, key, None), value) if isinstance(value, dict) else value
        )
    return full


def _explain(cls: type[Recipe], given: object, detail: ErrorDetails) -> str:
    # pydantic also puts the names of union members into the location; users know only their keys.
    path: list[str] = []
    for part in detail["loc"]:
        if isinstance(given, list):
            given = dict(enumerate(given))
        if isinstance(given, dict) and part in given:
            given = given[part]
            path.append(str(part))
    value = _shown(detail["input"])
    match detail["type"]:
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{'.'.join([*path, str(detail['loc'][-1])])} is missing"
        case "extra_forbidden" | "unexpected_keyword_argument":
            known = _keys_at(cls, path[:-1])
            close = get_close_matches(path[-1], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            return f"unknown key {'.'.join(path)} (value {value}); {hint}"
        case "value_error" | "assertion_error":
            reason = detail["msg"].partition(", ")[2]
            # A check over several keys says itself which of them disagree.
            return f"{'.'.join(path)}: {reason}" if path else reason
    return f"{'.'.join(path)} is {value}: {detail['msg'].replace('Input should', 'it should')}"


def _keys_at(cls: type, path: Sequence[str]) -> list[str]:
    kind: object = cls
    for key in path:
        hints = get_type_hints(kind) if isinstance(kind, type) else {}
        annotation = hints.get(key)
        options = [annotation, *get_args(annotation)]
        kind = next((option for option in options if _is_config_class(option)), None)
    if isinstance(kind, type):
        if issubclass(kind, BaseModel):
            return sorted(kind.model_fields)
        return sorted(getattr(kind, "__dataclass_fields__", {}))
    return []


def _is_config_class(kind: object) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
