"""`aligner sample`, from a checkout: nemo_aligner/commands/sample.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[4]))  # the clone, where it is not installed

from nemo_aligner.commands.sample import main

if __name__ == "__main__":
    main()
