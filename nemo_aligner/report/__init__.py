"""Results as one HTML page: `python -m nemo_aligner.report RESULTS_DIR`."""
