"""What a run records about itself: where its time went, how fast it was, which process was slow."""

import itertools
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from nfnet_flax.models import build_model, model_config
from nfnet_flax.models.counts import COUNTS
from nfnet_flax.models.flops import forward_flops, training_flops
from nfnet_flax.telemetry.events import EventLog
from nfnet_flax.telemetry.ledger import CATEGORIES, Ledger
from nfnet_flax.telemetry.peaks import peak_of
from nfnet_flax.training.metrics import read_rows
from nfnet_flax.training.reading import Run
from tests import runs

TINY = ("--model.widths=8", "--model.group-width=4", "--data.batch-size=8", "--num-steps=12", "--log-every-steps=2")
SLOW = """
import sys, time
from nfnet_flax.data import random_access
read = random_access.ArraySource.__getitem__

def slowly(self, index):
    time.sleep(0.1)
    return read(self, index)

random_access.ArraySource.__getitem__ = slowly
from nfnet_flax.cli import main
sys.argv[0] = "nfnet"
sys.exit(main())
"""


def events(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def check_sums(rows: list[dict[str, Any]]) -> None:
    """The seconds of a session add up to its duration."""
    assert rows[0]["event"] == "start"
    before = rows[0]["began_at_s"]
    for row in rows:
        assert row["seconds"].keys() <= set(CATEGORIES)
        assert sum(row["seconds"].values()) == pytest.approx(row["at_s"] - before, abs=2e-3), row
        before = row["at_s"]


def test_the_times_of_all_categories_add_up_to_the_time_of_a_process() -> None:
    began_s = time.perf_counter()
    ledger = Ledger(began_s)
    time.sleep(0.02)
    for category in CATEGORIES[1:]:
        ledger.enter(category)
        time.sleep(0.01)
    ledger.enter("evaluation")
    jax.jit(lambda x: x * 3.25 + 1.75)(2.0).block_until_ready()  # compiling counts as such, wherever it happens
    found = ledger.totals()
    assert sum(found.values()) == pytest.approx(time.perf_counter() - began_s, abs=5e-3)
    assert all(found[category] >= 0.009 for category in CATEGORIES)
    assert found["start"] >= 0.02
    assert found["compile"] > 0.012


def test_a_run_in_two_processes_records_its_time_and_names_the_slow_one(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    started = runs.start_all(workdir, 2, *TINY, "--num-steps=24", program_of_last=("-c", SLOW))
    printed = [runs.finish(process) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    warning = re.search(r"nfnet: process 1 on \S+ is slow at preparing images: before step \d+ it waited", printed[0])
    assert warning is not None, printed[0]
    assert sum(text.count("is slow at preparing images") for text in printed) == 1
    rows = read_rows(workdir / "metrics.jsonl")
    told = [row for row in rows if "processes/slowest_data_wait_s" in row]
    slow = max(told, key=lambda row: row["processes/slowest_data_wait_s"])  # the last batches are prepared ahead
    assert slow["processes/slowest_data_wait_process"] == 1
    assert slow["processes/fastest_data_wait_process"] == 0
    assert slow["processes/slowest_data_wait_s"] > 2 * slow["processes/fastest_data_wait_s"]

    found = events(workdir)
    check_sums(found)
    assert len({row["session"] for row in found}) == 1
    names = [row["event"] for row in found]
    assert names[:3] == ["start", "restored", "interval"]
    assert names[-1] == "finished"
    counted = Counter(names)
    assert (counted["evaluated"], counted["finished"]) == (2, 1)
    assert counted["saved"] >= 3  # the first evaluation is the best so far
    assert found[0]["num_processes"] == 2
    assert found[0]["num_devices"] == 2
    assert found[0]["device_kind"] == "cpu"
    assert found[-1]["step"] == found[0]["num_steps"] == 24
    total = sum((Counter(row["seconds"]) for row in found), Counter())
    assert all(
        total[name] > 0 for name in ("start", "restore", "compile", "step", "input", "evaluation", "save", "end")
    )
    # The same times, as metrics: those of the last log step begin with the one before. On a slow machine there are
    # further intervals between them.
    of_step = {row["step"]: row for row in rows if "time/step_s" in row}
    steps = {row["step"]: row for row in reversed(found) if row["event"] == "interval" and row["step"] in of_step}
    for before, after in itertools.pairwise(sorted(steps.values(), key=found.index)):
        between = found[found.index(before) + 1 : found.index(after) + 1]
        spent = sum((Counter(row["seconds"]) for row in between), Counter())
        row = of_step[after["step"]]
        assert row["time/step_s"] == pytest.approx(spent["step"], abs=5e-3)
        assert row["time/save_s"] == pytest.approx(spent["save"], abs=5e-3)


def test_what_cannot_be_recorded_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "events.jsonl").symlink_to("/dev/full")
    (workdir / "agc.jsonl").mkdir()
    process = runs.start(workdir, *TINY)
    printed = runs.finish(process)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
    for name, reason, reader in (
        ("events.jsonl", "No space left on device", "nfnet report"),
        ("agc.jsonl", "is a folder", "nfnet agc"),
    ):
        [line] = [line for line in printed.splitlines() if name in line]
        assert reason in line
        assert reader in line
    [row] = [row for row in read_rows(workdir / "metrics.jsonl") if row["step"] == 12]
    speed, per_device = row["throughput/images_per_s"], row["throughput/images_per_s_per_device"]
    assert speed == per_device > 0
    recipe = Run(workdir).recipe
    model = build_model(recipe.model, num_classes=recipe.num_classes, rngs=nnx.Rngs(0))
    flops = training_flops(model, recipe.data.image_size)
    assert row["throughput/model_tflops_per_s_per_device"] == pytest.approx(speed * flops / 1e12, rel=1e-6)
    assert 0 < row["throughput/share_of_peak"] < 1
    assert row["train/param_norm"] > 0 < row["train/update_norm"]
    assert row["agc/largest_ratio"] >= row["agc/median_ratio"] > 0
    assert "data/num_corrupt" not in row


def test_a_line_that_was_cut_short_does_not_damage_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):
        log = EventLog(path)
        log.write("interval", 1.0, 5, {"step": 0.5}, {})
        log.close()
        with path.open("ab") as file:
            file.write(b'{"event": "inter')
    lines = path.read_text().splitlines()
    assert [json.loads(lines[index])["step"] for index in (0, 2)] == [5, 5]
    assert json.loads(lines[0])["session"] != json.loads(lines[2])["session"]


def test_training_takes_three_times_the_operations_of_a_forward_pass_but_for_the_gradient_of_the_image() -> None:
    size = 64
    model = nnx.eval_shape(lambda: build_model(model_config("nf_resnet50"), num_classes=1000, rngs=nnx.Rngs(0)))
    forward = forward_flops(model, size)
    first = 7 * 7 * 3 * 64 * (size // 2) ** 2  # the first convolution: 7 x 7, stride 2, 64 channels
    assert training_flops(model, size) == 2 * (3 * forward - first)
    assert COUNTS["nf_resnet50"].multiply_adds > forward


def test_peaks_are_those_of_the_very_device() -> None:
    h100, pcie = (peak_of(kind, "bfloat16") for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"))
    assert h100 is not None
    assert pcie is not None
    assert h100.flops_per_s == 989.4e12 > pcie.flops_per_s
    a100 = peak_of("NVIDIA A100-SXM4-40GB", "float32")
    assert a100 is not None
    assert a100.flops_per_s == 156e12
    v5e, v5p = peak_of("TPU v5 lite", "bfloat16"), peak_of("TPU v5", "bfloat16")
    assert v5e is not None
    assert v5p is not None
    assert (v5e.flops_per_s, v5p.flops_per_s) == (197e12, 459e12)
    l40s = peak_of("NVIDIA L40S", "bfloat16")
    assert l40s is not None
    assert l40s.flops_per_s == 362e12
    assert peak_of("NVIDIA L40", "bfloat16") is None
    assert peak_of("NVIDIA GeForce GTX 750", "bfloat16") is None
    cpu = peak_of("cpu", "float32")
    assert cpu is not None
    assert 1e9 < cpu.flops_per_s < 1e14
    assert "measured" in cpu.source
