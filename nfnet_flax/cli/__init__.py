"""The `nfnet` command: one file per subcommand, `command.py` decides which."""

from nfnet_flax.cli.command import main as main
from nfnet_flax.cli.command import program as program
