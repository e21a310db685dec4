"""What a plan says, whatever its size; the compiler itself needs libtpu."""

import dataclasses

import pytest

from nfnet_flax.programs.plan import Plan, describe
from nfnet_flax.units import duration, scaled

DIGITS = Plan(
    topology="v5e:1x1",
    device_kind="TPU v5 lite",
    num_devices=1,
    images_per_device=4,
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
    dearest=[("convolution of the stem", 1_250), ("head", 40)],
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
