"""`nfnet signal`."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nfnet_flax.cli.ahead import Code, load_given_code
from nfnet_flax.cli.options import CHECKPOINT, COUNT, PIXELS, parsed
from nfnet_flax.config import ConfigError, require, require_count
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.paths import check_not_input, check_target

if TYPE_CHECKING:
    from nfnet_flax.cli.signal_inputs import Input, Named
    from nfnet_flax.models import Classifier
    from nfnet_flax.telemetry.signal_table import Series

_RESULT = tyro.conf.arg(metavar="FILE|-")
_STDOUT = "-"


@dataclasses.dataclass(frozen=True)
class SignalOptions:
    """How the signal grows with the depth of a network: the published signal propagation plots (arXiv 2101.08692).

    Prints for the stem and for each block the squared mean and the variance of a channel, the variance at the end of
    the residual branch, and the closed form of a normalizer-free network: in each block the variance grows by alpha**2,
    and in each stage it begins anew. A run, or weights, are shown beside the same network with random parameters.
    """

    network: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL|RUN|WEIGHTS")]]
    """A name that `nfnet models` lists; the folder of a run, also in a bucket; a weight file; a folder with timm's
    config.json; or a name in a model hub. A folder that is called like a model is given as ./NAME."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE.png|FILE.svg")] = None
    """File for a picture (extra `plots`)."""
    csv: Annotated[str | None, _RESULT] = None
    """File for a CSV table; - prints it in place of the table."""
    json: Annotated[str | None, _RESULT] = None
    """File for the same as JSON; - prints it in place of the table."""
    overwrite: bool = False
    """Replace existing files."""
    checkpoint: Annotated[Literal["newest", "best"] | int | None, CHECKPOINT] = None
    """Which checkpoint of the run: the newest (without this option) or the best one with undamaged parameters, or the
    number of a step."""
    parameters: Annotated[Literal["ema", "raw"] | None, tyro.conf.arg(metavar="{ema,raw}")] = None
    """Which parameters of the run: their moving average (without this option), or as trained."""
    skip_gain: Annotated[float | Literal["own"] | None, tyro.conf.arg(metavar="VALUE|own")] = None
    """Skip gains of the network with random parameters: 1 without this option, as the closed form assumes;
    own: those with which training begins, which are 0, so that branches do not count. Weights keep theirs."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE|FOLDER|PATTERN ...")] = ()
    """Measure on images, chosen at random of these; without this option on unit Gaussian noise, as in the published
    plots."""
    held_out: bool = False
    """Measure on held-out images of the run."""
    batch_size: Annotated[int, COUNT] = 16
    """Number of images on which to measure; all are computed at the same time."""
    image_size: Annotated[int | None, PIXELS] = None
    """Height and width of the images. Without this option those of the evaluation of the run or weights, and those of
    the published training of a model."""
    seed: Annotated[int | None, COUNT] = None
    """Seed of the noise, of the choice of images and of the random parameters; without this option that of the run, or
    0."""
    code: Code = ()


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parsed(SignalOptions, argv, "nfnet signal")
    targets = _targets(options)
    load_given_code(argv)
    from nfnet_flax.cli.signal_inputs import named
    from nfnet_flax.runtime import prepare
    from nfnet_flax.telemetry.signal_table import csv_text, json_text, table

    prepare()
    network = named(options.network, parameters=options.parameters, checkpoint=options.checkpoint)
    seed = network.seed if options.seed is None else options.seed
    seen = _input(options, network, seed)
    measured = _measured(options, network, seen, seed)
    source = network.info.source
    texts = {"csv": csv_text(measured), "json": json_text(source, seen.text, measured)}
    printed = [form for form in texts if getattr(options, form) == _STDOUT]
    if printed:
        print(texts[printed[0]], end="")
    else:
        tables = (table(series, on_noise=seen.is_noise) for series in measured)
        print("\n\n".join([f"network: {source}\ninput: {seen.text}", *tables]))
    for form, path in targets.items():
        _write(form, path, texts[form].encode() if form in texts else _picture(path, source, seen, measured))
        print(f"{form}: {path}", file=sys.stderr if printed else sys.stdout)
    return EXIT_DONE


def _targets(options: SignalOptions) -> dict[str, Path]:
    """The files to write, by the name of the option; they may be written.

    Raises:
      ConfigError: options do not fit together, or a file may not be written.
    """
    from nfnet_flax.models import list_models
    from nfnet_flax.plots import picture_kind

    require_count("batch_size", options.batch_size)
    if options.image_size is not None:
        require_count("image_size", options.image_size)
    require(not (options.held_out and options.images), "held_out", True, "leave --images out, or this option")
    asked = {"out": options.out, "csv": options.csv, "json": options.json}
    if list(asked.values()).count(_STDOUT) > 1:
        raise ConfigError("csv and json: only one of them can be the standard output (-)")
    found: dict[str, Path] = {}
    for form, value in asked.items():
        if value is None or (value == _STDOUT and form != "out"):
            continue
        found[form] = check_target(form, value, overwrite=options.overwrite)
        if options.network not in list_models():
            check_not_input(form, found[form], options.network)
    if len(set(found.values())) < len(found):
        raise ConfigError("out, csv and json: two of them are the same file: give each its own")
    if "out" in found:
        picture_kind("out", str(found["out"]))
    return found


def _input(options: SignalOptions, network: "Named", seed: int) -> "Input":
    """The images that the options name."""
    from nfnet_flax.cli.signal_inputs import given_images, held_out_images, noise

    count, image_size = options.batch_size, options.image_size
    if options.held_out:
        return held_out_images(network, count=count, image_size=image_size)
    if options.images:
        return given_images(network, options.images, count=count, image_size=image_size, seed=seed)
    return noise(network, count=count, image_size=image_size, seed=seed)


def _measured(options: SignalOptions, network: "Named", seen: "Input", seed: int) -> "list[Series]":
    """The signal with random parameters and, if there are weights, with these."""
    from nfnet_flax.telemetry.signal import has_skip_gains

    model = network.initial(seed)
    gain = options.skip_gain
    if not has_skip_gains(model):
        require(gain is None, "skip_gain", gain, "this network has no skip gains: leave it out")
    else:
        gain = 1.0 if gain is None else gain
    set_to = None if gain == "own" else gain
    text = f"random parameters, seed {seed}" + ("" if set_to is None else f", skip gains {set_to:g}")
    found = [_series(text, model, seen, set_to)]
    del model  # its memory
    trained = network.trained()
    if trained is not None:
        info = network.info
        kind = "" if info.parameters == "unknown" else f", {info.parameters} parameters"
        found.append(_series(f"{info.source}{kind}", trained, seen, None))
    return found


def _series(text: str, model: "Classifier", seen: "Input", skip_gain: float | None) -> "Series":
    """Measures a network; on a terminal, a line shows the progress."""
    from nfnet_flax.telemetry.signal import signal_propagation
    from nfnet_flax.telemetry.signal_table import Series

    is_live = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if is_live:
            end = "" if done < total else "\r\033[K"
            print(f"\r\033[K{text}: block {done}/{total}", end=end, file=sys.stderr, flush=True)

    return Series(text, signal_propagation(model, seen.images, skip_gain=skip_gain, on_block=show))


def _picture(path: Path, source: str, seen: "Input", measured: "list[Series]") -> bytes:
    from nfnet_flax.plots import picture_kind
    from nfnet_flax.telemetry.signal_picture import signal_picture

    return signal_picture(picture_kind("out", str(path)), f"{source}\n{seen.text}", measured)


def _write(form: str, path: Path, content: bytes) -> None:
    from nfnet_flax.json_files import write_whole

    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{form} = {str(path)!r}: cannot be written: {error.strerror}") from error
