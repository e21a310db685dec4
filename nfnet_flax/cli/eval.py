"""`nfnet eval`."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nfnet_flax.cli.accuracy import print_rows
from nfnet_flax.cli.ahead import Code, load_given_code, values_of
from nfnet_flax.cli.options import CHECKPOINT, DIR, WEIGHTS
from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.label_sets import LabelSet
from nfnet_flax.data.recognition import evaluation_source
from nfnet_flax.data.source_config import DigitsSource, FolderSource, SourceConfig
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.messages import warn
from nfnet_flax.training.evaluation_files import STDOUT, EvaluationFiles, json_text
from nfnet_flax.training.reading import NoCheckpoint, Parameters, Run, Which
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.portable import WeightsInfo

if TYPE_CHECKING:
    from nfnet_flax.training.evaluating import RunEvaluation

_IMAGE_SIZE = "--data.eval-image-size"


@dataclasses.dataclass(frozen=True)
class Changeable:
    """The part of the settings that an evaluation may change: where the images are, which they are, and how they are
    prepared."""

    data: DataConfig


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Weights that `--weights` names."""

    info: WeightsInfo
    arrays: HostArrays


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    from nfnet_flax.cli import recipe_options

    load_given_code(argv)
    weights, data = _given(argv)
    given = recipe_options.read_changes("nfnet eval", argv, Changeable(data=data))

    @dataclasses.dataclass(frozen=True)
    class EvalOptions:
        workdir: Annotated[str | None, DIR] = None
        """Folder of the run to evaluate, by default on its own held-out images."""
        weights: Annotated[str | None, WEIGHTS] = None
        """Weights to evaluate in place of a run: a weight file, a folder with timm's config.json, or a name in a model
        hub. The images are those of --data.source.root DIR, or of another --data.source."""
        checkpoint: Annotated[Literal["newest", "best"] | int, CHECKPOINT] = "newest"
        """Which checkpoint of the run to evaluate: the newest or the best one with undamaged parameters, or the number
        of a step."""
        all_checkpoints: Annotated[bool, tyro.conf.arg(name="all")] = False
        """Evaluate all checkpoints of the run, a row for each."""
        parameters: Literal["ema", "raw"] = "ema"
        """Which parameters of the run the files show, except the JSON file, which has both."""
        flip: bool = False
        """Average the probabilities for each image and its mirror image."""
        labels: Annotated[LabelSet, tyro.conf.arg(name="")] = dataclasses.field(default_factory=LabelSet)
        files: Annotated[EvaluationFiles, tyro.conf.arg(name="")] = dataclasses.field(default_factory=EvaluationFiles)
        code: Code = ()
        data: Annotated[tyro.conf.AvoidSubcommands[DataConfig], tyro.conf.arg(name="data")] = given.config.data

    options = recipe_options.parse(EvalOptions, given, "Evaluate checkpoints of a run, or weights, on labelled images.")
    files, label_set = options.files, options.labels
    read = [*values_of("--weights", argv), label_set.labels, label_set.classes, label_set.class_names]
    files.check([given for given in read if given is not None])
    if label_set.labels is not None and files.shows_confusion:
        raise ConfigError(f"{files.shows_confusion[0]}: images have several right labels with --labels: leave one out")
    if weights is not None:
        remedy = "goes with --workdir: weights have no checkpoints, and one set of parameters: leave it out"
        require(not options.all_checkpoints, "all", True, remedy)
        require(options.checkpoint == "newest", "checkpoint", options.checkpoint, remedy)
        require(options.parameters == "ema", "parameters", options.parameters, remedy)
        _evaluate_weights(weights, options.data, label_set, files, flip=options.flip)
        return EXIT_DONE
    assert options.workdir is not None  # `_given` refuses a command without both
    if options.all_checkpoints:
        remedy = f"goes with one checkpoint: leave --all out, or {', '.join(files.of_one_row)}"
        require(not files.of_one_row, "all", True, remedy)
        require(options.checkpoint == "newest", "checkpoint", options.checkpoint, "leave it out with --all")
    _evaluate_run(
        options.workdir,
        options.data,
        label_set,
        files,
        flip=options.flip,
        checkpoint=None if options.all_checkpoints else options.checkpoint,
        parameters=options.parameters,
    )
    return EXIT_DONE


def _evaluate_weights(
    weights: _Weights, data: DataConfig, label_set: LabelSet, files: EvaluationFiles, *, flip: bool
) -> None:
    from nfnet_flax.training.evaluating import measure_weights, own_names

    if files.confusion_png is not None:
        files.check_picture(len(own_names(data)))
    info = weights.info
    if info.preprocessing is None:
        warn(
            f"{info.source}: does not say how images are prepared; used are eval_image_size {data.eval_image_size}, "
            f"eval_crop_margin {data.eval_crop_margin}, eval_keeps_aspect {data.eval_keeps_aspect}, resampler "
            f"{data.resampler}, mean {data.mean}, std {data.std} of data"
        )
    found = measure_weights(info, weights.arrays, data, label_set=label_set, flip=flip)
    files.write(found)
    row = {"weights": found.weights, "parameters": info.parameters, "metrics": found.metrics}
    _show([row], files, f"weights: {found.weights}")


def _evaluate_run(
    workdir: str,
    data: DataConfig,
    label_set: LabelSet,
    files: EvaluationFiles,
    *,
    flip: bool,
    checkpoint: Which | None,
    parameters: Parameters,
) -> None:
    """Evaluates a checkpoint of a run, or all of them if that is None."""
    from nfnet_flax.training.evaluating import RunEvaluation, own_names

    if files.confusion_png is not None:
        files.check_picture(len(own_names(data)))
    is_plain = label_set == LabelSet() and not flip and not files.of_one_row
    if data.source.is_multi_label and not is_plain:
        raise ConfigError(
            f"data.source = {type(data.source).__name__}: has images with several classes: leave out --flip, label "
            "sets, and all files but --json"
        )
    evaluation = RunEvaluation(workdir, data, label_set=label_set, flip=flip)
    if checkpoint is not None:
        found = _rows_at(evaluation, checkpoint, files, parameters)
        _show(found, files, f"step {found[0]['step']}")
        return
    rows: list[dict[str, Any]] = []
    for step in sorted(evaluation.run.all_steps()):
        try:
            rows += _rows_at(evaluation, step, files, parameters)
        except NoCheckpoint as error:  # damaged, or deleted meanwhile by the run itself
            warn(f"step {step} is left out: {error}")
    if not rows:
        raise ConfigError(f"workdir {workdir!r} holds no good checkpoint")
    _show(rows, files, None)


def _rows_at(
    evaluation: "RunEvaluation", checkpoint: Which, files: EvaluationFiles, parameters: Parameters
) -> list[dict[str, Any]]:
    """Rows of the table for a checkpoint; writes the files that show one set of predictions."""
    if evaluation.data.source.is_multi_label:
        return _rows_of_metrics(evaluation.run, evaluation.metrics(checkpoint))
    step, found = evaluation.measure(checkpoint)
    if files.of_one_row:
        files.write(found[parameters])
    return [
        {"weights": each.weights, "step": step, "parameters": name, "metrics": each.metrics}
        for name, each in found.items()
    ]


def _rows_of_metrics(run: Run, metrics: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of the result of `evaluate`."""
    step = int(metrics["step"])
    counts = {
        name.partition("/")[2]: metrics[name] for name in ("eval/num_examples", "eval/num_corrupt") if name in metrics
    }
    return [
        {
            "weights": f"run {run.recipe.name!r}, step {step}, seed {run.recipe.seed}, {parameters} parameters",
            "step": step,
            "parameters": parameters,
            "metrics": {name.partition("/")[2]: metrics[name] for name in metrics if name.startswith(prefix)} | counts,
        }
        for parameters, prefix in (("raw", "eval/"), ("ema", "eval_ema/"))
    ]


def _show(rows: list[dict[str, Any]], files: EvaluationFiles, heading: str | None) -> None:
    """Writes the JSON file, and prints the table or, if that is wanted, the JSON.

    Args:
      rows: the rows as they are written.
      files: where to write.
      heading: what is evaluated; None: several checkpoints, whose steps become a column.
    """
    files.write_json(rows)
    if files.json == STDOUT:
        print(json_text(rows), end="")
        return
    if heading is not None:
        print(heading)
    names = {"ema": "EMA"}
    first = [[] if heading is not None else [str(row["step"])] for row in rows]
    cells = [[*step, names.get(row["parameters"], row["parameters"])] for step, row in zip(first, rows, strict=True)]
    headings = ["parameters"] if heading is not None else ["step", "parameters"]
    print_rows(headings, [(cell, row["metrics"]) for cell, row in zip(cells, rows, strict=True)])
    unlabelled = rows[0]["metrics"].get("num_unlabelled")
    if unlabelled:
        print(f"{unlabelled:.0f} images without a label are left out")


def _given(argv: list[str]) -> tuple[_Weights | None, DataConfig]:
    """The weights that the options name, if they name any, and the data settings that the options change.

    Raises:
      ConfigError: the options name neither a run nor weights, or both; or these are not there; or weights are given
        without images.
    """
    from nfnet_flax.cli import recipe_options

    workdirs, references = list(values_of("--workdir", argv)), list(values_of("--weights", argv))
    if {"-h", "--help"} & set(argv):
        return None, Run(workdirs[0]).recipe.data if workdirs else recipe_options.example().data
    if len(workdirs) + len(references) != 1:
        found = "both" if workdirs and references else "several" if workdirs or references else "neither"
        raise ConfigError(f"nfnet eval: give --workdir DIR or --weights FILE; {found} of them are given")
    if workdirs:
        return None, Run(workdirs[0]).recipe.data
    return _weights_given(references[0], argv)


def _weights_given(reference: str, argv: list[str]) -> tuple[_Weights, DataConfig]:
    from nfnet_flax.training.evaluating import data_for, opened_weights

    roots = list(values_of("--data.source.root", argv))
    is_named = any(word.partition("=")[0] == "--data.source" for word in argv)
    if not roots and not is_named:
        raise ConfigError("--weights: give the images: --data.source.root DIR, or another set by --data.source NAME")
    source: SourceConfig = DigitsSource()
    if roots:
        root = roots[-1]
        source = FolderSource(root=root) if is_named else evaluation_source("data.source.root", root)
    info, arrays = opened_weights(reference)
    data = data_for(info, source)
    if data is None:
        if not any(word.partition("=")[0].replace("_", "-") == _IMAGE_SIZE for word in argv):
            raise ConfigError(
                f"weights {reference!r}: do not say how images are prepared: give {_IMAGE_SIZE} and what else differs "
                "from the defaults that --help shows: --data.eval-crop-margin, --data.eval-keeps-aspect, "
                "--data.resampler, --data.mean, --data.std"
            )
        data = DataConfig(source=source)
    return _Weights(info, arrays), data
