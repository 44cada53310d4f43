"""Write a policy's .nemo archive as a Hugging Face folder that transformers loads.

    aligner export --input policy.nemo --output folder
    aligner export --input adapter.nemo --adapter --output folder

An adapter is merged into its base, or with --adapter written alone, for the PEFT library.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.files import refuse_overwriting
from nemo_aligner.owner import lock_of, sole_owner


@one_line_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a policy's .nemo archive")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--adapter", action="store_true", help="the adapter alone, as the PEFT library keeps it")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

    refuse_overwriting(args.output, f"--output {args.output}", {"--input": [args.input]})
    with sole_owner(lock_of(args.output)):
        from nemo_aligner.engine.conversion import export_adapter, export_hf

        (export_adapter if args.adapter else export_hf)(args.input, args.output)
