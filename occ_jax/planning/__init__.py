"""Whether a run fits a machine that is not there: its programs compiled, never run."""
