"""`nfnet claim exact`."""

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from nfnet_flax.cli.claim_output import conclude
from nfnet_flax.cli.options import DIR, NAMES, parsed
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_WRONG
from nfnet_flax.messages import warn
from nfnet_flax.paths import local_path, made_folder

if TYPE_CHECKING:
    from nfnet_flax.claims.released import Accuracy, WeightFile
    from nfnet_flax.data.source_config import SourceConfig


@dataclasses.dataclass(frozen=True)
class ExactOptions:
    """Compares the networks with the published ones: numbers of parameters and multiply-adds; with --goldens also
    logits; with --weights and --images also the accuracy of released weights.

    Prints tables, and writes what it measured. All sizes take half a minute, the logits some minutes, and accuracies a
    pass over the images for each file, which on a CPU takes hours.
    """

    models: Annotated[tuple[str, ...], NAMES] = ()
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
    out: Annotated[str, DIR] = "claims/exact"
    """Folder for evidence.json, which has the measured numbers, the command, the machine and the date."""


def run(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(ExactOptions, argv, "nfnet claim exact")
    if (options.weights is None) != (options.images is None):
        given, missing = ("weights", "images") if options.images is None else ("images", "weights")
        raise ConfigError(f"{given} = {getattr(options, given)!r}: give --{missing} DIR, too, or leave it out")
    from nfnet_flax.claims import exact
    from nfnet_flax.claims.evidence import evidence, write_evidence
    from nfnet_flax.claims.goldens import agreement, read_goldens
    from nfnet_flax.claims.released import check_images, images_in, weight_files
    from nfnet_flax.progress import track
    from nfnet_flax.runtime import prepare

    prepare()
    names = exact.check_models(options.models)
    goldens = [] if options.goldens is None else read_goldens(local_path("goldens", options.goldens))
    files = [] if options.weights is None else weight_files(local_path("weights", options.weights))
    images = None if options.images is None else images_in(options.images)
    if images is not None:
        check_images(images)
    out = made_folder("out", options.out)
    command = shlex.join(["nfnet", "claim", "exact", *argv])

    def keep(found: "Sequence[Accuracy]") -> None:
        write_evidence(evidence(exact.CLAIM, command, exact.data_of([], [], found)), out)

    # What a user's folders can spoil comes first.
    accuracies, failed = ([], []) if images is None else _accuracies(files, images, keep)
    logits = [agreement(golden) for golden in track(goldens, "comparing logits", "networks")]
    data = exact.data_of(exact.measured_sizes(names), logits, accuracies)
    found = evidence(exact.CLAIM, command, data)
    conclude(found, out, exact.text(found))
    if failed:
        warn(f"without a result: {', '.join(failed)}; the reasons are said above")
        return EXIT_WRONG
    return EXIT_DONE


def _accuracies(
    files: "Sequence[WeightFile]", images: "SourceConfig", keep: "Callable[[Sequence[Accuracy]], None]"
) -> "tuple[list[Accuracy], list[str]]":
    """The results, each printed and kept at once, as the next file may take hours; and the names of the files that have
    none."""
    from nfnet_flax.claims.released import accuracy

    results: list[Accuracy] = []
    failed: list[str] = []
    for file in files:
        try:
            found = accuracy(file, images)
        except ConfigError as error:
            warn(str(error))
            failed.append(file.path.name)
            continue
        results.append(found)
        keep(results)
        rates = f"top-1 {found.top1:.2%}, top-5 {found.top5:.2%}"
        print(f"{found.weights}: {rates}, {found.num_examples:,} images", flush=True)
    return results, failed
