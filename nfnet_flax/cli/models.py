"""`nfnet models`."""

import dataclasses
import fnmatch
from typing import Annotated

import tyro

from nfnet_flax.cli.options import parsed
from nfnet_flax.config import unknown_name
from nfnet_flax.exit_codes import EXIT_DONE


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""

    @dataclasses.dataclass(frozen=True)
    class ModelsOptions:
        pattern: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[PATTERN]")]] = "*"
        """Shell-style pattern of the names to list, such as 'nfnet_*'."""

    options = parsed(ModelsOptions, argv, "nfnet models", "List the named networks.")
    from nfnet_flax.models import list_models
    from nfnet_flax.models.counts import COUNTS
    from nfnet_flax.models.registry import IMAGE_SIZES, PUBLISHED_TOP1_PERCENT

    names = fnmatch.filter(list_models(), options.pattern)
    if not names:
        raise unknown_name("model", options.pattern, list_models(), listed_by="nfnet models")
    print("GFLOPs: multiply-adds of one image at train px, forward. Top-1: published, ImageNet, at test px.")
    print(f"{'name':<16}{'parameters':>14}{'GFLOPs':>9}{'train px':>10}{'test px':>9}{'top-1':>8}")
    for name in names:
        counts, sizes = COUNTS[name], IMAGE_SIZES[name]
        top1 = f"{PUBLISHED_TOP1_PERCENT[name]:.1f}%" if name in PUBLISHED_TOP1_PERCENT else "-"
        print(
            f"{name:<16}{counts.parameters:>14,}{counts.multiply_adds / 1e9:>9.2f}"
            f"{sizes.train:>10}{sizes.test:>9}{top1:>8}"
        )
    return EXIT_DONE
