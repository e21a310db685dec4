"""`nfnet claim`."""

import sys
from collections.abc import Callable, Sequence

from nfnet_flax.config import unknown_name
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE

_ABOUT = {
    "agc": "figure 2: what clipping does for batch size and learning rate",
    "exact": "parameters, FLOPs, logits and accuracy beside the published ones",
    "latency": "figure 1, table 3: the time of a training step beside that of EfficientNet-B7",
    "cost": "table 3: what the published runs would cost on TPUs, by the compiler's estimates",
    "cuts": "beside the paper: normalizer-free against BatchNorm, by the cut of the batch",
}
"""Name of a claim -> what it is about."""
_USAGE = (
    "usage: nfnet claim NAME [--out DIR] ...\n\nMeasures what the paper claims (arXiv 2102.06171). NAME is one of:\n\n"
)
_END = "\nnfnet claim NAME --help: every option. The results are in docs/claims.md.\n"


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, _ABOUT))
        lines = (f"  {name:<{width}}  {text}\n" for name, text in _ABOUT.items())
        print(_USAGE + "".join(lines) + _END, end="", file=sys.stdout if argv else sys.stderr)
        return EXIT_DONE if argv else EXIT_BAD_INPUT
    return _command(argv[0])(argv[1:])


def _command(name: str) -> Callable[[Sequence[str]], int]:
    match name:
        case "agc":
            from nfnet_flax.cli import claim_agc

            return claim_agc.run
        case "exact":
            from nfnet_flax.cli import claim_exact

            return claim_exact.run
        case "latency":
            from nfnet_flax.cli import claim_latency

            return claim_latency.run
        case "cost":
            from nfnet_flax.cli import claim_cost

            return claim_cost.run
        case "cuts":
            from nfnet_flax.cli import claim_cuts

            return claim_cuts.run
        case _:
            raise unknown_name("claim", name, _ABOUT)
