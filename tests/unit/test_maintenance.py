"""What maintainers use says the same as what it is about."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_workflow_runs_what_ci_runs_on_the_python_that_is_asked_for() -> None:
    job = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    [version] = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert tomllib.loads(text("pyproject.toml"))["project"]["requires-python"].startswith(f">={version}")


def test_the_version_is_one() -> None:
    version = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
    assert re.findall(r"^## (\S+)", text("CHANGELOG.md"), re.M)[0] == version


@pytest.mark.parametrize("form", sorted(path.name for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")))
def test_an_issue_form_has_what_github_asks_of_one(form: str) -> None:
    content = yaml.safe_load(text(f".github/ISSUE_TEMPLATE/{form}"))
    if form == "config.yml":
        assert content == {"blank_issues_enabled": False}
        return
    assert {"name", "description", "body"} <= set(content)
    asked = [part for part in content["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked)
    assert all(part["attributes"]["label"] for part in asked)


def test_hooks_before_a_commit_are_the_checks_of_ci() -> None:
    [local] = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    for check in ("ruff check", "ruff format", "mypy", "lint-imports"):
        assert any(entry.startswith(f".venv/bin/{check}") for entry in entries)
        assert f".venv/bin/{check}" in text("scripts/test.sh")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_knows_what_the_guide_for_contributors_names() -> None:
    named = set(re.findall(r"\bmake ([a-z ]+?)(?:`|  )", text("CONTRIBUTING.md")))
    targets = sorted({target for line in named for target in line.split()})
    assert {"format", "lint", "types", "test", "bench", "docs"} <= set(targets)
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
