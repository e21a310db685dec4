"""Images whose height is divided over devices: the same step to rounding, with a share of its work and memory."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.evaluating import evaluate
from tests import runs

STEP = """
import sys
import jax, numpy as np
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import Cosine, OptimConfig, RunLength, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.training.evaluation import make_eval_step, weights_to_evaluate
from nfnet_flax.training.state import create_state, model_structure
from nfnet_flax.training.step import make_train_step

config = NFNetConfig(widths=(16,), depths=(1,), group_width=8, drop_rate=0.2, stochdepth_rate=0.2)

def run(num_devices, fsdp, spatial, reproducible):
    structure = model_structure(config, 10, ExecutionConfig(num_microbatches=2, reproducible=reproducible))
    schedule = Cosine().learning_rate(0.05, RunLength(warmup_steps=2, num_steps=20, steps_per_epoch=1.0))
    tx = make_optimizer(OptimConfig(ema_decay=0.9), schedule, structure.shapes)
    mesh = make_mesh(jax.devices()[:num_devices], fsdp=fsdp, spatial=spatial)
    state = create_state(structure, 0, tx, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(structure, tx, SoftmaxCrossEntropy(), mesh, seed=0)
    rng = np.random.default_rng(0)
    rows = {"image": rng.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8), "label": rng.integers(0, 10, 8)}
    compiled = step.lower(state, to_global(rows, mesh)).compile()
    losses = []
    for _ in range(4):
        state, metrics = compiled(state, to_global(rows, mesh))
        losses.append(float(metrics["train/loss"]))
    same = jax.tree.map(lambda leaf, before: leaf.sharding.is_equivalent_to(before, leaf.ndim), state, placed)
    assert all(jax.tree.leaves(same))
    rows["mask"] = np.ones(8, np.float32)
    eval_step = make_eval_step(structure, SoftmaxCrossEntropy(), mesh)
    found = eval_step(weights_to_evaluate(state)["eval"], to_global(rows, mesh))
    cost = compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes
    return losses, jax.device_get(state.params), np.asarray(found["loss"]), cost

losses, params, found, (flops, temporary_bytes) = run(2, 1, 1, False)
assert losses[0] != losses[-1]
for fsdp, reproducible in ((1, False), (2, True)):
    divided = run(4, fsdp, 2, reproducible)
    np.testing.assert_allclose(divided[0], losses, rtol=1e-5)
    np.testing.assert_allclose(divided[2], found, rtol=1e-4)
    for name, value in params.items():
        assert np.abs(divided[1][name] - value).max() <= 1e-5 * np.abs(value).max() + 1e-8, (fsdp, name)
    # The update is whole on every device.
    print(fsdp, reproducible, divided[3][0] / flops, divided[3][1] / temporary_bytes, flush=True)
    assert divided[3][0] < 0.6 * flops
    assert divided[3][1] < 0.65 * temporary_bytes
"""


def environment(num_devices: int) -> dict[str, str]:
    return {**runs.with_devices(num_devices), "NPROC": "8"}


def test_a_divided_height_gives_the_step_of_a_whole_one() -> None:
    done = subprocess.run([sys.executable, "-c", STEP], env=environment(4), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_divides_its_images_and_goes_on_in_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    divided, whole = tmp_path / "divided", tmp_path / "whole"
    short = ("--num-steps=8", "--eval-every-steps=8", "--execution.num-microbatches=2")
    first = runs.start(divided, *short, "--execution.spatial=2", environment=environment(4))
    printed = runs.signal_at(first, 3, signal.SIGTERM)
    assert first.returncode == exit_codes.EXIT_STOPPED, printed
    two_axes = ("--execution.spatial=2", "--execution.fsdp=2")
    for process in runs.start_all(divided, 2, *short, *two_axes, environment=environment(2)):
        printed = runs.finish(process)
        assert process.returncode == 0, printed
    assert cli.main(["doctor", "--workdir", str(divided)]) == exit_codes.EXIT_DONE
    assert capsys.readouterr().out.endswith("nothing is wrong\n")
    # Reading it takes one device, however many it was divided over.
    rows = [json.loads(line) for line in (divided / "metrics.jsonl").read_text().splitlines()]
    in_training = {name: value for name, value in rows[-1].items() if name.startswith("eval")}
    assert {name: value for name, value in evaluate(divided).items() if name != "step"} == pytest.approx(
        in_training, rel=1e-4
    )
    undivided = runs.start(whole, *short, environment=environment(1))
    printed = runs.finish(undivided)
    assert undivided.returncode == 0, printed
    found, wanted = (runs.saved_arrays(folder, 8) for folder in (divided, whole))
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= 1e-4 * np.abs(value).max() + 1e-6, name


def test_images_that_cannot_be_divided_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"execution.spatial.*2.*must divide the 1 devices"):
        make_mesh(jax.devices()[:1], spatial=2)
    # 16 px.
    refused = runs.start(tmp_path, "--execution.spatial=3", environment=environment(3))
    printed = runs.finish(refused)
    assert refused.returncode == exit_codes.EXIT_BAD_INPUT, printed
    assert re.search(r"data.(eval_)?image_size.*16.*must be divisible by execution.spatial = 3", printed), printed
    assert not tmp_path.joinpath("recipe.json").exists()
