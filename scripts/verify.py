"""Check that archives, checkpoints, journals, and JSONL with its provenance, are what was written.

    python scripts/verify.py results filtered.jsonl policy.nemo

Looks at every byte, through folders too, and changes nothing. One line each; exit status 1 where something is damaged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the clone, where it is not installed

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.stages.verification import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help=".nemo, .jsonl, checkpoint, or a folder")
    damaged = False
    for path in parser.parse_args().paths:
        for verdict in verify(path):
            print(verdict, flush=True)
            damaged |= not verdict.is_sound
    if damaged:
        sys.exit(1)


if __name__ == "__main__":
    with one_line_errors():
        main()
