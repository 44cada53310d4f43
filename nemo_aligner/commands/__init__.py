"""What `aligner` can do, a module each; the scripts of examples/ and scripts/ start the same modules."""
