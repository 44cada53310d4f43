from nemo_aligner.report.cli import main

main()
