"""What a plan says, whatever its size; the compiler itself needs libtpu."""

import dataclasses
from pathlib import Path

import jax
import pytest

from nfnet_flax.models.classifier import Rematerialization
from nfnet_flax.objectives import Distillation
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.programs.plan import Plan, describe
from nfnet_flax.programs.search import fastest
from nfnet_flax.programs.step_plan import lower_step
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.units import duration, scaled
from tests import own_files, runs
from tests.networks import SMALL
from tests.test_objectives import NUM_CLASSES, teacher_file

DIGITS = Plan(
    topology="v5e:1x1",
    device_kind="TPU v5 lite",
    num_devices=1,
    images_per_device=4,
    images_per_turn=4,
    batch_size=4,
    image_size=32,
    rematerialization="none",
    num_parameters=190_000,
    parameter_bytes=760_000,
    state_bytes=2_280_000,
    temporary_bytes=3_100_000,
    peak_bytes=6_400_000,
    hbm_bytes=16 * 2**30,
    flops=2.1e8,
    collectives={"all-reduce": 9_500},
    cycles=84_000,
    clock_hz=1.5e9,
    most_expensive=[("convolution of the stem", 1_250), ("head", 40)],
    compile_s=7.0,
)
"""Numbers as of the digits' network."""


def test_a_small_plan_shows_no_zeros() -> None:
    text = describe(DIGITS)
    assert "parameters 742.2 KiB, optimizer and EMA 1.4 MiB, within the step 3.0 MiB" in text
    assert "peak 6.1 MiB of 16.0 GiB: fits" in text
    assert "FLOPs per device and step: 210 M" in text
    assert "all-reduce: 9.50 kB per device and step" in text
    assert "84.0 k cycles = 56.0 µs at 1.50 GHz" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["1.25", "k", "convolution", "of", "the", "stem"],
        ["40", "head"],
    ]
    assert not any(zero in text for zero in (" 0 ", "0.0 ", "0.00 "))


def test_a_large_plan_keeps_three_digits() -> None:
    large = dataclasses.replace(DIGITS, peak_bytes=20 * 2**30, flops=2.2493e13, cycles=1_668_000_000)
    text = describe(large)
    assert "peak 20.0 GiB of 16.0 GiB: DOES NOT FIT" in text
    assert "FLOPs per device and step: 22.5 T" in text
    assert "1.67 G cycles = 1112.0 ms" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1.00 k"), (31.04e6, "31.0 M"), (645e9, "645 G"), (2e15, "2000 T")],
)
def test_numbers_have_three_digits_and_a_prefix(number: float, text: str) -> None:
    assert scaled(number) == text


def test_a_duration_has_the_unit_that_shows_it() -> None:
    assert (duration(1.0333), duration(0.02061), duration(56e-6)) == ("1033.3 ms", "20.6 ms", "56.0 µs")


def test_a_network_of_ones_own_is_planned(tmp_path: Path) -> None:
    state, lowered = lower_step(load_recipe(own_files.write(tmp_path)), make_mesh(jax.devices()[:1]))
    assert state.params["stem.kernel"].shape == (3, 3, 3, 8)
    assert "stem" in lowered.as_text(debug_info=True)


def test_a_step_with_a_teacher_is_planned_without_images(tmp_path: Path) -> None:
    recipe = load_recipe(runs.DIGITS)
    taught = dataclasses.replace(
        recipe,
        model=SMALL["nf_regnet"],
        num_classes=NUM_CLASSES,
        data=dataclasses.replace(recipe.data, batch_size=8),
        objective=Distillation(teacher=str(teacher_file("resnet", tmp_path))),
    )
    state, lowered = lower_step(taught, make_mesh(jax.devices()[:1]))
    (of_state, of_batch, of_teacher), _ = lowered.args_info
    assert jax.tree.map(lambda leaf: leaf.shape, of_state) == jax.tree.map(lambda leaf: leaf.shape, state)
    assert of_batch["image"].shape == (8, 32, 32, 3)
    assert of_teacher["head.kernel"].shape == (32, NUM_CLASSES)


CYCLES = {1: 120, 2: 115, 4: 115, 8: 60, 16: 53}
"""Millions of cycles per image of F5 on a v5e, by the number of images at a time, where fewer than 8 waste memory."""


def plans(gib_per_image: float) -> tuple[list[tuple[Rematerialization, int]], Plan]:
    """Searches with 16 GiB of memory; returns what was tried, and what was chosen."""
    tried = []

    def plan_of(rematerialization: Rematerialization, images: int) -> Plan:
        tried.append((rematerialization, images))
        factor, slower = {"none": (1.0, 1.0), "blocks": (0.25, 1.3), "full": (0.1, 1.6)}[rematerialization]
        return dataclasses.replace(
            DIGITS,
            rematerialization=rematerialization,
            images_per_turn=images,
            images_per_device=16,
            peak_bytes=int((1 + gib_per_image * images * factor) * 2**30),
            cycles=int(CYCLES[images] * 16e6 * slower),
        )

    return tried, fastest([16, 8, 4, 2, 1], plan_of)


def test_what_fits_at_once_is_not_cut() -> None:
    tried, chosen = plans(gib_per_image=0.5)
    assert tried == [("none", 16), ("none", 8)]
    assert (chosen.rematerialization, chosen.images_per_turn) == ("none", 16)


def test_more_images_at_a_time_can_be_worth_rematerialization() -> None:
    tried, chosen = plans(gib_per_image=3.0)
    assert tried == [*(("none", images) for images in (16, 8, 4, 2)), ("blocks", 16), ("blocks", 8)]
    assert (chosen.rematerialization, chosen.images_per_turn) == ("blocks", 16)


def test_if_nothing_fits_the_plan_with_the_least_memory_is_shown() -> None:
    _, chosen = plans(gib_per_image=200.0)
    assert not chosen.fits
    assert (chosen.rematerialization, chosen.images_per_turn) == ("full", 1)
