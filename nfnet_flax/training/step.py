"""One update: gradient, optimizer, EMA and metrics in a single `jit`, to which the state is donated."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend import core
from jax.sharding import Mesh, PartitionSpec

from nfnet_flax.config import require
from nfnet_flax.models.params import BatchStats, Params
from nfnet_flax.models.preparation import (
    KernelFacts,
    UnitGradients,
    UnitNorms,
    differentiated,
    prepare,
    pull_back,
    unit_gradients,
    unit_squares,
)
from nfnet_flax.models.standardization import StandardizationName
from nfnet_flax.objectives import Arrays, Batch, Objective
from nfnet_flax.optim import Optimizer, SAMConfig
from nfnet_flax.optim.later import begun
from nfnet_flax.optim.norms import global_norm
from nfnet_flax.optim.optimizer import update_ema
from nfnet_flax.optim.sam import ascend
from nfnet_flax.parallel.mesh import BATCH_AXES, num_batch_shards
from nfnet_flax.parallel.reduce import Reduction
from nfnet_flax.parallel.rounding import separately_rounded
from nfnet_flax.training.gradient import Gradient, Metrics, make_local_gradient
from nfnet_flax.training.shares import Shares, shares_of
from nfnet_flax.training.state import Structure, TrainState, abstract_state

UNIT_RATIOS = "agc/unit_ratios"
"""Name of the metric of a step with the ratio of gradient to parameter norm of each unit: (units,)."""
MEASURED = frozenset({"train/param_norm", "train/update_norm", UNIT_RATIOS})
"""Metrics that are 0 in steps that do not measure their update."""
Tree = TypeVar("Tree")
Uphill = Callable[[TrainState, Batch, Arrays, Shares], tuple[Params, dict[str, jax.Array]]]


def _uphill(gradient_of: Gradient, form: StandardizationName, frozen: frozenset[str], sam: SAMConfig) -> Uphill:
    """Builds a function that returns the parameters at which SAM computes the gradient (arXiv 2010.01412, equation 2),
    and the norms of the output channels of the kernels that it comes from."""

    @jax.named_scope("sam")
    def uphill(
        state: TrainState, batch: Batch, arrays: Arrays, division: Shares
    ) -> tuple[Params, dict[str, jax.Array]]:
        prepared, facts = prepare(state.params, form, division)
        gradient, _, metrics = gradient_of(prepared, state.batch_stats, state.step, batch, arrays)

        def move(params: Params, gradient: Params, units: UnitGradients) -> Params:
            gradient = pull_back(gradient, params, facts, units, frozen)
            return ascend(params, gradient, global_norm(gradient, units.norms), rho=sam.rho)

        is_finite = jnp.isfinite(metrics["train/loss"])
        units = _in_a_branch(
            is_finite,
            lambda params, gradient: unit_gradients(gradient, params, facts, form, division),
            state.params,
            gradient,
        )
        moved = lax.cond(is_finite, move, lambda params, *_: params, state.params, gradient, units)
        return moved, facts.norms

    return uphill


def _in_a_branch(condition: jax.Array, function: Callable[..., Tree], *operands: Any) -> Tree:
    """What a function gives, or zeros where the condition is false. Nothing in it is fused with what is outside."""

    # Traced once, not once for the branch and once more for the shapes of its results.
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*operands)
    compute = core.jaxpr_as_fun(traced)

    def zeros(*leaves: jax.Array) -> list[jax.Array]:
        return [jnp.zeros(shape.shape, shape.dtype) for shape in jax.tree.leaves(shapes)]

    found = lax.cond(condition, compute, zeros, *jax.tree.leaves(operands))
    whole: Tree = jax.tree.unflatten(jax.tree.structure(shapes), found)
    return whole


def _unchanged(
    state: TrainState, gradient: Params, units: UnitGradients, batch_stats: BatchStats
) -> tuple[TrainState, jax.Array]:
    """Replaces an update if the loss is not finite: returns the unchanged state, and no norm of the gradient."""
    del gradient, units, batch_stats
    return state, jnp.asarray(jnp.nan, jnp.float32)


def _whole_gradient(
    optimizer: Optimizer, point: Params, facts: KernelFacts, step: jax.Array, gradient: Params, units: UnitGradients
) -> tuple[Params, UnitNorms]:
    """The gradient with respect to the trained parameters at `point`, and the norms of its units and of theirs."""
    gradient = pull_back(gradient, point, facts, units, optimizer.frozen)
    known = units.norms
    if optimizer.starts:  # what is not trained yet counts neither as a part of the gradient nor as clipped
        gradient = begun(gradient, optimizer.starts, step)
        of_gradient = begun({name: pair[0] for name, pair in known.items() if pair}, optimizer.starts, step)
        known = {name: pair and (of_gradient[name], pair[1]) for name, pair in known.items()}
    return gradient, {name: known.get(name) for name in gradient}


def _updates(
    optimizer: Optimizer, state: TrainState, gradient: Params, norms: UnitNorms, norm: jax.Array
) -> tuple[Params, optax.OptState]:
    """What is added to the trained parameters, and the new state of the optimizer."""
    more = {"step": state.step} if optimizer.starts else {}
    updates, opt_state = optimizer.update(
        gradient, state.opt_state, state.params, unit_norms=norms, global_norm=norm, **more
    )
    added: Params = dict(updates)
    return added, opt_state


@jax.named_scope("measure")
def _measured(
    optimizer: Optimizer,
    point: Params,
    facts: KernelFacts,
    division: Shares,
    state: TrainState,
    gradient: Params,
    units: UnitGradients,
) -> Metrics:
    """What is measured of an update before it is made; see `make_train_step`."""
    gradient, norms = _whole_gradient(optimizer, point, facts, state.step, gradient, units)
    updates, _ = _updates(optimizer, state, gradient, norms, global_norm(gradient, norms))
    kernels = {name: (updates[name],) for name, known in norms.items() if known is not None}
    sums = division.sums(lambda _, kernel: (unit_squares(kernel),), kernels)
    of_updates = {name: (jnp.sqrt(total), jnp.sqrt(total)) for name, (total,) in sums.items()}
    trained = {name: state.params[name] for name in gradient}
    of_params = {name: known and (known[1], known[1]) for name, known in norms.items()}
    ratios = optimizer.unit_ratios(gradient, trained, norms)
    found = {
        "train/update_norm": global_norm(updates, of_updates),
        "train/param_norm": global_norm(trained, of_params),
    }
    return found | ({UNIT_RATIOS: jnp.concatenate([ratios[name] for name in sorted(ratios)])} if ratios else {})


def _updated(
    optimizer: Optimizer,
    point: Params,
    facts: KernelFacts,
    state: TrainState,
    gradient: Params,
    units: UnitGradients,
    batch_stats: BatchStats,
) -> tuple[TrainState, jax.Array]:
    """The state after an update with the gradient at `point`, and the norm of the gradient.

    If the norm is not finite, the state is unchanged.
    """
    gradient, norms = _whole_gradient(optimizer, point, facts, state.step, gradient, units)
    norm = global_norm(gradient, norms)
    updates, opt_state = _updates(optimizer, state, gradient, norms, norm)
    trained = {name: state.params[name] for name in gradient}
    with jax.named_scope("update"):
        params: Params = state.params | optax.apply_updates(trained, updates)
    updated = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema_params=update_ema(
            state.ema_params, params, state.step, optimizer.ema_decay, optimizer.frozen, optimizer.starts
        ),
        ema_batch_stats=update_ema(state.ema_batch_stats, batch_stats, state.step, optimizer.ema_decay),
    )
    # The norm is finite if all gradients are. Choosing per element takes no additional pass over memory.
    is_finite = jnp.isfinite(norm)
    return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, state), norm


LocalStep = Callable[[TrainState, Batch, Arrays, jax.Array | None], tuple[TrainState, Metrics]]


def _make_local_step(
    structure: Structure,
    optimizer: Optimizer,
    objective: Objective,
    mesh: Mesh,
    *,
    seed: int,
    reduction: Reduction | None,
) -> LocalStep:
    """Builds the step of one device, with its share of the state and its rows of the batch; see `make_train_step`."""
    form, sam, frozen = structure.standardization, optimizer.sam, optimizer.frozen
    wanted = differentiated(structure.shapes.keys() - frozen, structure.shapes)
    make = functools.partial(
        make_local_gradient, structure, objective, mesh, seed=seed, reduction=reduction, wanted=wanted
    )
    gradient_of = make()
    is_whole = sam is None or sam.fraction == 1.0
    uphill = (
        None if sam is None else _uphill(gradient_of if is_whole else make(fraction=sam.fraction), form, frozen, sam)
    )

    def local_step(
        state: TrainState, batch: Batch, arrays: Arrays, measures: jax.Array | None
    ) -> tuple[TrainState, Metrics]:
        division = shares_of(structure, mesh, state.step)
        # Kernels are standardized once, outside the loop over microbatches, and the gradient of this standardization is
        # computed once, after the sum. This is done in branches of their own, so that compilers do not fuse it with the
        # backward pass. That would need more passes over the parameters, and round differently on other layouts of
        # devices.
        point, norms_of_params = (state.params, None) if uphill is None else uphill(state, batch, arrays, division)
        prepared, facts = prepare(point, form, division)
        gradient, batch_stats, metrics = gradient_of(prepared, state.batch_stats, state.step, batch, arrays)

        is_finite_loss = jnp.isfinite(metrics["train/loss"])
        # AGC compares with the norms of the parameters themselves, not with those of SAM's point.
        units = _in_a_branch(
            is_finite_loss,
            lambda point, gradient: unit_gradients(gradient, point, facts, form, division, norms_of_params),
            point,
            gradient,
        )
        metrics["train/learning_rate"] = optimizer.schedule(state.step)
        if "is_corrupt" in batch:
            metrics["data/num_corrupt"] = lax.psum(jnp.sum(batch["is_corrupt"]), BATCH_AXES)
        if measures is not None:
            measure = functools.partial(_measured, optimizer, point, facts, division)
            measured = _in_a_branch(is_finite_loss & measures, measure, state, gradient, units)
            # Before the update, which overwrites what is measured.
            state, gradient, measured = lax.optimization_barrier((state, gradient, measured))
            metrics |= measured
        update = functools.partial(_updated, optimizer, point, facts)
        state, metrics["train/grad_norm"] = lax.cond(
            is_finite_loss, update, _unchanged, state, gradient, units, batch_stats
        )
        return state, metrics | optimizer.metrics(state.opt_state)

    return local_step


def make_train_step(
    structure: Structure,
    optimizer: Optimizer,
    objective: Objective,
    mesh: Mesh,
    *,
    seed: int,
    reduction: Reduction | None = None,
) -> jax.stages.Wrapped:
    """Builds `step(state, batch, arrays=None, measures=None) -> (state, metrics)`; `state` is donated, metrics stay on
    the device.

    `measures` is a scalar that says whether the step also measures its update; None: the step cannot. Measured are the
    norms of the trained parameters, `train/param_norm`, and of the update, `train/update_norm`, and, if clipping is by
    units, `UNIT_RATIOS`: the results of `Optimizer.unit_ratios`, one after the other in the order of their names. They
    are 0 if the step did not measure. Measuring takes about the time of an update, and changes no bit of it.

    Args:
      structure: structure of the network, and how it is computed.
      optimizer: result of `make_optimizer`.
      objective: the objective that is minimized. The step's `arrays` are those of `Objective.arrays`, whole on every
        device.
      mesh: mesh over whose devices the batch is divided.
      seed: random seed of dropout and stochastic depth.
      reduction: adds the results of the devices; see `make_gradient`.

    Returns:
      The jitted step. If the loss or the gradient is not finite, the state is not changed, and neither is its step.

    Raises:
      ConfigError: the parts of the batch cannot be divided equally over the mesh, or their number is not given although
        the result depends on it: with BatchNorm, and with SAM on a fraction of each part; or kernels are divided, but
        the optimizer needs whole ones.
    """
    remedy = "the optimizer needs whole kernels: give model_structure(..., is_divided=optimizer.is_divisible)"
    needs_whole = structure.is_divided and not optimizer.is_divisible
    require(not needs_whole or num_batch_shards(mesh) == 1, "is_divided", structure.is_divided, remedy)
    local_step = _make_local_step(structure, optimizer, objective, mesh, seed=seed, reduction=reduction)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(structure, optimizer, mesh))
    specs = jax.tree.map(lambda sharding: sharding.spec, placed)
    if structure.num_parts is not None:
        local_step = separately_rounded(local_step, lambda state, *_: state.step, mesh.devices.flat[0].platform)
    divided_step = jax.shard_map(
        local_step,
        mesh=mesh,
        axis_names=set(BATCH_AXES),  # XLA's partitioner divides the height of images and exchanges their borders
        in_specs=(specs, PartitionSpec(BATCH_AXES), PartitionSpec(), PartitionSpec()),
        out_specs=(specs, PartitionSpec()),
        check_vma=False,
    )

    def train_step(
        state: TrainState, batch: Batch, arrays: Arrays | None = None, measures: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        stepped: tuple[TrainState, Metrics] = divided_step(state, batch, arrays or {}, measures)
        return stepped

    # Without given shardings, the new state could be divided differently, and the step would be compiled a second time.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))
