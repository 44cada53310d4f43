from nemo_aligner.report.cli import run_as_command

run_as_command()
