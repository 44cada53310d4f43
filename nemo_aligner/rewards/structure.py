"""Rewards for responses that are data: JSON that fits a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from nemo_aligner.extras import install

try:
    from jsonschema.validators import validator_for
    from referencing import Registry
except ImportError as fault:
    raise ImportError(f"{fault}; {install('json')}") from None

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)


def json_schema(responses: Sequence[str], schema: Any) -> list[float | None]:
    """1 where the response is one JSON value that fits `schema`, alone or in one code fence; else 0.

    `schema` is a JSON Schema for all (`arguments`), or the row's own field; None there: cannot tell. A reference to
    another document is not fetched. Raises jsonschema's SchemaError for a schema that is none.
    """
    schemas = schema if isinstance(schema, list) else [schema] * len(responses)
    return [
        None if own is None else float(_fits(response, own)) for response, own in zip(responses, schemas, strict=True)
    ]


def _fits(response: str, schema: Any) -> bool:
    kind = validator_for(schema)
    kind.check_schema(schema)
    fenced = _FENCED.fullmatch(response)
    try:
        value = json.loads(fenced[1] if fenced else response, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return bool(kind(schema, registry=Registry()).is_valid(value))


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
