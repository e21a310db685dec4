"""The time of a training step of NFNets and EfficientNets, as ratios to EfficientNet-B7 (arXiv 2102.06171, figure 1).

Here it is the TPU compiler's estimate of the step; `latency_pair.py` measures it on the devices at hand. Both give
`Step`s, of which `latency_shown.py` makes tables and the picture.
"""

import dataclasses
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from nfnet_flax.claims import published
from nfnet_flax.claims.compiled_step import Compiled, compiled, prepared_folder, without_images
from nfnet_flax.config import ConfigError
from nfnet_flax.imagenet import imagenet_recipe
from nfnet_flax.models import IMAGE_SIZES, ImageSizes, model_config
from nfnet_flax.models.classifier import Rematerialization
from nfnet_flax.models.layers import ComputeDtype
from nfnet_flax.optim import OptimConfig, SAMConfig
from nfnet_flax.progress import tracking
from nfnet_flax.recipe import Recipe

CLAIM = "latency"
REFERENCE = "efficientnet_b7"
"""The network that the others are compared with."""
NFNETS = tuple(published.STEP_MS)
EFFICIENTNETS = tuple(f"efficientnet_b{number}" for number in range(8))
NETWORKS = (*NFNETS, *EFFICIENTNETS)
_USED = re.compile(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm")
"""What the TPU compiler says of a program that does not fit."""


class Form(NamedTuple):
    """A way to compute the images of a device."""

    images_at_a_time: int
    rematerialization: Rematerialization


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The training step of one network in one place."""

    network: str
    place: str
    """A topology such as `v3:2x2`, or the kind and number of the devices on which it was measured."""
    image_size: int
    """Height and width of the images, in pixels."""
    images: int
    """Number of images of each device."""
    images_at_a_time: int
    """Number of these that are computed at a time."""
    rematerialization: str
    peak_bytes: int | None
    """Memory of each device by the compiler; None: it does not tell."""
    seconds: float | None
    """Time of the step; None: the clock of the device is not known, or there is no program."""
    cycles: int | None
    """The compiler's estimate; None: the step was measured, or there is no program."""
    flops: float | None
    """FLOPs of the convolutions and matrix products of a device; None: as for `cycles`."""
    ratio: float | None
    """Time of the step of `REFERENCE` divided by that of this step; None: one of them is not known."""
    problem: str
    """Why there is no step; empty: there is one."""
    operations: list[tuple[str, int]]
    """The most expensive operations and their estimated cycles; empty if the step was measured."""


def recipe_of(
    name: str,
    form: Form,
    *,
    images: int,
    num_devices: int,
    compute_dtype: ComputeDtype = "bfloat16",
    image_size: int | None = None,
) -> Recipe:
    """The training of a network as it was published, but with gradients added in the fastest order.

    NFNets have AGC, and F6 has SAM; EfficientNets have neither, and momentum in place of the published RMSProp, which
    would keep one more array for each parameter.

    Args:
      name: one of `NETWORKS`.
      form: how the images of a device are computed.
      images: number of images of each device.
      num_devices: number of devices.
      compute_dtype: type of the computation.
      image_size: height and width of the images, in pixels; None: the published training size.

    Raises:
      ConfigError: the images cannot be computed in parts of that size.
    """
    sam = SAMConfig() if name == "nfnet_f6" else None
    sizes = IMAGE_SIZES[name] if image_size is None else ImageSizes(train=image_size, test=image_size)
    recipe = imagenet_recipe(
        name,
        model_config(name, compute_dtype=compute_dtype),
        sizes,
        OptimConfig(sam=sam) if name in NFNETS else OptimConfig(clipping=None),
        num_epochs=published.NUM_EPOCHS,
        batch_size=images * num_devices,
        images_per_part=form.images_at_a_time,
    )
    execution = dataclasses.replace(recipe.execution, reproducible=False, rematerialization=form.rematerialization)
    return dataclasses.replace(without_images(recipe), execution=execution, platform="any")


def forms(images: int, most_at_a_time: int | None = None) -> Iterator[Form]:
    """Ways to compute a number of images, from the one that is fastest if it fits: as many at a time as are allowed,
    half of them, and a quarter, first without rematerialization.

    Args:
      images: number of images.
      most_at_a_time: a divisor of it; None: all.
    """
    most = most_at_a_time or images
    for rematerialization in ("none", "blocks"):
        for parts in (1, 2, 4):
            if most % parts == 0:
                yield Form(most // parts, rematerialization)


def estimated_steps(
    names: Sequence[str],
    topologies: Sequence[str],
    folder: Path,
    *,
    images: int,
    at_a_time: Mapping[str, int],
    num_jobs: int,
    timeout_s: float,
) -> list[Step]:
    """The compiler's estimates of all networks on all topologies; what `folder` has already is not compiled again.

    Args:
      names: networks; `REFERENCE` must be one of them.
      topologies: kinds and numbers of TPU chips, such as `v3:2x2`.
      folder: has a file for each compilation, written as soon as it has ended.
      images: number of images of each device.
      at_a_time: network -> largest number of them that are computed at a time; all, of a network that is not in it.
      num_jobs: number of compilations at the same time.
      timeout_s: time limit of one compilation, in seconds.

    Raises:
      ConfigError: libtpu is missing or does not know a topology, or a file in the folder is damaged.
      StorageFailed: a file cannot be read.
    """
    from nfnet_flax.programs.plan import devices_of

    pairs = [(name, topology, len(devices_of(topology))) for topology in topologies for name in names]
    stopped = threading.Event()
    with tracking("estimating", len(pairs), "steps", at_once=True) as task, ThreadPoolExecutor(num_jobs) as pool:

        def estimate(name: str, topology: str, num_devices: int) -> Step:
            def compile_for(form: Form) -> Compiled:
                place = folder_of(name, form, topology, folder, images=images, num_devices=num_devices)
                return compiled(place, topology, form.rematerialization, timeout_s, stopped)

            tried = list(forms(images, at_a_time.get(name)))
            step = _estimated(name, topology, images, tried, compile_for)
            task.advance()
            return step

        futures = [pool.submit(estimate, *pair) for pair in pairs]
        try:
            steps = [future.result() for future in futures]
        except BaseException:
            stopped.set()  # leaving the pool waits for what has begun
            pool.shutdown(cancel_futures=True)
            raise
    return with_ratios(steps)


def folder_of(name: str, form: Form, topology: str, folder: Path, *, images: int, num_devices: int) -> Path:
    """The prepared folder of the compilations of a network that differ in rematerialization alone.

    Raises:
      ConfigError: it is that of another recipe, or cannot be made.
    """
    recipe = recipe_of(name, form._replace(rematerialization="none"), images=images, num_devices=num_devices)
    return prepared_folder(folder, recipe, topology)


def _estimated(
    name: str, topology: str, images: int, tried: Sequence[Form], compile_for: Callable[[Form], Compiled]
) -> Step:
    """The estimate of the first form that fits; of the last one, with its problem, if none fits."""
    form, found = first_that_fits(tried, compile_for)
    plan = found.plan
    fits = plan is not None and plan.fits
    return Step(
        network=name,
        place=topology,
        image_size=IMAGE_SIZES[name].train,
        images=images,
        images_at_a_time=form.images_at_a_time,
        rematerialization=form.rematerialization,
        peak_bytes=None if plan is None else plan.peak_bytes,
        seconds=plan.cycles / plan.clock_hz if plan is not None and fits and plan.clock_hz is not None else None,
        cycles=plan.cycles if plan is not None and fits else None,
        flops=plan.flops if plan is not None and fits else None,
        ratio=None,
        problem="" if fits else (found.problem or "does not fit"),
        operations=plan.most_expensive if plan is not None and fits else [],
    )


def first_that_fits(tried: Sequence[Form], compile_for: Callable[[Form], Compiled]) -> tuple[Form, Compiled]:
    """The first form whose program fits into the memory of a device; the last that was tried if none fits.

    A form is left out if, by what the compiler said of more images at a time, its memory in proportion would be too
    much; and none is tried after one that did not compile for another reason, such as a time limit.
    """
    too_large: dict[str, tuple[int, float]] = {}
    """Rematerialization -> images at a time that do not fit, and how many times the memory they need."""
    last: tuple[Form, Compiled] | None = None
    for form in tried:
        known = too_large.get(form.rematerialization)
        is_hopeless = known is not None and form.images_at_a_time / known[0] * known[1] > 1.1
        if is_hopeless and form is not tried[-1]:
            continue
        last = form, compile_for(form)
        found = last[1]
        if not found.is_too_large:
            break
        if (excess := memory_excess(found)) is not None:
            too_large[form.rematerialization] = form.images_at_a_time, excess
    assert last is not None, tried
    return last


def memory_excess(found: Compiled) -> float | None:
    """How many times the memory of a device a program needs that does not fit; None: not known."""
    if found.plan is not None:
        return found.plan.peak_bytes / found.plan.hbm_bytes
    if (said := _USED.search(found.problem)) is None:
        return None
    used, limit = (float(said[place]) * {"G": 1024, "M": 1}[said[place + 1]] for place in (1, 3))
    return used / limit


def with_ratios(steps: Sequence[Step]) -> list[Step]:
    """The steps with their ratios to the step of `REFERENCE` in the same place, where these are estimates."""
    reference = {step.place: step.cycles for step in steps if step.network == REFERENCE}
    return [
        dataclasses.replace(step, ratio=cycles / step.cycles)
        if step.cycles is not None and (cycles := reference.get(step.place)) is not None
        else step
        for step in steps
    ]


def data_of(steps: Sequence[Step]) -> dict[str, Any]:
    """What was found, for `evidence.json`."""
    return {"steps": [dataclasses.asdict(step) for step in steps]}


def steps_of(data: dict[str, Any]) -> list[Step]:
    """The inverse of `data_of`, also after it was JSON.

    Raises:
      ConfigError: the evidence has another form.
    """
    try:
        return [
            Step(**{**stored, "operations": [(str(name), int(cycles)) for name, cycles in stored["operations"]]})
            for stored in data["steps"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"evidence of another form ({error}): run nfnet claim {CLAIM} again") from error
