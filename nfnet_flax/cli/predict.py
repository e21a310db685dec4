"""`nfnet predict`."""

import contextlib
import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nfnet_flax.cli.ahead import Code, load_given_code
from nfnet_flax.cli.errors import EXIT_INTERRUPTED
from nfnet_flax.cli.options import CHECKPOINT, COUNT, DIR, PIXELS, WEIGHTS, parsed
from nfnet_flax.config import ConfigError, require
from nfnet_flax.exit_codes import EXIT_DONE, EXIT_WRONG
from nfnet_flax.messages import warn
from nfnet_flax.paths import check_not_input, check_target, local_path
from nfnet_flax.progress import COMPUTING_LINE_S, tracking

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from nfnet_flax.prediction import Prediction, Predictor, Unreadable
    from nfnet_flax.prediction.files import Found, ImageFiles
    from nfnet_flax.prediction.results import Counts, TargetFile, Writer

_FILE_OR_STREAM = tyro.conf.arg(metavar="FILE|-")
_CHANNELS = tyro.conf.arg(metavar="RED GREEN BLUE")
_STREAM = "-"


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE|FOLDER|PATTERN ...")]
    """Images to predict: files of any format and size, folders with all that is in them, and patterns such as
    'photos/**/*.jpg'."""
    images_from: Annotated[str | None, _FILE_OR_STREAM] = None
    """Text file with more of these, one in each line; - is the standard input."""
    workdir: Annotated[str | None, DIR] = None
    """Folder of the run whose network predicts; it is not changed."""
    weights: Annotated[str | None, WEIGHTS] = None
    """Weights in place of a run: a weight file, a folder with timm's config.json and model.safetensors, or a name in a
    model hub, such as timm/eca_nfnet_l0.ra2_in1k."""
    checkpoint: Annotated[Literal["newest", "best"] | int | None, CHECKPOINT] = None
    """Which checkpoint of the run: the newest (without this option) or the best one with undamaged parameters, or the
    number of a step."""
    parameters: Annotated[Literal["ema", "raw"] | None, tyro.conf.arg(metavar="{ema,raw}")] = None
    """Which parameters of the run: their moving average (without this option), or as trained."""
    top: Annotated[int, COUNT] = 5
    """How many classes to name for each image, the most probable first."""
    csv: Annotated[str | None, _FILE_OR_STREAM] = None
    """File for a CSV table with a row for each image; - is the standard output."""
    json: Annotated[str | None, _FILE_OR_STREAM] = None
    """File for JSON, one object for each image in a line of its own; - is the standard output."""
    html: Annotated[str | None, _FILE_OR_STREAM] = None
    """File for a web page with thumbnails, which needs no other files."""
    overwrite: bool = False
    """Replace existing files."""
    activation: Annotated[Literal["softmax", "sigmoid"] | None, tyro.conf.arg(metavar="{softmax,sigmoid}")] = None
    """What makes probabilities: softmax if an image has one class, sigmoid if classes are independent of each other.
    Without this option as in training; softmax for weights that do not say it."""
    image_size: Annotated[int | None, PIXELS] = None
    """Height and width of the network's images, in pixels. Without this option, and those that follow, as stored with
    the weights."""
    crop_margin: Annotated[int | None, PIXELS] = None
    """Total number of pixels that are cut off on each axis after resizing."""
    resampler: Annotated[
        Literal["area_cubic", "pillow_bicubic", "pillow_bilinear"] | None,
        tyro.conf.arg(metavar="{area_cubic,pillow_bicubic,pillow_bilinear}"),
    ] = None
    """Method that resizes the images."""
    mean: Annotated[tuple[float, float, float] | None, _CHANNELS] = None
    """Mean that is subtracted from the grey levels (0 to 255) of each channel."""
    std: Annotated[tuple[float, float, float] | None, _CHANNELS] = None
    """Standard deviation by which the grey levels of each channel are then divided."""
    keeps_aspect: Annotated[bool | None, tyro.conf.arg(metavar="{True,False}")] = None
    """Whether the shorter side is resized and the other one in proportion, or both to the same length."""
    batch_size: Annotated[int, COUNT] = 32
    """Number of images that are computed at a time."""
    code: Code = ()


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(
        PredictOptions,
        argv,
        "nfnet predict",
        description="Predict the classes of images. Prints a table unless --csv, --json or --html is given. Exit code "
        "1: some images cannot be read or decoded; the others have results.",
    )
    _check(options)
    try:
        return _predict(options, argv)
    except KeyboardInterrupt:
        print("nfnet: interrupted; no file was written", file=sys.stderr)
        return EXIT_INTERRUPTED


def _predict(options: PredictOptions, argv: list[str]) -> int:
    """Predicts the images; returns the exit code."""
    from nfnet_flax.prediction.page import THUMBNAIL_PX, described
    from nfnet_flax.prediction.results import TargetFile

    targets = _targets(options)
    images = _images(options)
    load_given_code(argv)
    predictor = _predictor(options)
    # Pillow's notes on odd files that it can read; whatever matters ends in an error.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    with contextlib.ExitStack() as stack:
        files = {form: TargetFile(form, path) for form, path in targets.items()}
        for file in files.values():
            stack.callback(file.drop)
        if not _asked(options):
            print("\n".join(described(predictor)))
        writers = _writers(options, predictor, files)
        counts = _write_all(
            predictor.stream(
                _not_targets(images, targets), thumbnail_px=THUMBNAIL_PX if options.html is not None else None
            ),
            writers,
        )
        for file in files.values():
            file.keep()
    for text in images.unused:
        warn(text)
    if _asked(options):
        lines = [f"{form}: {path}" for form, path in targets.items()]
        lines.append(f"{counts.good:,} of {counts.good + counts.failed:,} images have a result")
        print("\n".join(lines), file=sys.stderr if _STREAM in _asked(options).values() else sys.stdout)
    return EXIT_WRONG if counts.failed else EXIT_DONE


def _check(options: PredictOptions) -> None:
    """Raises `ConfigError` for options that do not fit together."""
    remedy = "give files, folders or patterns, or a text file with one of them in each line by --images-from FILE"
    require(bool(options.images) or options.images_from is not None, "images", options.images, remedy)
    if (options.workdir is None) == (options.weights is None):
        given = "neither is" if options.workdir is None else "both are"
        raise ConfigError(f"--workdir and --weights: {given} given: give the folder of a run, or weights")
    for name in ("checkpoint", "parameters"):
        value = dataclasses.asdict(options)[name]
        if options.weights is not None and value is not None:
            raise ConfigError(
                f"{name} = {value!r}: is for a run: give --workdir in place of --weights, or leave it out"
            )
    require(options.top >= 1, "top", options.top, "must be at least 1")
    if list(_asked(options).values()).count(_STREAM) > 1:
        raise ConfigError("csv, json and html: only one of them can be the standard output (-)")


def _targets(options: PredictOptions) -> dict[str, Path]:
    """Forms of the results that are files -> their paths; none of them is read by the command as something else."""
    listed = options.images_from
    targets: dict[str, Path] = {}
    for form, value in _asked(options).items():
        if value == _STREAM:
            continue
        targets[form] = check_target(form, value, overwrite=options.overwrite)
        if options.weights is not None:
            check_not_input(form, targets[form], options.weights)
        is_list = listed is not None and listed != _STREAM and local_path("images_from", listed) == targets[form]
        require(not is_list, form, value, "is the list of images: give another name for the results")
    if len(set(targets.values())) < len(targets):
        raise ConfigError("csv, json and html: two of them are the same file: give each its own")
    return targets


def _images(options: PredictOptions) -> "ImageFiles":
    """The images that are given, and then those in the list."""
    from nfnet_flax.prediction.files import find_named
    from nfnet_flax.prediction.listed import check_no_lists, read_list

    check_no_lists(options.images)
    listed = [] if options.images_from is None else read_list(options.images_from)
    return find_named([*(("images", place) for place in options.images), *listed])


def _not_targets(images: "Iterable[Found]", targets: dict[str, Path]) -> "Iterator[Found]":
    """The images; raises `ConfigError` if one of them would be replaced by the results."""
    field_of = {str(path): form for form, path in targets.items()}
    for image in images:
        if isinstance(image, str) and (form := field_of.get(os.path.realpath(image))) is not None:
            raise ConfigError(f"{form} = {image!r}: is one of the images: give another name for the results")
        yield image


def _asked(options: PredictOptions) -> dict[str, str]:
    """Forms of the results that are asked for -> name of the file, or `-`."""
    named = {"csv": options.csv, "json": options.json, "html": options.html}
    return {form: value for form, value in named.items() if value is not None}


def _predictor(options: PredictOptions) -> "Predictor":
    from nfnet_flax.prediction import load_predictor
    from nfnet_flax.training.reading import Run

    run = None if options.workdir is None else Run(options.workdir)  # kept: with it, a copy from a bucket is deleted
    return load_predictor(
        (options.weights or "") if run is None else run.workdir,
        field="weights" if options.workdir is None else "workdir",
        parameters=options.parameters or "ema",
        checkpoint="newest" if options.checkpoint is None else options.checkpoint,
        batch_size=options.batch_size,
        activation=options.activation,
        image_size=options.image_size,
        crop_margin=options.crop_margin,
        resampler=options.resampler,
        mean=options.mean,
        std=options.std,
        keeps_aspect=options.keeps_aspect,
    )


def _writers(options: PredictOptions, predictor: "Predictor", files: "dict[str, TargetFile]") -> "list[Writer]":
    from nfnet_flax.prediction.page import Page
    from nfnet_flax.prediction.results import Csv, JsonLines, Table

    top = min(options.top, len(predictor.names))
    writers: list[Writer] = []
    for form in _asked(options):
        out = files.get(form, sys.stdout)
        match form:
            case "csv":
                writers.append(Csv(out, top))
            case "json":
                writers.append(JsonLines(out, top))
            case "html":
                writers.append(Page(out, top, predictor))
    return writers or [Table(sys.stdout, sys.stderr, top, predictor.names)]


def _write_all(results: "Generator[Prediction | Unreadable, None, None]", writers: "list[Writer]") -> "Counts":
    from nfnet_flax.prediction import Prediction
    from nfnet_flax.prediction.results import Counts, Table

    counts = Counts()
    is_seen = sys.stdout.isatty() and any(isinstance(writer, Table) for writer in writers)
    shown = tracking("predicting", unit="images", first_line_s=COMPUTING_LINE_S)
    with contextlib.closing(results), contextlib.nullcontext() if is_seen else shown as task:
        for result in results:
            for writer in writers:
                writer.write(result)
            sys.stdout.flush()  # whoever reads it gets each result at once
            if isinstance(result, Prediction):
                counts.good += 1
            else:
                counts.failed += 1
            if task is not None:
                task.advance()
    for writer in writers:
        writer.finish(counts)
    return counts
