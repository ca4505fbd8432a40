"""Conditions on what is known of images: `width>=300`, `caption~dog`, `source=web`."""

import json
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from openblip.search.index import Index

FIELDS = ("key", "address", "num_bytes", "width", "height", "caption")
"""Fields of every image; others are those of its data set."""

_CONDITION = re.compile(r"\s*([^=<>~!\s][^=<>~!]*?)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def matching(index: Index, conditions: Sequence[str]) -> NDArray[np.bool_]:
    """Return which of all R rows of an index fulfil all conditions.

    conditions  a field, one of = != < <= > >= ~ and a value; ~ is "contains", whatever the case.
                Two numbers are compared as numbers, all else as text
    An image without a field fulfils no condition on it.
    Raises ValueError for what is no condition, and for a field that no image has.
    """
    fulfilled = np.ones(index.num_rows, dtype=np.bool_)
    for condition in conditions:
        found = _CONDITION.fullmatch(condition)
        if found is None:
            raise ValueError(
                f"{condition!r} is no condition: expected a field, one of = != < <= > >= ~, and a "
                "value, as width>=300"
            )
        name, sign, value = found.groups()
        if name in FIELDS:
            fulfilled &= _of_column(index.column(name), sign, value)
        else:
            fulfilled &= _of_meta(index, name, sign, value)
    return fulfilled


def _of_column(column: pa.ChunkedArray, sign: str, value: str) -> NDArray[np.bool_]:
    if sign == "~":
        text = pc.cast(column, pa.string())
        return np.asarray(pc.match_substring(text, value, ignore_case=True).to_numpy(), np.bool_)
    number = _number(value)
    if pa.types.is_integer(column.type):
        if number is None:
            raise ValueError(f"{value!r} is no number to compare with")
        values = column.to_numpy()
        return np.asarray(_COMPARED[sign](values, number), np.bool_)
    texts = np.asarray(column.to_pylist(), dtype=object)
    return np.asarray(_COMPARED[sign](texts, value), np.bool_)


def _of_meta(index: Index, name: str, sign: str, value: str) -> NDArray[np.bool_]:
    number = _number(value)
    found = np.zeros(index.num_rows, dtype=np.bool_)
    known: set[str] = set()
    is_known = False
    for row, text in enumerate(index.column("meta").to_pylist()):
        fields = json.loads(text)
        if name not in fields:
            known.update(fields)
            continue
        is_known = True
        own = fields[name]
        if sign == "~":
            found[row] = value.casefold() in str(own).casefold()
        elif number is not None and isinstance(own, int | float):
            found[row] = _COMPARED[sign](own, number)
        else:
            found[row] = _COMPARED[sign](str(own), value)
    if not is_known:
        shown = ", ".join([*FIELDS, *sorted(known)[:20]])
        raise ValueError(f"no image has a field {name!r}; there are {shown}")
    return found


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
