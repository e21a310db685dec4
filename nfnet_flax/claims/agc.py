"""Claim: adaptive gradient clipping trains normalizer-free networks at learning rates and batch sizes at which they
diverge without it, and plain clipping needs its threshold tuned (arXiv 2102.06171, section 4, figures 2a and 2b).

The paper trains ResNets on ImageNet; this trains small ones on scikit-learn's digits, strongly augmented. The learning
rate grows linearly with the batch size, as in the paper.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from nfnet_flax.claims.cell import Result
from nfnet_flax.config import Shown, check_types, require, require_count
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.digits import num_digits
from nfnet_flax.data.mixing_config import RandAugmentConfig
from nfnet_flax.data.source_config import DigitsSource
from nfnet_flax.models import ExecutionConfig, ModelConfig, NFResNetConfig, ResNetConfig
from nfnet_flax.optim import AGC, GlobalNorm, OptimConfig, ParamGroup
from nfnet_flax.optim.clipping import Clipping
from nfnet_flax.recipe import CheckpointConfig, Recipe

Kind = Literal["BatchNorm", "no clipping", "AGC", "global norm"]
PUBLISHED_EXEMPT, SKIP_GAINS = "the last dense layer", "the last dense layer, skip gains"
_SHAPE: dict[str, Any] = {"widths": (32, 64, 128), "depths": (1, 1, 1), "stem_width": 16}
"""Of both networks: about 35,000 parameters."""
_HEAD, _STEM, _REST = ParamGroup("head.kernel", 0.0), ParamGroup("stem.kernel", 0.0), ParamGroup("*", 1.0)
EXEMPTIONS: dict[str, tuple[ParamGroup, ...]] = {
    "nothing": (_REST,),
    "the first convolution": (_STEM, _REST),
    "the last dense layer": (_HEAD, _REST),
    "both": (_STEM, _HEAD, _REST),
}
"""What AGC does not clip -> the groups that say so. The last dense layer is published."""
SKIP_GAINS_FREE = (_HEAD, ParamGroup("*skip_gain", 0.0), _REST)
"""The published exemption, and the skip gains, which begin at zero: AGC lets a unit that is zero move by lambda * eps
times the learning rate in a step, and a short run ends before they have grown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, and how long each run is."""

    batch_sizes: Annotated[tuple[int, ...], Shown("N ...")] = (64, 256, 1024)
    """Batch sizes of the runs."""
    ratios: Annotated[tuple[float, ...], Shown("X ...")] = (0.01, 0.04, 0.16, 0.64)
    """Values of lambda of AGC: the largest ratio of the norm of a gradient to that of its parameters."""
    max_norms: Annotated[tuple[float, ...], Shown("X ...")] = (0.01, 0.1, 1.0, 10.0, 100.0)
    """Thresholds of clipping by the norm of the whole gradient."""
    learning_rate_per_256: Annotated[float, Shown("X")] = 0.4
    """Peak learning rate for a batch of 256; it grows linearly with the batch size."""
    num_epochs: Annotated[float, Shown("X")] = 40.0
    """Length of each run."""
    warmup_epochs: Annotated[float, Shown("X")] = 5.0
    """Length of the linear warm-up."""
    exempt_batch_size: Annotated[int, Shown("N")] = 256
    """Batch size of the runs that compare which layers AGC leaves out."""
    exempt_ratio: Annotated[float, Shown("X")] = 0.16
    """Lambda of the runs that compare which layers AGC leaves out."""
    seeds: Annotated[int, Shown("N")] = 3
    """Number of runs of each setting, which differ in the seed."""
    first_seed: Annotated[int, Shown("N")] = 0
    """Seed of the first run of each setting; the others have the next ones."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_sizes", "ratios", "max_norms"):
            values = getattr(self, name)
            is_set = bool(values) and min(values) > 0 and len(set(values)) == len(values)
            require(is_set, name, values, "give different positive numbers")
        require_count("seeds", self.seeds)
        require_count("exempt_batch_size", self.exempt_batch_size)
        require(self.exempt_ratio > 0, "exempt_ratio", self.exempt_ratio, "must be positive")
        remedy = f"must not be longer than the run: give at most num_epochs, {self.num_epochs:g}"
        require(self.warmup_epochs <= self.num_epochs, "warmup_epochs", self.warmup_epochs, remedy)
        require(self.first_seed >= 0, "first_seed", self.first_seed, "must not be negative")


@dataclasses.dataclass(frozen=True)
class Method:
    """How a network is trained, apart from batch size and seed."""

    kind: Kind
    value: float | None
    """Lambda or threshold; None: there is none."""
    exempt: str
    """What AGC does not clip."""
    model: ModelConfig
    clipping: Clipping | None

    @property
    def key(self) -> str:
        """Name of a folder."""
        words = [self.kind, *([] if self.value is None else [f"{self.value:g}"]), self.exempt.replace(",", " and")]
        return "-".join(words).strip("-").replace(" ", "-")


def check_batches(study: Study) -> None:
    """Checks that there are enough images for each batch.

    Raises:
      ConfigError: there are not, or scikit-learn, which contains them, is missing.
    """
    most = num_digits("train")
    remedy = f"must be at most {most:,}, the number of training images"
    require(max(study.batch_sizes) <= most, "batch_sizes", study.batch_sizes, remedy)
    require(study.exempt_batch_size <= most, "exempt_batch_size", study.exempt_batch_size, remedy)


def methods(study: Study) -> Iterator[Method]:
    """The methods that are compared at all batch sizes."""
    network = NFResNetConfig(**_SHAPE, stochdepth_rate=0.0)
    yield Method("BatchNorm", None, "", ResNetConfig(**_SHAPE), None)
    yield Method("no clipping", None, "", network, None)
    for exempt, groups in ((PUBLISHED_EXEMPT, EXEMPTIONS[PUBLISHED_EXEMPT]), (SKIP_GAINS, SKIP_GAINS_FREE)):
        for ratio in study.ratios:
            yield Method("AGC", ratio, exempt, network, AGC(ratio=ratio, groups=groups))
    for norm in study.max_norms:
        yield Method("global norm", norm, "", network, GlobalNorm(max_norm=norm))


def exempting(study: Study) -> Iterator[Method]:
    """The methods that exempt other layers, at one batch size."""
    network, ratio = NFResNetConfig(**_SHAPE, stochdepth_rate=0.0), study.exempt_ratio
    for exempt, groups in EXEMPTIONS.items():
        yield Method("AGC", ratio, exempt, network, AGC(ratio=ratio, groups=groups))


def recipe(study: Study, method: Method, batch_size: int, seed: int) -> Recipe:
    """The run of one cell."""
    never = 10**6
    return Recipe(
        name=method.kind,
        model=method.model,
        num_classes=10,
        data=DataConfig(
            source=DigitsSource(),
            image_size=32,
            eval_image_size=32,
            batch_size=batch_size,
            randaugment=RandAugmentConfig(num_layers=2, magnitude=5.0),
            num_threads=1,
        ),
        optim=OptimConfig(
            learning_rate_per_256=study.learning_rate_per_256,
            warmup_epochs=study.warmup_epochs,
            clipping=method.clipping,
            ema_decay=0.99,
        ),
        execution=ExecutionConfig(num_microbatches=1),
        checkpoint=CheckpointConfig(every_steps=never, every_minutes=1.0, keep_last=1, best_metric="eval/top1"),
        seed=seed,
        num_epochs=study.num_epochs,
        log_every_steps=50,
        eval_every_steps=never,
        tensorboard=False,
    )


def cells(study: Study) -> dict[str, tuple[Method, int, int]]:
    """Name of each cell -> method, batch size and seed."""
    runs = [(method, size) for size in study.batch_sizes for method in methods(study)]
    runs += [(method, study.exempt_batch_size) for method in exempting(study)]
    seeds = range(study.first_seed, study.first_seed + study.seeds)
    return {f"batch-{size}/{method.key}/seed-{seed}": (method, size, seed) for method, size in runs for seed in seeds}


def recipes(study: Study) -> dict[str, Recipe]:
    """Name of each cell -> its run."""
    return {name: recipe(study, *cell) for name, cell in cells(study).items()}


def measured(study: Study, results: Mapping[str, Result]) -> dict[str, Any]:
    """What was measured, for `evidence.json`."""
    found = []
    for name, (method, batch_size, seed) in cells(study).items():
        result = results[name]
        about = {"kind": method.kind, "value": method.value, "exempt": method.exempt}
        outcome = {"outcome": result.outcome, "step": result.step}
        accuracy = {"top1": result.metrics.get("eval/top1"), "loss": result.metrics.get("eval/loss")}
        found.append({**about, "batch_size": batch_size, "seed": seed, **outcome, **accuracy})
    return {"study": dataclasses.asdict(study), "cells": found}
