"""A response is JSON of a schema, or it is not."""

from __future__ import annotations

import pytest

pytest.importorskip("jsonschema", reason="the extra [json] is not installed")

from jsonschema.exceptions import SchemaError

from nemo_aligner.rewards.structure import json_schema

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def test_json_that_fits_its_schema_is_worth_one_also_in_a_fence() -> None:
    right = ['{"n": 1}', ' {"n": -2}\n', '```json\n{"n": 3}\n```', '```\n{"n":\n4}\n```']
    wrong = ['{"n": "1"}', "{}", '{"n": 1, "m": 2}', '{"n": 1', 'so: {"n": 1}', "", "null", '{"n": NaN}', "[" * 100_000]
    assert json_schema(right, SCHEMA) == [1.0] * 4
    assert json_schema(wrong, SCHEMA) == [0.0] * len(wrong)


def test_each_row_may_have_a_schema_of_its_own_or_none() -> None:
    assert json_schema(["1", "1", "1"], [{"type": "integer"}, {"type": "string"}, None]) == [1.0, 0.0, None]


def test_what_is_no_schema_is_an_error_and_no_other_document_is_fetched() -> None:
    with pytest.raises(SchemaError):
        json_schema(["1"], {"type": "number of things"})
    with pytest.raises(Exception, match=r"Unresolvable"):
        json_schema(["1"], {"$ref": "http://127.0.0.1:1/schema.json"})
