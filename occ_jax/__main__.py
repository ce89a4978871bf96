"""The command line, as `occ-jax`, `python -m occ_jax` or `python run.py`."""

import os
import sys

from occ_jax.cli.arguments import main as run


def main() -> int:
    """Runs the command that the process was started with; returns the exit status."""
    # Reward functions are named module:function, and an installed script does not search here.
    sys.path.append(os.getcwd())
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
