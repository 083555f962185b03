"""One file for each sub-command: `add_parser` declares its options, `run` carries them out and returns the exit code."""
