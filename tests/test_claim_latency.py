"""`nfnet claim latency`: the networks and their steps, which form of a step is chosen, and what follows from times."""

import dataclasses
from pathlib import Path

import pytest

from nfnet_flax.claims import latency, latency_shown, published
from nfnet_flax.claims.compiled_step import Compiled, compiled, libtpu_version
from nfnet_flax.claims.evidence import evidence, read_evidence, write_evidence
from nfnet_flax.claims.latency import Form, Step
from nfnet_flax.claims.latency_pair import Measurement, measured_steps
from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import differences, to_json
from nfnet_flax.json_files import read_json, write_json
from nfnet_flax.models import IMAGE_SIZES
from nfnet_flax.recipe_file import load_recipe
from tests.runs import ROOT
from tests.test_claim_cost import result
from tests.test_cli import fails

OPERATION = "jit(train_step)/shard_map/transpose(jvp(network))/stem/conv |  bf16[32,96]"
"""An operation as the compiler names it, and the shape of its result."""
MEASUREMENT = Measurement(
    reference="nf_seresnet26",
    network="nf_seresnet26",
    images=2,
    rounds=3,
    compute_dtype="float32",
    image_size=32,
)


@pytest.mark.parametrize("name", latency.NETWORKS)
def test_networks_train_as_published(name: str) -> None:
    recipe = latency.recipe_of(name, Form(8, "blocks"), images=32, num_devices=8)
    assert (recipe.data.batch_size, recipe.execution.num_microbatches) == (256, 32)
    assert (recipe.execution.rematerialization, recipe.execution.reproducible) == ("blocks", False)
    assert recipe.data.image_size == IMAGE_SIZES[name].train
    if name in latency.NFNETS:
        theirs = load_recipe(f"{ROOT}/recipes/nfnet_imagenet.py:variant={name[-2:]}")
        for field in ("model", "optim", "objective"):
            assert differences(to_json(getattr(recipe, field)), to_json(getattr(theirs, field))) == []
    else:
        assert recipe.optim.clipping is None


def test_the_first_form_that_fits_is_chosen() -> None:
    assert list(latency.forms(32)) == [
        *(Form(32, "none"), Form(16, "none"), Form(8, "none")),
        *(Form(32, "blocks"), Form(16, "blocks"), Form(8, "blocks")),
    ]
    assert list(latency.forms(1)) == [Form(1, "none"), Form(1, "blocks")]
    assert list(latency.forms(32, 2)) == [Form(2, "none"), Form(1, "none"), Form(2, "blocks"), Form(1, "blocks")]
    tried: list[Form] = []

    def compile_for(form: Form, gib_per_image: float = 1.5) -> Compiled:
        tried.append(form)
        share = {"none": 1.0, "blocks": 0.3, "full": 0.1}[form.rematerialization]
        found = result(form.rematerialization)
        assert found.plan is not None
        size = int(share * form.images_at_a_time * gib_per_image * 2**30)
        return dataclasses.replace(found, plan=dataclasses.replace(found.plan, peak_bytes=size))

    # 48 GiB of 16 do not fit, so half of them are not tried.
    assert latency.first_that_fits(list(latency.forms(32)), compile_for)[0] == Form(8, "none")
    assert tried == [Form(32, "none"), Form(8, "none")]
    tried.clear()
    chosen, found = latency.first_that_fits(list(latency.forms(32)), lambda form: compile_for(form, 100.0))
    assert (chosen, len(tried)) == (Form(8, "blocks"), 3)
    assert found.plan is not None
    assert not found.plan.fits


def test_forms_of_a_network_are_compiled_in_one_folder_for_each_number_of_images(tmp_path: Path) -> None:
    folders = [
        latency.folder_of("nfnet_f4", form, "v3:2x2", tmp_path, images=32, num_devices=8) for form in latency.forms(32)
    ]
    assert [folder.name for folder in folders] == ["v3_2x2-8_parts", "v3_2x2-16_parts", "v3_2x2-32_parts"] * 2
    write_json(folders[0] / "none.json", dataclasses.asdict(result(gib=20)))
    write_json(folders[0] / "blocks.json", dataclasses.asdict(result("blocks")))
    assert compiled(folders[3], "v3:2x2", "blocks", timeout_s=1e-3) == result("blocks")
    with pytest.raises(ConfigError, match=r"another run \(data\.batch_size: 256 -> 128.*give another --out"):
        latency.folder_of("nfnet_f4", Form(16, "none"), "v3:2x2", tmp_path, images=16, num_devices=8)


def test_memory_is_read_from_what_the_compiler_says() -> None:
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 31.00G of 15.50G hbm. Exceeded by 15.50G."
    refused = dataclasses.replace(result(), plan=None, problem=said)
    assert latency.memory_excess(refused) == pytest.approx(2.0)
    assert latency.memory_excess(dataclasses.replace(refused, problem="other")) is None
    assert refused.is_too_large
    killed = dataclasses.replace(refused, problem="the compilation ended with exit code -9: it printed nothing")
    assert latency.first_that_fits(list(latency.forms(8)), lambda form: killed) == (Form(8, "none"), killed)
    too_slow = dataclasses.replace(killed, limit_s=9.0)
    assert latency.first_that_fits(list(latency.forms(8)), lambda form: too_slow) == (Form(8, "none"), too_slow)


def step(network: str, cycles: int | None, *, place: str = "v3:2x2", problem: str = "") -> Step:
    return Step(
        network=network,
        place=place,
        image_size=IMAGE_SIZES[network].train,
        images=32,
        images_at_a_time=32,
        rematerialization="none",
        peak_bytes=2**31,
        seconds=None if cycles is None else cycles / 1e9,
        cycles=cycles,
        flops=None if cycles is None else 1e12,
        ratio=None,
        problem=problem,
        operations=[] if cycles is None else [(OPERATION, cycles // 4)],
    )


def test_ratios_follow_from_the_steps(tmp_path: Path) -> None:
    steps = latency.with_ratios(
        [
            step("nfnet_f0", 100_000_000),
            step("nfnet_f1", 200_000_000),
            step("efficientnet_b7", 1_600_000_000),
            step("nfnet_f6", None, problem="no | yes"),
            step("nfnet_f1", 10_000_000, place="v6e:2x4"),
        ]
    )
    assert [found.ratio for found in steps] == [16.0, 8.0, 1.0, None, None]
    made = evidence(latency.CLAIM, "nfnet claim latency", latency.data_of(steps))
    found = read_evidence(write_evidence(made, tmp_path), latency.CLAIM)
    assert latency.steps_of(found.data) == steps
    lines = latency_shown.tables(found)["steps"].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    # Published: 8.7 * 158.5 / 73.3.
    assert rows[0][6:] == ["2.0 GiB", "100 M cycles = 100.0 ms", "10,000", "16.00", "18.81", "-15%", "83.6"]
    assert rows[1][9:12] == ["8.00", "8.70", "-8%"]
    assert rows[2][9:] == ["1.00", "1.00", "+0%", "84.3"]
    assert rows[3][7:] == ["no / yes", "", "", "0.50", "", "86.5"]
    assert "operations" not in latency_shown.tables(found)
    with pytest.raises(ConfigError, match=r"another form .*run nfnet claim latency again"):
        latency_shown.tables(dataclasses.replace(found, data={"steps": [{}]}))


def test_ratios_far_from_the_published_ones_are_explained() -> None:
    steps = latency.with_ratios([step("nfnet_f1", 100_000_000), step("efficientnet_b7", 1_600_000_000)])
    made = evidence(latency.CLAIM, "nfnet claim latency", latency.data_of(steps))
    lines = latency_shown.tables(made)["operations"].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["nfnet_f1", "efficientnet_b7"]
    assert lines[0] == "| nfnet_f1 | v3:2x2 | backward: `stem/conv / bf16[32,96]` | 25.0 |"
    assert "Most expensive operations" in latency_shown.text(made)
    in_a_loop = "jit(train_step)/shard_map/while/body/closed_call/transpose(jvp(network))/stage2/conv f32[1,768]"
    assert latency_shown._operation(in_a_loop) == "backward: `stage2/conv f32[1,768]`"


def test_published_ratios_are_those_of_the_paper() -> None:
    ratios = {name: latency_shown.published_ratio(name) for name in latency.NETWORKS}
    assert ratios["nfnet_f1"] == pytest.approx(published.B7_OVER_F1)
    assert ratios["nfnet_f5"] == pytest.approx(0.99, abs=0.01)  # "F5 costs what B7 costs"
    assert [name for name in latency.NETWORKS if ratios[name] is None] == list(latency.EFFICIENTNETS[:7])


def test_steps_are_measured_in_turns(tmp_path: Path) -> None:
    (found,) = measured_steps([MEASUREMENT], tmp_path)
    kept = read_json(tmp_path / "nf_seresnet26" / "measured.json", "")
    assert len(kept["network"]["seconds"]) == len(kept["reference"]["seconds"]) == 3
    assert found.seconds == sorted(kept["network"]["seconds"])[1] > 0
    assert found.ratio is not None
    assert (found.images_at_a_time, found.rematerialization, found.cycles) == (2, "none", None)
    assert found.place == "1 x cpu"
    assert (tmp_path / "nf_seresnet26" / "phase").read_text() == "measuring nf_seresnet26 and nf_seresnet26 in turns"
    assert list((tmp_path / "compiled").glob("jit_train_step*"))  # kept for a second start
    made = evidence(latency.CLAIM, "nfnet claim latency --measure", latency.data_of([found]))
    assert "timed in turns" in latency_shown.text(made)
    # What is kept is not measured again, and not taken for another measurement.
    kept["network"]["seconds"] = [9.0] * 3
    write_json(tmp_path / "nf_seresnet26" / "measured.json", kept)
    assert measured_steps([MEASUREMENT], tmp_path)[0].seconds == 9.0
    with pytest.raises(ConfigError, match=r"has another measurement, .*: give another --out, or remove this folder"):
        measured_steps([dataclasses.replace(MEASUREMENT, images=4)], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "nfnet_f9"], "unknown network 'nfnet_f9': known are nfnet_f"),
        (["--images-at-a-time", "nfnet_f4", "7"], "images_at_a_time nfnet_f4 = 7: must divide images 32"),
        (["--images-at-a-time", "nfnet_f4", "0"], "images_at_a_time nfnet_f4 = 0: must be at least 1"),
        (["--images-at-a-time", "nfnet_f4", "8", "--measure"], "is for estimates: leave it out with --measure"),
        (["--images", "0"], "images = 0: must be at least 1"),
        (["--jobs", "0"], "jobs = 0: must be at least 1"),
        (["--rounds", "0"], "rounds = 0: must be at least 1"),
        (["--image-size", "0"], "image_size = 0: must be at least 1"),
        (["--timeout-s", "0"], "timeout_s = 0.0: must be positive"),
        (["--topologies", "v5e:9x9"], "topology 'v5e:9x9'"),
        (["--measure", "--topologies", "v5e:2x4"], "topologies = ('v5e:2x4',): is for estimates: leave it out with"),
        (["--measure", "--jobs", "2"], "jobs = 2: is for estimates: leave it out with --measure"),
        (["--measure", "--timeout-s", "9"], "timeout_s = 9.0: is for estimates: leave it out with --measure"),
        (["--rounds", "5"], "rounds = 5: is for measurements: leave it out, or give --measure, too"),
        (["--compute-dtype", "float32"], "compute_dtype = 'float32': is for measurements: leave it out"),
        (["--image-size", "64"], "image_size = 64: is for measurements: leave it out"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    if not libtpu_version() and "topology" in message:
        message = "or measure on the devices of this machine, which needs no libtpu: --measure"
    assert message in fails(capsys, "claim", "latency", *options, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
