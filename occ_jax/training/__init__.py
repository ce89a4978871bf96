"""The host side of a run: the loop, its directory, checkpoints, logs and figures."""
