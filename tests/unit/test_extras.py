"""What an installation lacks is named with the extra that brings it."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

from nemo_aligner import extras
from nemo_aligner.errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = {
    "pytriton": "nvidia-pytriton",
    "mlflow": "mlflow-skinny",
    "math_verify": "math-verify[antlr4-9-3]",
}


def test_every_module_comes_with_its_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, modules in extras.EXTRAS.items():
        wanted = {line.partition("==")[0] for line in project["optional-dependencies"][extra]}
        assert {PACKAGE.get(module, module) for module in modules} <= wanted


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_a_missing_package_is_named_with_its_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extras.require_extra(extra, "this")
    first, *_ = extras.EXTRAS[extra]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == first else found(name))
    line = rf'^this needs {first}, not installed here; pip install "nemo-aligner\[{extra}\]"$'
    with pytest.raises(MissingExtraError, match=line):
        extras.require_extra(extra, "this")
