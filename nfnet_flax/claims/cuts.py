"""Normalizer-free against BatchNorm, by the cut of the batch: the study, and what it is made of.

The same images, the same order and the same number of updates, in a batch that is cut into parts of fewer and fewer
images. The cut stands for how many images each device gets: BatchNorm normalises each part by itself, as it does on
several devices whose statistics are not synchronised.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from nfnet_flax.claims.cell import Result
from nfnet_flax.claims.study import run_study
from nfnet_flax.config import require, require_count
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.source_config import DigitsSource
from nfnet_flax.models import ExecutionConfig, ModelConfig, NFResNetConfig, ResNetConfig
from nfnet_flax.optim import AGC, OptimConfig
from nfnet_flax.recipe import CheckpointConfig, Recipe
from nfnet_flax.runtime import xla_flags

BATCH_SIZE = 64
"""Number of images of an update, over all parts."""
NUM_CLASSES = 10
NETWORKS: Mapping[str, str] = MappingProxyType({"nf_resnet": "NF-ResNet", "resnet": "BatchNorm ResNet"})
"""Name of a network in cells and evidence -> its name in texts."""
_SAVES = 32
"""Number of checkpoints of a run: the first of them shows what the cut does before training amplifies it."""
_DEVICES_FLAG = "xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained."""

    images_per_part: tuple[int, ...] = (64, 32, 16, 8, 4)
    """Cuts of the batch: the number of images of each part."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices over which the same cut is divided."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 224
    """Number of updates of each run; 22.5 are an epoch."""
    image_size: int = 16
    """Height and width of the images, in pixels."""
    widths: tuple[int, ...] = (32, 64)
    depths: tuple[int, ...] = (1, 1)
    """Channels and residual blocks of the stages of both networks."""
    learning_rate: float = 0.1
    """Peak of the learning rate."""
    clipping: float = 0.16
    """Lambda of AGC for the normalizer-free network; 0: no clipping. BatchNorm is never clipped."""

    def __post_init__(self) -> None:
        for name, values in (("images_per_part", self.images_per_part), ("devices", self.devices)):
            remedy = f"give powers of two from 1 to {BATCH_SIZE}, each once, as a batch has {BATCH_SIZE} images"
            is_fitting = len(set(values)) == len(values) and all(
                value > 0 and BATCH_SIZE % value == 0 for value in values
            )
            require(is_fitting, name, values, remedy)
        remedy = "give at least two, as they are compared"
        require(len(self.images_per_part) >= 2, "images_per_part", self.images_per_part, remedy)
        require(len(self.devices) >= 2, "devices", self.devices, remedy)
        require(bool(self.seeds), "seeds", self.seeds, "give at least one")
        require_count("steps", self.steps)
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be positive")
        require(self.clipping >= 0, "clipping", self.clipping, "must be positive, or 0 for no clipping")

    @property
    def images_per_part_on_devices(self) -> int:
        """The cut that is divided over devices: with the most devices, each has one part."""
        return BATCH_SIZE // max(self.devices)

    @property
    def save_every_steps(self) -> int:
        """Number of steps between two checkpoints."""
        return max(1, self.steps // _SAVES)

    @property
    def compared_steps(self) -> tuple[int, ...]:
        """Steps at which the parameters of the cuts are compared: the first checkpoint, each time twice as many, and
        the last one."""
        found, step = [], self.save_every_steps
        while step < self.steps:
            found.append(step)
            step *= 2
        return (*found, self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One run of the study."""

    seed: int
    network: str
    """A key of `NETWORKS`."""
    images_per_part: int
    num_devices: int = 1

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.network}-{self.images_per_part}_images-{self.num_devices}_devices-seed_{self.seed}"


def cells(study: Study) -> tuple[Cell, ...]:
    """All runs of a study: every cut with every seed on one device, and one cut with the first seed on several."""
    cuts = [
        Cell(seed=seed, network=network, images_per_part=images)
        for seed in study.seeds
        for network in NETWORKS
        for images in study.images_per_part
    ]
    return tuple(dict.fromkeys([*on_devices(study), *cuts]))


def on_devices(study: Study) -> list[Cell]:
    """The runs that are alike but for the number of devices."""
    return [
        Cell(
            seed=study.seeds[0],
            network=network,
            images_per_part=study.images_per_part_on_devices,
            num_devices=count,
        )
        for network in NETWORKS
        for count in study.devices
    ]


def model_of(network: str, study: Study) -> ModelConfig:
    """The network of a cell. Neither has dropout or stochastic depth, so only BatchNorm can differ between training and
    evaluation mode."""
    if network == "nf_resnet":
        return NFResNetConfig(widths=study.widths, depths=study.depths, stem_width=study.widths[0], stochdepth_rate=0.0)
    return ResNetConfig(widths=study.widths, depths=study.depths, stem_width=study.widths[0])


def recipe_of(cell: Cell, study: Study) -> Recipe:
    """The recipe of a cell. Both networks have the same optimizer, Nesterov momentum with a cosine, but for AGC."""
    clipping = AGC(ratio=study.clipping) if cell.network == "nf_resnet" and study.clipping > 0 else None
    return Recipe(
        name=cell.name,
        model=model_of(cell.network, study),
        num_classes=NUM_CLASSES,
        data=DataConfig(
            source=DigitsSource(),
            image_size=study.image_size,
            eval_image_size=study.image_size,
            batch_size=BATCH_SIZE,
            eval_batch_size=BATCH_SIZE,
            num_threads=1,
        ),
        optim=OptimConfig(
            learning_rate=study.learning_rate,
            learning_rate_per_256=None,
            warmup_epochs=2.0,
            clipping=clipping,
            ema_decay=0.99,
        ),
        execution=ExecutionConfig(num_microbatches=BATCH_SIZE // cell.images_per_part),
        checkpoint=CheckpointConfig(
            every_steps=study.save_every_steps, keep_last=study.steps, best_metric="eval/loss", best_is="lowest"
        ),
        seed=cell.seed,
        num_steps=study.steps,
        log_every_steps=study.save_every_steps,
        eval_every_steps=study.steps,
        tensorboard=False,
    )


def recipes(study: Study) -> dict[str, Recipe]:
    """Name of each cell -> its run."""
    return {cell.name: recipe_of(cell, study) for cell in cells(study)}


def run(study: Study, folder: Path, *, num_jobs: int) -> dict[Cell, Result]:
    """Trains what has no result yet, on CPUs; arguments and errors as for `run_study`."""
    of_name = {cell.name: cell for cell in cells(study)}
    variables = {name: variables_of(cell) for name, cell in of_name.items()}
    found = run_study(recipes(study), folder, num_jobs=num_jobs, variables=variables)
    return {of_name[name]: result for name, result in found.items()}


def variables_of(cell: Cell) -> dict[str, str]:
    """Variables of the process of a cell: only CPUs can be taken for several devices."""
    flags = {**xla_flags(), _DEVICES_FLAG: str(cell.num_devices)}
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in flags.items())}
