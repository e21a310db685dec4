"""`nfnet claim exact`."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from nfnet_flax.cli.options import DIR, parsed
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.paths import local_path, made_folder

if TYPE_CHECKING:
    from nfnet_flax.claims.released import Accuracy


@dataclasses.dataclass(frozen=True)
class ExactOptions:
    """Compares the networks with the published ones: numbers of parameters and multiply-adds; with --goldens also
    logits; with --weights and --images also the accuracy of released weights. Prints tables in Markdown."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Networks whose sizes are counted, as `nfnet models` lists them; without this option all that have a published
    figure."""
    goldens: Annotated[str | None, DIR] = None
    """Folder with outputs of the published code: tests/goldens in the repository."""
    weights: Annotated[str | None, DIR] = None
    """Folder with weights: published pickles (F0_haiku.npz), timm's dm_nfnet_f0*.safetensors, files that nfnet convert
    wrote, or folders with timm's config.json. Needs --images."""
    images: Annotated[str | None, DIR] = None
    """ImageNet's validation set, in any layout that nfnet eval recognises: a folder for each class, directly or in
    val/; Parquet or tar files; or what tools/prepare_imagenet.py wrote."""
    out: Annotated[str | None, DIR] = None
    """Folder for evidence.json, which has the measured numbers, the command, the machine and the date."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(ExactOptions, argv, "nfnet claim exact")
    if (options.weights is None) != (options.images is None):
        given, missing = ("weights", "images") if options.images is None else ("images", "weights")
        raise ConfigError(f"{given} = {getattr(options, given)!r}: give --{missing} DIR, too, or leave it out")
    out = None if options.out is None else made_folder("out", options.out)
    from nfnet_flax.claims import exact
    from nfnet_flax.claims.evidence import evidence, write_evidence
    from nfnet_flax.claims.goldens import agreement, read_goldens
    from nfnet_flax.claims.released import accuracy, images_in, weight_files
    from nfnet_flax.progress import track
    from nfnet_flax.runtime import prepare

    prepare()
    names = exact.check_models(options.models)
    goldens = [] if options.goldens is None else read_goldens(local_path("goldens", options.goldens))
    files = [] if options.weights is None else weight_files(local_path("weights", options.weights))
    images = None if options.images is None else images_in(options.images)
    # What a user's folders can spoil comes first.
    accuracies = [] if images is None else [_shown(accuracy(file, images)) for file in files]
    logits = [agreement(golden) for golden in track(goldens, "comparing logits", "networks")]
    sizes = exact.measured_sizes(names)
    data = exact.data_of(sizes, logits, accuracies)
    found = evidence(exact.CLAIM, shlex.join(["nfnet", "claim", "exact", *argv]), data)
    print(exact.text(found))
    if out is not None:
        print(f"\nevidence: {write_evidence(found, out)}")
    return EXIT_DONE


def _shown(found: "Accuracy") -> "Accuracy":
    """Prints a result at once: an error in the next file must not lose it."""
    print(f"{found.weights}: top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, {found.num_examples:,} images", flush=True)
    return found
