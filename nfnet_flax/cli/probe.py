"""`nfnet probe`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from nfnet_flax.cli.ahead import Code, load_given_code
from nfnet_flax.cli.options import COLUMN, COUNT, FILE, WEIGHTS, parsed
from nfnet_flax.exit_codes import EXIT_DONE

WORDS = {
    "--data.on-corrupt": "--on-corrupt",
    "--data.source.image": "--image",
    "--data.source.label": "--label",
    "--data.source.split-column": "--split-column",
    "--data.source.eval-file": "--eval-file",
}
"""Option of `nfnet train` -> the one that does the same here."""


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """Is a network worth fine-tuning on these images? Logistic regression on its features says it in a minute.

    Each image has one class: the text of a CSV file's column is taken as it is.
    """

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER|FILE.csv")]]
    """Folder with one folder of images for each class, or with train/ and val/ of these; a .csv file; or a folder of
    Parquet or tar files. If the images are not split, a tenth is held out."""
    weights: Annotated[str, WEIGHTS]
    """A weight file, the folder of a run, a folder with timm's config.json, or a name in a model hub."""
    image: Annotated[str, COLUMN] = "image"
    """Column of the CSV file with the names of the image files, or of Parquet files with the images."""
    label: Annotated[str, COLUMN] = "label"
    """Column with the class."""
    split_column: Annotated[str | None, COLUMN] = None
    """Column that contains train or val; None: there is none."""
    eval_file: Annotated[str | None, FILE] = None
    """CSV file of the held-out images; None: there is none."""
    shots: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1, 5)
    """Numbers of training images per class to try in addition to all images."""
    max_train: Annotated[int, COUNT] = 2000
    """Largest number of training images."""
    max_held_out: Annotated[int, COUNT] = 1000
    """Largest number of held-out images."""
    on_corrupt: Annotated[Literal["raise", "skip"], tyro.conf.arg(metavar="{raise,skip}")] = "raise"
    """What happens with an image that cannot be decoded. raise: it ends the command. skip: it is left out, and a
    warning says how many are."""
    code: Code = ()


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(ProbeOptions, argv, "nfnet probe")
    load_given_code(argv)
    from nfnet_flax.finetuning import given_images
    from nfnet_flax.probe import probe
    from nfnet_flax.runtime import prepare
    from nfnet_flax.training.reading import weights_of

    prepare(reproducible=False)
    images = given_images(
        options.data,
        image=options.image,
        label=options.label,
        split_column=options.split_column,
        eval_file=options.eval_file,
    )
    info, arrays = weights_of(options.weights)
    found = probe(
        info,
        arrays,
        images,
        shots=options.shots,
        max_train=options.max_train,
        max_held_out=options.max_held_out,
        on_corrupt=options.on_corrupt,
    )
    print(f"{info.source}: {found.num_features} features, logistic regression for {len(images.class_names)} classes")
    print(f"{'per class':>9}{'images':>9}{'top-1':>9}   on {found.num_held_out} held-out images")
    print(f"{'-':>9}{0:>9}{found.most_frequent:>9.2%}   always the most frequent class")
    for row in found.rows:
        print(f"{'all' if row.per_class is None else row.per_class:>9}{row.num_images:>9}{row.top1:>9.2%}")
    print(f"time: features {found.features_s:.1f} s, regression {found.fitting_s:.1f} s")
    return EXIT_DONE
