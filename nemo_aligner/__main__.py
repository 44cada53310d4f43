"""`aligner`, or `python -m nemo_aligner`: one command for each thing the package does."""

from nemo_aligner.commands.cli import main

if __name__ == "__main__":
    main()
