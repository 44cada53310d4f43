"""Check that archives, checkpoints, journals, and JSONL with its provenance, are what was written.

    aligner verify results filtered.jsonl policy.nemo

Looks at every byte, through folders too, and changes nothing. One line each; exit status 1 where something is damaged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.stages.verification import verify


@one_line_errors()
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
