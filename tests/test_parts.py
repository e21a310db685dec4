"""Parts of a batch whose number is no power of two: the same training on any number of devices, BatchNorm included."""

import subprocess
import sys

import jax
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.models import ExecutionConfig
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import OptimConfig, SAMConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh
from nfnet_flax.training.state import model_structure
from nfnet_flax.training.step import make_train_step
from tests import runs
from tests.networks import SMALL

STEPS = """
import jax, numpy as np, optax
from nfnet_flax.models import ExecutionConfig, ResNetConfig
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.training.gradient import make_gradient
from nfnet_flax.training.state import Normalization, create_state, model_structure

DECAY, NUM_STEPS = 0.5, 5
config = ResNetConfig(widths=(8, 8), depths=(1, 1), stem_width=4, batch_norm_decay=DECAY)
rng = np.random.default_rng(0)
batches = [
    {"image": rng.integers(0, 40 * (i + 1), (24, 16, 16, 3)).astype(np.uint8), "label": rng.integers(0, 3, 24)}
    for i in range(NUM_STEPS)
]

def structure_of(num_parts):
    execution = ExecutionConfig(num_microbatches=num_parts, reproducible=False)
    return model_structure(config, 3, execution, Normalization(mean=(128.0,) * 3, std=(64.0,) * 3))

first = jax.device_get(create_state(structure_of(12), 0, optax.identity(), make_mesh(jax.devices()[:1])))

def statistics(num_parts, num_devices):
    mesh = make_mesh(jax.devices()[:num_devices])
    structure = structure_of(num_parts)
    gradient = jax.jit(make_gradient(structure, SoftmaxCrossEntropy(), mesh, seed=0))

    def after(batches):
        found = first.batch_stats
        for step, rows in enumerate(batches):
            # Nothing is learnt, so that the statistics of a batch are the same at every step.
            _, found, _ = gradient(first.params, found, np.int32(step), to_global(rows, mesh), {})
        return jax.device_get(found)

    return after(batches), [after([rows]) for rows in batches]

for num_parts, layouts in ((12, (1, 4)), (3, (3,))):
    for num_devices in layouts:
        whole, each = statistics(num_parts, num_devices)
        if num_devices == layouts[0]:
            one = whole
        weights = np.asarray([DECAY ** (NUM_STEPS - 1 - i) for i in range(NUM_STEPS)])
        for name, value in whole.items():
            if name.endswith(".count"):
                assert value == NUM_STEPS and value.dtype == np.int32, (name, value)
                continue
            want = np.average([found[name] for found in each], axis=0, weights=weights)
            scale = np.abs(want).max()
            assert np.abs(value - want).max() <= 1e-5 * scale, (num_parts, num_devices, name)
            assert np.abs(value - one[name]).max() <= 1e-5 * scale, (num_parts, num_devices, name)
        assert not np.allclose(whole["final_bn.mean"], each[-1]["final_bn.mean"], rtol=1e-3)
print("equal")
"""


def test_running_statistics_are_the_average_over_all_batches_for_12_and_3_parts() -> None:
    env = runs.with_devices(4)
    done = subprocess.run([sys.executable, "-c", STEPS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


@pytest.mark.parametrize(
    ("family", "sam", "why"),
    [
        ("resnet", None, "BatchNorm normalises each part"),
        ("efficientnet", None, "BatchNorm normalises each part"),
        ("nfnet", SAMConfig(fraction=0.2), r"optim\.sam takes the first rows of each part"),
        ("nfnet", SAMConfig(fraction=1.0), None),
        ("nfnet", None, None),
    ],
)
def test_the_number_of_parts_must_be_given_where_it_decides_what_is_computed(
    family: str, sam: SAMConfig | None, why: str | None
) -> None:
    structure = model_structure(SMALL[family], 3, ExecutionConfig(num_microbatches=None, reproducible=False))
    tx = make_optimizer(OptimConfig(clipping=None, sam=sam), lambda step: 0.1, structure.shapes)

    def build() -> jax.stages.Wrapped:
        return make_train_step(structure, tx, SoftmaxCrossEntropy(), make_mesh(jax.devices()[:1]), seed=0)

    if why is None:
        build()
    else:
        with pytest.raises(
            ConfigError, match=rf"execution\.num_microbatches = None: give the number of parts, as {why}"
        ):
            build()
