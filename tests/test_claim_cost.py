"""`nfnet claim cost`: which program is chosen, what is kept, and how costs follow from it. The compiler itself needs
libtpu, as in `test_plan.py`."""

import dataclasses
from pathlib import Path

import pytest

from nfnet_flax import cli
from nfnet_flax.claims import cost, published
from nfnet_flax.claims.child import prepare_folder
from nfnet_flax.claims.compiled_step import Compiled, compiled, compiled_of, libtpu_version
from nfnet_flax.claims.evidence import evidence, read_evidence, write_evidence
from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import differences, to_json
from nfnet_flax.exit_codes import EXIT_WRONG
from nfnet_flax.json_files import write_json
from nfnet_flax.models.classifier import Rematerialization
from nfnet_flax.programs import plan
from nfnet_flax.recipe import Recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.runtime import versions
from tests.runs import DIGITS as DIGITS_RECIPE
from tests.runs import ROOT
from tests.test_cli import fails
from tests.test_plan import DIGITS

TOPOLOGY = "v5e:2x4"
PLAN = dataclasses.replace(
    DIGITS, topology=TOPOLOGY, num_devices=8, images_per_device=512, images_per_turn=16, most_expensive=[("head", 40)]
)


def small_recipe() -> Recipe:
    """A recipe whose step the compiler would compile in seconds."""
    return load_recipe(str(DIGITS_RECIPE))


def result(rematerialization: Rematerialization = "none", *, gib: int = 1, cycles: int = 1_500_000_000) -> Compiled:
    """A compilation whose step takes a second on a v5e, if nothing else is said."""
    plan = dataclasses.replace(PLAN, rematerialization=rematerialization, peak_bytes=gib * 2**30, cycles=cycles)
    made_by = {name: versions()[name] for name in ("nfnet_flax", "jax")}
    return Compiled(
        rematerialization=rematerialization, plan=plan, num_chips=8, libtpu=libtpu_version(), versions=made_by
    )


def estimate(found: Compiled, network: str = "nfnet_f0", topology: str = TOPOLOGY) -> cost.Estimate:
    return cost.Estimate(network=network, topology=topology, num_steps=36_000, compiled=found)


@pytest.mark.parametrize("name", cost.RUNS)
def test_runs_are_those_of_the_recipe(name: str) -> None:
    ours, theirs = cost.recipe_of(name, 16), load_recipe(f"{ROOT}/recipes/nfnet_imagenet.py:variant={name[-2:]}")
    for field in ("model", "optim", "execution", "objective"):
        assert differences(to_json(getattr(ours, field)), to_json(getattr(theirs, field))) == []
    for field in ("image_size", "batch_size"):
        assert getattr(ours.data, field) == getattr(theirs.data, field)
    assert (ours.num_classes, ours.num_epochs) == (theirs.num_classes, theirs.num_epochs)
    assert ours.total_steps(published.NUM_IMAGES) == theirs.total_steps(1_281_167) == 112_603


def test_the_program_that_fits_and_computes_least_again_is_chosen() -> None:
    tried: list[str] = []

    def compile_for(kind: Rematerialization) -> Compiled:
        tried.append(kind)
        return result(kind, gib={"none": 20, "blocks": 15, "full": 2}[kind])

    assert cost.first_that_fits(compile_for).rematerialization == "blocks"
    assert tried == ["none", "blocks"]
    none_fits = cost.first_that_fits(lambda kind: result(kind, gib=20))
    assert none_fits.rematerialization == "full"
    too_slow = dataclasses.replace(result(), plan=None, problem="did not compile within 9 s", limit_s=9.0)
    assert cost.first_that_fits(lambda kind: too_slow) is too_slow
    killed = dataclasses.replace(too_slow, problem="the compilation ended with exit code -9", limit_s=None)
    assert cost.first_that_fits(lambda kind: killed) is killed
    refused = dataclasses.replace(killed, problem="the step does not compile for v5e:2x4: RESOURCE_EXHAUSTED: hbm")
    assert cost.first_that_fits(lambda kind: refused if kind == "none" else result(kind)).rematerialization == "blocks"


def rows(*estimates: cost.Estimate, rates: dict[str, float], clocks_hz: dict[str, float]) -> list[list[str]]:
    """The cells of the table."""
    found = evidence("cost", "a test", cost.data_of(estimates, rates, clocks_hz))
    lines = cost.tables(found)["estimates"].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_costs_follow_from_the_step() -> None:
    unknown = dataclasses.replace(PLAN, clock_hz=None, cycles=2_000_000_000)
    on_v6e = estimate(dataclasses.replace(result(), plan=unknown), topology="v6e:2x4")
    too_large = estimate(result("full", gib=20))
    failed = estimate(dataclasses.replace(result(), plan=None, num_chips=0, problem="no | yes"))
    all_rows = rows(estimate(result()), on_v6e, too_large, failed, rates={"v5e": 1.25}, clocks_hz={})
    assert all_rows[0] == [
        *("nfnet_f0", TOPOLOGY, "8", "512", "16", "none", "1.0 GiB of 16.0 GiB"),
        *("1.50 G cycles = 1000.0 ms", "0.4", "80", "100"),
    ]
    assert all_rows[1][7:] == ["2.00 G cycles", "", "", ""]
    assert all_rows[2][6:] == ["20.0 GiB of 16.0 GiB (DOES NOT FIT)", "1.50 G cycles = 1000.0 ms", "", "", ""]
    assert all_rows[3][2:] == ["", "", "", "none", "", "no / yes", "", "", ""]
    (with_clock,) = rows(on_v6e, rates={}, clocks_hz={"v6e": 1e9})
    assert with_clock[7:] == ["2.00 G cycles = 2000.0 ms", "0.8", "160", ""]


def test_two_devices_on_a_chip_are_one_chip() -> None:
    (row,) = rows(estimate(dataclasses.replace(result(), num_chips=4)), rates={}, clocks_hz={})
    assert (row[2:5], row[6], row[9]) == (["4", "1024", "32"], "2.0 GiB of 32.0 GiB", "40")


def test_the_text_says_what_is_not_included(tmp_path: Path) -> None:
    made = evidence("cost", "nfnet claim cost", cost.data_of([estimate(result())], {}, {}))
    found = read_evidence(write_evidence(made, tmp_path), "cost")
    assert cost.text(found) == cost.text(made)
    for words in ("nothing was measured", "Not included: reading and decoding images"):
        assert words in cost.text(found)
    assert not libtpu_version() or f"Compiled by libtpu {libtpu_version()}." in cost.text(found)
    # Published: 73.3 ms on 128 cores.
    assert "| nfnet_f0 | 128 TPUv3 cores | 73.3 ms | 0.1 | 293 |" in cost.text(found)


def test_what_is_kept_is_not_compiled_again(tmp_path: Path) -> None:
    recipe, place = small_recipe(), tmp_path / "digits" / "v5e_2x4-8_parts"
    prepare_folder(place, recipe)
    write_json(place / "none.json", dataclasses.asdict(result(gib=20)))
    write_json(place / "blocks.json", dataclasses.asdict(result("blocks")))
    (found,) = cost.study([recipe], [TOPOLOGY], tmp_path, timeout_s=1e-3)
    assert found.compiled == result("blocks")
    assert sorted(path.name for path in place.iterdir()) == ["blocks.json", "none.json", "recipe.json"]
    earlier = dataclasses.replace(result(gib=20), versions={"nfnet_flax": "0.0.1"})
    write_json(place / "none.json", dataclasses.asdict(earlier))
    (found,) = cost.study([recipe], [TOPOLOGY], tmp_path, timeout_s=1e-3)  # compiles again, which takes longer
    assert found.compiled.problem == "did not compile within 0.001 s"
    other = dataclasses.replace(recipe, seed=recipe.seed + 1)
    with pytest.raises(ConfigError, match=r"another run \(seed: .*give another --out"):
        cost.study([other], [TOPOLOGY], tmp_path, timeout_s=1.0)
    (place / "none.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"none\.json is damaged .*remove it; the command then repeats"):
        cost.study([recipe], [TOPOLOGY], tmp_path, timeout_s=1.0)


def test_a_time_limit_is_kept_until_a_longer_one_is_given(tmp_path: Path) -> None:
    prepare_folder(tmp_path, small_recipe())
    found = compiled(tmp_path, TOPOLOGY, "none", timeout_s=0.01)
    assert (found.plan, found.problem, found.limit_s) == (None, "did not compile within 0.01 s", 0.01)
    assert compiled(tmp_path, TOPOLOGY, "none", timeout_s=0.005) == found
    assert compiled(tmp_path, TOPOLOGY, "none", timeout_s=0.02).limit_s == 0.02


def test_a_process_compiles_and_keeps_its_plan(tmp_path: Path) -> None:
    recipe = small_recipe()
    data = dataclasses.replace(recipe.data, batch_size=64)
    prepare_folder(tmp_path, dataclasses.replace(recipe, data=data))
    found = compiled(tmp_path, TOPOLOGY, "none", timeout_s=120.0)
    if libtpu_version():
        assert found.plan is not None
        assert (found.num_chips, found.plan.images_per_device) == (8, 8)
        assert compiled(tmp_path, TOPOLOGY, "none", timeout_s=1e-3) == found
    else:  # the reason is in the result, and no file is written, so the next call tries again
        assert found.plan is None
        assert "ended with exit code 1" in found.problem
        assert "libtpu (pip install 'nfnet_flax[tpu]')" in found.problem
        assert not (tmp_path / "none.json").exists()
    assert compiled_of(dataclasses.asdict(found)) == found


@pytest.mark.parametrize("claim", ["cost", "latency"])
def test_a_command_without_any_estimate_says_so(
    claim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "devices_of", lambda topology: [None] * 8)  # libtpu may be missing
    words = ["--models", "nfnet_f0", "--topologies", TOPOLOGY, "--timeout-s", "0.01", "--out", str(tmp_path)]
    more = ["--no-picture"] if claim == "latency" else []
    assert cli.main(["claim", claim, *words, *more]) == EXIT_WRONG
    printed = capsys.readouterr()
    assert "did not compile within 0.01 s" in printed.out
    assert printed.out.endswith(f"\n\nwritten: {tmp_path}/evidence.json\n")
    assert printed.err.splitlines()[-1] == "nfnet: no step was estimated: the table says why"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "nfnet_f7"], "unknown published run 'nfnet_f7': known are nfnet_f0, nfnet_f1, nfnet_f2"),
        (["--rate", "v5e"], "rate = 'v5e': give a kind of chip and a positive number, such as v5e=1.5"),
        (["--rate", "v5e=1", "v5e=2"], "rate = 'v5e=2': give a kind of chip and a positive number"),
        (["--clock-ghz", "v6e=-1"], "clock_ghz = 'v6e=-1': give a kind of chip and a positive number"),
        (["--rate", "v7=2"], "rate: 'v7' is no kind of the given topologies, which are of v4, v5e, v6e: give one"),
        (["--images-per-part", "0"], "images_per_part = 0: must be at least 1"),
        (["--timeout-s", "0"], "timeout_s = 0.0: must be positive"),
        (["--topologies", "v5e:9x9"], "topology 'v5e:9x9'"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in fails(capsys, "claim", "cost", *options, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
