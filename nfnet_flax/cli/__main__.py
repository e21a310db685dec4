"""`python -m nfnet_flax.cli` is `nfnet`."""

import sys

from nfnet_flax.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
