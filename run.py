"""Command line of occ_jax: `python run.py --help`."""

import sys

from occ_jax.cli.arguments import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
