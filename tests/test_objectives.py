"""The objectives against independent formulas in float64, and the metrics of parts against those of the whole batch."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnet_flax.config import ConfigError
from nfnet_flax.models import build_model
from nfnet_flax.models.params import merge, split
from nfnet_flax.objectives import (
    Distillation,
    Focal,
    Objective,
    RunFacts,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    targets_of,
)
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.weights import Preprocessing, load_model, save_weights
from tests import golden, runs
from tests.networks import SMALL

NUM_EXAMPLES, NUM_CLASSES = 12, 7
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((NUM_EXAMPLES, NUM_CLASSES))).astype(np.float32)
LABELS = RNG.integers(0, NUM_CLASSES, NUM_EXAMPLES)
MULTI_HOT = (RNG.random((NUM_EXAMPLES, NUM_CLASSES)) < 0.4).astype(np.int32)
MIXED = {
    "label": LABELS,
    "mix_label": RNG.integers(0, NUM_CLASSES, NUM_EXAMPLES),
    "label_weight": RNG.random(NUM_EXAMPLES).astype(np.float32),
}
BATCHES: dict[str, dict[str, Any]] = {
    "one class": {"label": LABELS},
    "several classes": {"label": MULTI_HOT},
    "mixed": MIXED,
    "mixed, several classes": {**MIXED, "label": MULTI_HOT, "mix_label": MULTI_HOT[::-1]},
}


def plain_targets(batch: dict[str, Any]) -> np.ndarray:
    def encoded(label: np.ndarray) -> np.ndarray:
        return np.eye(NUM_CLASSES)[label] if label.ndim == 1 else label.astype(np.float64)

    if "mix_label" not in batch:
        return encoded(batch["label"])
    weight = batch["label_weight"].astype(np.float64)[:, None]
    return weight * encoded(batch["label"]) + (1 - weight) * encoded(batch["mix_label"])


def smoothed(targets: np.ndarray, smoothing: float) -> np.ndarray:
    return (1 - smoothing) * targets + smoothing / NUM_CLASSES


def softmax_loss(targets: np.ndarray) -> np.ndarray:
    logits = LOGITS.astype(np.float64)
    return -np.sum(targets * (logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))), axis=1)


def sigmoid_loss(targets: np.ndarray, gamma: float = 0.0) -> np.ndarray:
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    losses = -(targets * np.log(p) + (1 - targets) * np.log(1 - p))
    return np.sum(losses * (1 - (p * targets + (1 - p) * (1 - targets))) ** gamma, axis=1)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(
    ("objective", "smoothing", "formula"),
    [
        (SoftmaxCrossEntropy(label_smoothing=0.0), 0.0, softmax_loss),
        (SoftmaxCrossEntropy(label_smoothing=0.2), 0.2, softmax_loss),
        (SigmoidCrossEntropy(), 0.0, sigmoid_loss),
        (SigmoidCrossEntropy(label_smoothing=0.1), 0.1, sigmoid_loss),
        (Focal(gamma=0.0), 0.0, sigmoid_loss),
        (Focal(gamma=2.5), 0.0, lambda targets: sigmoid_loss(targets, 2.5)),
    ],
)
def test_losses_are_those_of_their_formulas(objective: Objective, smoothing: float, formula: Any, kind: str) -> None:
    batch = jax.tree.map(jnp.asarray, BATCHES[kind])
    if isinstance(objective, SoftmaxCrossEntropy) and batch["label"].ndim == 2:
        with pytest.raises(ConfigError, match="this objective takes one class per example"):
            objective.train(jnp.asarray(LOGITS), batch, {})
        return
    targets = plain_targets(BATCHES[kind])
    np.testing.assert_allclose(targets_of(batch, NUM_CLASSES), targets, rtol=1e-6)
    loss, metrics = jax.jit(objective.train)(jnp.asarray(LOGITS), batch, {})
    np.testing.assert_allclose(loss, formula(smoothed(targets, smoothing)), rtol=2e-5)
    best = LOGITS.argmax(axis=1)
    labels = plain_targets({"label": BATCHES[kind]["label"]})
    hits = labels[np.arange(NUM_EXAMPLES), best] > 0
    assert np.array_equal(metrics["top1"].value, hits)
    assert 0 < hits.sum() < NUM_EXAMPLES
    if "mix_label" not in batch:
        found = objective.evaluate(jnp.asarray(LOGITS), batch)
        np.testing.assert_allclose(found["loss"], formula(targets), rtol=2e-5)
        order = np.argsort(-LOGITS, axis=1)[:, :5]
        assert np.array_equal(found["top1"], hits)
        assert np.array_equal(found["top5"], np.take_along_axis(labels, order, axis=1).max(axis=1))


def test_labels_of_another_number_of_classes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"label = 'of shape \(12, 7\)': give \(N,\) class numbers, or \(N, 9\)"):
        targets_of({"label": jnp.asarray(MULTI_HOT)}, 9)


CLASS_NAMES = tuple("abcdefg")
FACTS = RunFacts(class_names=CLASS_NAMES[::-1], mean=(120.0, 110.0, 100.0), std=(50.0, 60.0, 70.0))


@pytest.fixture(scope="module", params=["nfnet", "resnet"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_file(request.param, tmp_path_factory.mktemp("teacher"))


def teacher_file(family: str, folder: Path) -> Path:
    """A weight file of a network with uneven weights, whose classes are numbered the other way round."""
    graphdef, shapes, statistics = split(
        nnx.eval_shape(lambda: build_model(SMALL[family], num_classes=NUM_CLASSES, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(2)
    params = {name: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)) for name, leaf in shapes.items()}
    path = folder / "weights.safetensors"
    save_weights(
        path,
        merge(graphdef, params, golden.initial_statistics(statistics)),
        source="test",
        parameters="raw",
        class_names=CLASS_NAMES,
        preprocessing=Preprocessing(
            image_size=32, crop_margin=0, resampler="cubic", mean=(128.0, 128.0, 128.0), std=(64.0, 64.0, 64.0)
        ),
    )
    return path


def test_distillation_is_its_formula(teacher: Path) -> None:
    objective = Distillation(teacher=str(teacher), temperature=3.0, teacher_share=0.7, label_smoothing=0.1)
    levels = np.random.default_rng(3).integers(0, 256, (NUM_EXAMPLES, 32, 32, 3)).astype(np.float32)
    images = (levels - np.asarray(FACTS.mean, np.float32)) / np.asarray(FACTS.std, np.float32)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(LABELS)}
    loss, metrics = jax.jit(objective.train)(jnp.asarray(LOGITS), batch, objective.arrays(FACTS))

    network = load_model(teacher)
    theirs = np.asarray(jax.jit(lambda x: network(x))((levels - 128.0) / 64.0), np.float64)[:, ::-1]

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        logits = logits.astype(np.float64)
        return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))

    soft_theirs, soft_ours = log_softmax(theirs / 3.0), log_softmax(LOGITS / 3.0)
    difference = 9.0 * np.sum(np.exp(soft_theirs) * (soft_theirs - soft_ours), axis=1)
    labels = softmax_loss(smoothed(plain_targets({"label": LABELS}), 0.1))
    np.testing.assert_allclose(loss, 0.3 * labels + 0.7 * difference, rtol=1e-4)
    assert np.array_equal(metrics["teacher_agreement"].value, theirs.argmax(axis=1) == LOGITS.argmax(axis=1))


def test_a_teacher_of_other_classes_is_refused(teacher: Path) -> None:
    facts = RunFacts(class_names=("a", "z"), mean=FACTS.mean, std=FACTS.std)
    with pytest.raises(ConfigError, match=r"teacher '.*' is of other classes than the training images"):
        Distillation(teacher=str(teacher)).arrays(facts)


def test_another_teacher_under_the_same_name_ends_a_resume(tmp_path: Path) -> None:
    path, moved = tmp_path / "teacher.safetensors", tmp_path / "moved.safetensors"

    def write(scale: float) -> None:
        model = build_model(SMALL["nfnet"], num_classes=10, rngs=nnx.Rngs(0))
        model.head.bias = nnx.Param(jnp.full(10, scale))
        save_weights(path, model, source="test", parameters="raw", class_names=tuple("0123456789"), overwrite=True)

    recipe = load_recipe(runs.DIGITS)
    taught = dataclasses.replace(recipe, objective=Distillation(teacher=str(path)))
    write(0.0)
    runs.claimed(tmp_path / "run", taught)
    path.rename(moved)
    runs.claimed(tmp_path / "run", dataclasses.replace(recipe, objective=Distillation(teacher=str(moved))))
    write(1.0)
    with pytest.raises(ConfigError, match=r"was trained on another input; .*\n +objective\.content: "):
        runs.claimed(tmp_path / "run", taught)


ELASTIC = """
import sys
import jax, numpy as np
from nfnet_flax.models import ExecutionConfig, NFNetConfig
from nfnet_flax.objectives import Distillation, Metric, RunFacts
from nfnet_flax.optim import OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.training.state import create_state, model_structure, placed_everywhere
from nfnet_flax.training.step import make_train_step

config = NFNetConfig(widths=(8,), depths=(1,), group_width=4)
facts = RunFacts(class_names=tuple("gfedcba"), mean=(128.0,) * 3, std=(64.0,) * 3)
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
labels = rng.integers(0, 7, 8)

class Counting(Distillation):
    # Whole numbers that are added over parts and devices, or are the same in all of them.
    def train(self, logits, batch, arrays):
        loss, metrics = super().train(logits, batch, arrays)
        ones = jax.numpy.ones_like(batch["label"])
        return loss, {**metrics, "examples": Metric(ones, "sum"), "classes": Metric(jax.numpy.int32(7), "same")}

objective = Counting(teacher=sys.argv[1], temperature=2.0)

def run(num_devices):
    structure = model_structure(config, 7, ExecutionConfig(num_microbatches=4))
    optimizer = make_optimizer(OptimConfig(ema_decay=0.9), lambda step: 0.1, structure.shapes)
    mesh = make_mesh(jax.devices()[:num_devices])
    state = create_state(structure, 0, optimizer, mesh)
    step = make_train_step(structure, optimizer, objective, mesh, seed=0)
    arrays = placed_everywhere(objective.arrays(facts), mesh)
    losses = []
    for _ in range(3):
        state, metrics = step(state, to_global({"image": images, "label": labels}, mesh), arrays)
        losses.append(float(metrics["train/loss"]))
    counts = metrics["train/examples"], metrics["train/classes"]
    assert [(int(count), str(count.dtype)) for count in counts] == [(8, "int32"), (7, "int32")], counts
    assert losses[2] < losses[0], losses
    return losses, sorted(metrics), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

want = run(1)
assert run(4) == want
print(*want[1])
"""


def test_steps_with_a_teacher_have_the_same_bits_on_any_devices(tmp_path: Path) -> None:
    # Optimized as users' runs are: without, the compiler's older form of fusions rounds otherwise on other layouts.
    env = {**os.environ, **runs.OPTIMIZED, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", ELASTIC, str(teacher_file("nfnet", tmp_path))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "agc/clipped_fraction",
        *("train/classes", "train/examples", "train/grad_norm", "train/learning_rate", "train/loss"),
        *("train/teacher_agreement", "train/top1", "train/top5"),
    ]
