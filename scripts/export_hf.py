"""`aligner export`, from a checkout: nemo_aligner/commands/export_hf.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the clone, where it is not installed

from nemo_aligner.commands.export_hf import main

if __name__ == "__main__":
    main()
