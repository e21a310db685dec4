"""Evaluation: its metrics against NumPy on the same logits, whatever does not divide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data import pipeline
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.random_access import ArraySource
from nfnet_flax.models import NFNetConfig
from nfnet_flax.models.params import merge
from nfnet_flax.objectives import SoftmaxCrossEntropy
from nfnet_flax.optim import OptimConfig, make_optimizer
from nfnet_flax.parallel.mesh import make_mesh, to_global
from nfnet_flax.telemetry.outcomes import NO_CLASS, Outcomes
from nfnet_flax.training.evaluation import EvalStep, Weights, make_eval_step, make_row_step, run_evaluation
from nfnet_flax.training.gradient import normalise
from nfnet_flax.training.state import Structure, create_state, model_structure

CONFIG = DataConfig(image_size=16, eval_image_size=16, eval_batch_size=16)
NUM_CLASSES = 7
Network = tuple[Structure, Weights, EvalStep]


@pytest.fixture(scope="module")
def network() -> Network:
    """A small network with random weights (a new one gives the same logits to every class)."""
    structure = model_structure(NFNetConfig(widths=(8, 8), depths=(1, 1), group_width=4, expansion=0.5), NUM_CLASSES)
    optimizer = make_optimizer(OptimConfig(), lambda step: 0.1, structure.shapes)
    state = create_state(structure, 0, optimizer, make_mesh())
    rng = np.random.default_rng(1)
    params = {
        name: np.asarray(value) + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        for name, value in sorted(state.params.items())
    }
    step = make_eval_step(structure, SoftmaxCrossEntropy(), make_mesh())
    return structure, (params, state.batch_stats), step


def with_numpy(network: Network, source: ArraySource) -> dict[str, float]:
    structure, weights, _ = network
    model = merge(structure.graphdef, *weights)
    model.eval()
    logits = np.asarray(jax.jit(model)(normalise(jnp.asarray(source.images), CONFIG.mean, CONFIG.std)), np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    rows = np.arange(len(source))
    rank = np.sum(logits > logits[rows, source.labels][:, None], axis=1)
    return {
        "eval/loss": float(np.mean(-np.log(probabilities[rows, source.labels]))),
        "eval/top1": float(np.mean(rank < 1)),
        "eval/top5": float(np.mean(rank < 5)),
        "eval/num_examples": float(len(source)),
    }


@pytest.mark.parametrize("num_examples", [1, 37, 100])
def test_metrics_are_numpys_over_any_number_of_processes(network: Network, num_examples: int) -> None:
    rng = np.random.default_rng(num_examples)
    images = rng.integers(0, 256, (num_examples, 16, 16, 3)).astype(np.uint8)
    labels = rng.integers(0, NUM_CLASSES, num_examples).astype(np.int32)
    source = ArraySource(images=images, labels=labels)
    wanted = with_numpy(network, source)
    if num_examples > 1:
        assert 0 < wanted["eval/top1"] < wanted["eval/top5"] < 1
    _, weights, step = network
    for num_processes in (1, 2, 4):
        parts = []
        for index in range(num_processes):
            config = dataclasses.replace(CONFIG, num_threads=1)
            with pipeline.eval_batches(config, source, process_index=index, num_processes=num_processes) as iterator:
                parts.append(list(iterator))
        whole = [
            {name: np.concatenate([rows[name] for rows in batch]) for name in batch[0]}
            for batch in zip(*parts, strict=True)
        ]
        found = run_evaluation(step, {"eval": weights}, whole, make_mesh())
        assert found == pytest.approx(wanted, rel=1e-5)


def rows_of(seed: int, num_examples: int, num_batches: int) -> list[dict[str, np.ndarray]]:
    """Batches of noise, of which some rows do not count."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.integers(0, 256, (num_examples, 16, 16, 3)).astype(np.uint8),
            "label": rng.integers(0, NUM_CLASSES, num_examples).astype(np.int32),
            "mask": (rng.random(num_examples) < 0.9).astype(np.float32),
        }
        for _ in range(num_batches)
    ]


def test_outcomes_are_those_of_the_metrics(network: Network) -> None:
    structure, weights, step = network
    batches = rows_of(0, 16, 3)
    observed: list[dict[str, Outcomes]] = []
    found = run_evaluation(step, {"eval": weights}, batches, make_mesh(), observe=observed.append)
    assert found is not None
    (outcomes,) = (each["eval"] for each in observed)
    whole = {name: np.concatenate([rows[name] for rows in batches]) for name in batches[0]}
    index = np.flatnonzero(whole["mask"])
    assert len(index) < 48
    model = merge(structure.graphdef, *weights)
    model.eval()
    logits = jax.jit(model)(normalise(jnp.asarray(whole["image"][index]), CONFIG.mean, CONFIG.std))
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    best = probabilities.argmax(axis=1)
    assert np.array_equal(outcomes.index, index)
    assert np.array_equal(outcomes.label, whole["label"][index])
    assert np.array_equal(outcomes.predicted, best)
    assert outcomes.probability == pytest.approx(probabilities.max(axis=1), rel=1e-5)
    assert outcomes.is_right.mean() == found["eval/top1"]

    counts, right = outcomes.per_class(NUM_CLASSES)
    matrix = outcomes.confusion(NUM_CLASSES)
    assert matrix.shape == (NUM_CLASSES, NUM_CLASSES)
    assert np.array_equal(counts, matrix.sum(axis=1))
    assert np.array_equal(right, np.diag(matrix))
    assert all(matrix[i, j] == np.sum((outcomes.label == i) & (best == j)) for i in range(7) for j in range(7))
    worst = outcomes.most_confidently_wrong(5)
    wrong = np.sort(outcomes.probability[~outcomes.is_right])[::-1]
    assert len(worst) == 5
    assert np.array_equal(outcomes.probability[worst], wrong[:5])
    assert not outcomes.is_right[worst].any()


@pytest.mark.parametrize("reproducible", [True, False])
def test_outcomes_change_no_bit_of_the_metrics(network: Network, reproducible: bool) -> None:
    structure, weights, _ = network
    execution = dataclasses.replace(structure.execution, reproducible=reproducible)
    structure = dataclasses.replace(structure, execution=execution)
    objective = SoftmaxCrossEntropy()
    plain = make_row_step(structure, lambda model, images, batch: objective.evaluate(model(images), batch), make_mesh())
    step = make_eval_step(structure, objective, make_mesh())
    for rows in rows_of(1, 32, 2):
        without, found = (each(weights, to_global(rows, make_mesh())) for each in (plain, step))
        assert found.keys() - without.keys() == {"/label", "/predicted", "/probability"}
        for name, value in without.items():
            assert np.asarray(value).tobytes() == np.asarray(found[name]).tobytes(), name


def test_where_nothing_can_be_evaluated_there_is_an_error_and_no_number(network: Network) -> None:
    _, weights, step = network
    nothing: dict[str, np.ndarray] = {
        "image": np.zeros((16, 16, 16, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "mask": np.zeros(16, np.float32),
    }
    for batches in ([], [nothing, nothing]):
        with pytest.raises(ConfigError, match=r"no held-out image could be evaluated.*nfnet doctor --all-images"):
            run_evaluation(step, {"eval": weights}, batches, make_mesh())


def test_logits_that_overflow_are_no_hits(network: Network) -> None:
    _, (params, batch_stats), step = network
    rows: dict[str, np.ndarray] = {
        "image": np.zeros((16, 16, 16, 3), np.uint8),
        "label": np.zeros(16, np.int32),  # the class that a search for the largest of nothing but NaN ends at
        "mask": np.ones(16, np.float32),
    }
    overflowing = params | {
        "final_conv.gain": 1e6 * params["final_conv.gain"],
        "head.kernel": jnp.full_like(params["head.kernel"], 3e38),
    }
    assert all(jnp.all(jnp.isfinite(value)) for value in overflowing.values())
    observed: list[dict[str, Outcomes]] = []
    weights = {"eval": (overflowing, batch_stats)}
    found = run_evaluation(step, weights, [rows], make_mesh(), observe=observed.append)
    assert found is not None
    (outcomes,) = (each["eval"] for each in observed)
    assert outcomes.predicted.tolist() == [NO_CLASS] * 16
    assert outcomes.confusion(NUM_CLASSES)[0, NUM_CLASSES] == 16
    assert outcomes.most_confidently_wrong(5).size == 0
    assert not np.isfinite(found["eval/loss"])
    assert (found["eval/top1"], found["eval/top5"], found["eval/num_examples"]) == (0.0, 0.0, 16.0)
