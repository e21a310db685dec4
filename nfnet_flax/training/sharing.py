"""Writes the weights of a run as a folder for a model hub, with a description made from the run."""

import os
from pathlib import Path

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import to_json
from nfnet_flax.json_files import write_json, write_whole
from nfnet_flax.models import NFNetConfig
from nfnet_flax.paths import local_path
from nfnet_flax.training.reading import Parameters, Run, Which, weights_at
from nfnet_flax.units import metric_text
from nfnet_flax.weights.files import write_safetensors
from nfnet_flax.weights.hub import CONFIG, WEIGHTS
from nfnet_flax.weights.portable import WeightsInfo
from nfnet_flax.weights.timm_folder import folder_files

_CARD = "README.md"
_MAX_CLASSES = 100
"""Largest number of class names that the description lists; all of them are in `config.json`."""


def write_hub_folder(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    parameters: Parameters,
    checkpoint: Which = "newest",
    overwrite: bool = False,
) -> Path:
    """Writes `model.safetensors`, `config.json` and `README.md`, as model hubs hold them, and returns the folder.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it, and `hf-hub:` after an upload; so does
    `open_weights`, which gets back the exact configuration.

    Args:
      workdir: folder of the run.
      out: the folder; it is made if it is missing.
      parameters: "ema" for the moving average, or "raw" for the parameters as trained.
      checkpoint: which checkpoint; see `Run.weights`.
      overwrite: whether to replace existing files.

    Raises:
      ConfigError: the folder holds no run or no such checkpoint, timm has no such network, or a file cannot be written
        or exists already.
      StorageFailed: the run's folder cannot be read.
    """
    run = Run(workdir)
    folder = local_path("out", out)
    there = [name for name in (WEIGHTS, CONFIG, _CARD) if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(f"out = {os.fspath(out)!r}: holds {there[0]} already: give another folder, or --overwrite")
    step, info, arrays = weights_at(run, parameters, checkpoint)
    config, tensors = folder_files(info, arrays)
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"}, overwrite=overwrite)
    try:
        write_json(folder / CONFIG, config)
        write_whole(folder / _CARD, _card(run, step, info, config["architecture"]).encode())
    except OSError as error:
        raise ConfigError(f"out = {os.fspath(out)!r} cannot be written: {error}") from error
    return folder


def _card(run: Run, step: int, info: WeightsInfo, architecture: str) -> str:
    """The description in Markdown, with the header that hubs read."""
    recipe = run.recipe
    names = info.class_names or ()
    more = f" and {len(names) - _MAX_CLASSES} more" if len(names) > _MAX_CLASSES else ""
    made = "moving average of the parameters" if info.parameters == "ema" else "parameters as trained"
    lines = [
        "---",
        "tags:\n- image-classification\n- timm\n- nfnet_flax",
        "pipeline_tag: image-classification\nlibrary_name: timm",
        "---",
        f"# {recipe.name}\n",
        f"Network `{architecture}`, trained with nfnet_flax; {made} after {step} updates of {recipe.data.batch_size} "
        f"images.\n",
        "| | |\n|---|---|",
        f"| classes | {info.num_classes}: {_cell(', '.join(names[:_MAX_CLASSES]))}{more} |",
        f"| images | {type(recipe.data.source).__name__}, {recipe.data.image_size} px in training |",
        f"| objective | {type(recipe.objective).__name__} |",
        f"| optimizer | {type(recipe.optim.method).__name__} |",
        f"| start | {_cell(recipe.init_from or 'random parameters')} |",
        f"| seed | {recipe.seed} |",
        *(f"| {name} | {text} |" for name, text in _results(run, step, info)),
        *_notes(info),
        "\n```python",
        'import timm\n\nmodel = timm.create_model("hf-hub:ORGANIZATION/NAME", pretrained=True)',
        "```",
        "\n```python",
        'import nfnet_flax\n\nmodel = nfnet_flax.load_model("hf-hub:ORGANIZATION/NAME")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table: it ends neither the cell nor the line."""
    return " ".join(text.replace("|", "\\|").split())


def _results(run: Run, step: int, info: WeightsInfo) -> list[tuple[str, str]]:
    """The metrics of these parameters on the held-out images, if they were evaluated at this step."""
    prefix = "eval_ema/" if info.parameters == "ema" else "eval/"
    row = next((row for row in run.metrics() if row["step"] == step), {})
    found = [(name.removeprefix(prefix), value) for name, value in row.items() if name.startswith(prefix)]
    return [
        (f"held-out {heading}", text)
        for name, value in found
        if value is not None
        for heading, text in [metric_text(name, value)]
    ]


def _notes(info: WeightsInfo) -> list[str]:
    """How timm's results differ, in sentences."""
    found = []
    if info.preprocessing is not None and info.preprocessing.resampler == "area_cubic":
        found.append(
            "\nIn training and evaluation, images were resized by averaging over areas and bicubic interpolation "
            "(`area_cubic`), which timm does not have: it resizes by the antialiased bicubic of Pillow, which "
            "differs by less than a grey level on average."
        )
    return found + _note_on_form(info)


def _note_on_form(info: WeightsInfo) -> list[str]:
    if not isinstance(info.model, NFNetConfig) or info.model.standardization == "timm":
        return []
    kept = {name: to_json(info.model)[name] for name in ("activation", "standardization")}
    return [
        f"\nThe network was trained in the published form ({kept}); timm computes the exact gelu and another small "
        "constant in the standardization, so its outputs differ slightly."
    ]
