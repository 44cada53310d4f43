"""A Python that lacks what scripts need is told so in one line, when this module is imported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def check_python() -> None:
    """Leave with exit status 1 where hydra and its like are not installed for this Python."""
    missing = [name for name in ("hydra", "omegaconf", "torch", "megatron") if importlib.util.find_spec(name) is None]
    if missing:
        clone = Path(__file__).resolve().parents[2]
        lacks = f"error: {sys.executable} has no {', '.join(missing)}"
        if not (clone / "scripts/test.sh").is_file():
            sys.exit(f"{lacks}; {sys.executable} -m pip install nemo-aligner brings what it requires")
        ready = (clone / ".venv/bin/python").is_file()
        make = "" if ready else f"bash {clone}/scripts/test.sh --setup-only makes its environment; then "
        sys.exit(f"{lacks}; {make}source {clone}/.venv/bin/activate")


check_python()
