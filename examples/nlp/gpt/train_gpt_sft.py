"""`aligner sft`, from a checkout: nemo_aligner/commands/sft.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the clone, where it is not installed

from nemo_aligner.commands.sft import main

if __name__ == "__main__":
    main()
