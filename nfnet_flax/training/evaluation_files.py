"""The files with the result of an evaluation. Each is written as a whole or not at all."""

import csv
import dataclasses
import importlib.util
import io
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from nfnet_flax.config import ConfigError, FileIfAny, Shown, check_types, require
from nfnet_flax.json_files import write_whole
from nfnet_flax.paths import check_not_input, local_path
from nfnet_flax.training.measuring import Measurement
from nfnet_flax.units import as_float32

MAX_PICTURE_CLASSES = 100
"""Largest number of classes in a picture of a confusion matrix; the names of more cannot be read."""
STDOUT = "-"
"""Given as the JSON file: it is printed."""
_INCHES_PER_CLASS = 0.16
_OTHERS = "(other classes)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationFiles:
    """Where to write what; None: nowhere."""

    json: Annotated[str | None, Shown("FILE|-")] = None
    """Metrics: a list with an object for each row of the table. `-`: they are printed in place of the table."""
    per_class_csv: FileIfAny = None
    """A row for each class of the images: class, num_examples, top1, top5."""
    confusion_csv: FileIfAny = None
    """Number of images for each class (rows) and prediction (columns), for all outputs of the network that count."""
    confusion_png: FileIfAny = None
    """Picture of the confusion matrix of the classes of the images, at most 100: shares of each row. Predictions of
    other classes are one more column."""
    predictions_csv: FileIfAny = None
    """A row for each image: file, label, is_right, top1 to top5 and their probabilities. Several right labels are
    separated by `;`."""
    overwrite: bool = False
    """Whether existing files are replaced."""

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def _given(self) -> dict[str, str]:
        fields = {name: value for name, value in vars(self).items() if name != "overwrite"}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def of_one_row(self) -> list[str]:
        """Names of the files that are given and show a single set of predictions."""
        return [name for name in self._given if name != "json"]

    @property
    def shows_confusion(self) -> list[str]:
        """Names of the files that are given and need one right label for each image."""
        return [name for name in self._given if name.startswith("confusion")]

    def check(self, inputs: Sequence[str] = ()) -> None:
        """Checks, before any work is done, that the files may be written.

        Args:
          inputs: files and folders that the command reads.

        Raises:
          ConfigError: a file or folder is already there, one would replace an input, two files have the same name, or
            Matplotlib is missing.
        """
        places: dict[Path, str] = {}
        for name, value in self._given.items():
            if name == "json" and value == STDOUT:
                continue
            path = local_path(name, value)
            require(not path.is_dir(), name, value, "is a folder: give the name of a file")
            remedy = "exists already: give another place, or replace it (--overwrite, in Python overwrite=True)"
            require(self.overwrite or not path.exists(), name, value, remedy)
            require(path not in places, name, value, f"is also given as {places.get(path)}: give another place")
            for given in inputs:
                check_not_input(name, path, given)
            places[path] = name
        if self.confusion_png is not None and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError(f"confusion_png = {self.confusion_png!r}: pip install 'nfnet_flax[demo]' (Matplotlib)")

    def check_picture(self, num_classes: int) -> None:
        """Raises `ConfigError` if a picture is asked for, but would show too many classes."""
        remedy = f"the images have {num_classes} classes, and it can show {MAX_PICTURE_CLASSES}: give confusion_csv"
        require(num_classes <= MAX_PICTURE_CLASSES or self.confusion_png is None, "confusion_png", "...", remedy)

    def write(self, measurement: Measurement) -> None:
        """Writes all files but the JSON file.

        Raises:
          ConfigError: a file cannot be written; those before it are.
        """
        if self.per_class_csv is not None:
            self._write("per_class_csv", _csv(_per_class_rows(measurement)))
        if self.confusion_csv is not None:
            self._write("confusion_csv", _csv(_confusion_rows(measurement)))
        if self.predictions_csv is not None:
            self._write("predictions_csv", _csv(_prediction_rows(measurement)))
        if self.confusion_png is not None:
            self._write("confusion_png", confusion_picture(measurement))

    def write_json(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes the JSON file; numbers that are not finite become null.

        Raises:
          ConfigError: it cannot be written.
        """
        if self.json is not None and self.json != STDOUT:
            self._write("json", json_text(rows).encode())

    def _write(self, name: str, content: bytes) -> None:
        path = local_path(name, vars(self)[name])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            raise ConfigError(f"{name} = {str(path)!r} cannot be written: {error}") from error


def json_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON; numbers that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(each) for name, each in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps([finite(row) for row in rows], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")  # names of files that are not UTF-8 stay as they are


def _per_class_rows(measurement: Measurement) -> Iterable[Sequence[object]]:
    names = measurement.labelled.names
    yield ("class", "num_examples", "top1", "top5")
    for row in measurement.predictions.per_class(len(names)):
        shares = (as_float32(count / row.num_examples) for count in (row.num_top1, row.num_top5))
        yield (names[row.label], row.num_examples, *shares)


def _confusion_rows(measurement: Measurement) -> Iterable[Sequence[object]]:
    names, allowed = measurement.labelled.names, measurement.labelled.allowed
    outputs = range(len(names)) if allowed is None else allowed
    yield ("class", *(names[label] for label in outputs))
    for label, row in zip(outputs, measurement.predictions.confusion(outputs), strict=True):
        yield (names[label], *row.tolist())


def _prediction_rows(measurement: Measurement) -> Iterable[Sequence[object]]:
    found, labelled = measurement.predictions, measurement.labelled
    ranks = range(1, found.best.shape[1] + 1)
    yield ("file", "label", "is_right", *(f"{kind}{rank}" for rank in ranks for kind in ("top", "probability")))
    for row, hits in enumerate(found.hits):
        best = zip(found.best[row].tolist(), found.probability[row].tolist(), strict=True)
        yield (
            labelled.source.describe(int(found.index[row])),
            ";".join(labelled.names[label] for label in found.right[row]),
            int(hits[0]),
            *(cell for label, probability in best for cell in (labelled.names[label], as_float32(probability))),
        )


def shown_confusion(measurement: Measurement) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the rows and of the columns of the picture, and the number of images in each cell."""
    found, names = measurement.predictions, measurement.labelled.names
    rows = sorted({label for labels in found.right for label in labels})
    others = sorted(set(found.best[:, 0].tolist()) - set(rows))
    counts = found.confusion([*rows, *others])[: len(rows)]
    shown = [names[label] for label in rows]
    if not others:
        return shown, shown, counts
    cut = np.concatenate([counts[:, : len(rows)], counts[:, len(rows) :].sum(axis=1, keepdims=True)], axis=1)
    return shown, [*shown, _OTHERS], cut


def confusion_picture(measurement: Measurement) -> bytes:
    """A PNG file with the confusion matrix.

    Raises:
      ConfigError: there are too many classes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns, counts = shown_confusion(measurement)
    EvaluationFiles(confusion_png="...").check_picture(len(rows))
    side = 3 + _INCHES_PER_CLASS * len(columns)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = counts / counts.sum(axis=1, keepdims=True)
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(picture, ax=axes, label="share of the images of the class")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=7, parse_math=False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("class")
    top1 = measurement.metrics["top1"]
    axes.set_title(f"top-1 {top1:.2%} on {measurement.metrics['num_examples']:.0f} images", fontsize=9)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font does not have are drawn as boxes
        canvas.print_png(file)
    return file.getvalue()
