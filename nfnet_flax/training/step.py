"""One update: gradient, optimizer, EMA and metrics in a single `jit`, to which the state is donated."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from nfnet_flax.models.params import BatchStats, Params, differentiated, global_norm, prepare, pull_back
from nfnet_flax.models.standardization import StandardizationName
from nfnet_flax.objectives import Arrays, Batch, Objective
from nfnet_flax.optim import Optimizer, SAMConfig
from nfnet_flax.optim.optimizer import update_ema
from nfnet_flax.optim.sam import ascend
from nfnet_flax.parallel.reduce import Reduction
from nfnet_flax.training.gradient import Gradient, Metrics, make_gradient
from nfnet_flax.training.state import Structure, TrainState, abstract_state


def _uphill(
    gradient_of: Gradient, form: StandardizationName, frozen: frozenset[str], sam: SAMConfig
) -> Callable[[TrainState, Batch, Arrays], Params]:
    """Builds a function that returns the parameters at which SAM computes the gradient (arXiv 2010.01412, equation
    2)."""

    def uphill(state: TrainState, batch: Batch, arrays: Arrays) -> Params:
        prepared, facts = prepare(state.params, form)
        gradient, _, metrics = gradient_of(prepared, state.batch_stats, state.step, batch, arrays)

        def move(params: Params, gradient: Params) -> Params:
            gradient, unit_norms = pull_back(gradient, params, facts, form, frozen)
            return ascend(params, gradient, global_norm(gradient, unit_norms), rho=sam.rho)

        return lax.cond(jnp.isfinite(metrics["train/loss"]), move, lambda params, _: params, state.params, gradient)

    return uphill


def _unchanged(state: TrainState, gradient: Params, batch_stats: BatchStats) -> tuple[TrainState, jax.Array]:
    """Replaces an update if the loss is not finite: returns the unchanged state, and the norm of the gradient."""
    del batch_stats
    return state, optax.tree.norm(gradient)


def make_train_step(
    structure: Structure,
    optimizer: Optimizer,
    objective: Objective,
    mesh: Mesh,
    *,
    seed: int,
    reduction: Reduction | None = None,
) -> jax.stages.Wrapped:
    """Builds `step(state, batch, arrays=None) -> (state, metrics)`; `state` is donated, metrics stay on the device.

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
        the result depends on it: with BatchNorm, and with SAM on a fraction of each part.
    """
    form, sam, frozen = structure.standardization, optimizer.sam, optimizer.frozen
    wanted = differentiated(structure.shapes.keys() - frozen, structure.shapes)
    make = functools.partial(make_gradient, structure, objective, mesh, seed=seed, reduction=reduction, wanted=wanted)
    gradient_of = make()
    is_whole = sam is None or sam.fraction == 1.0
    uphill = (
        None if sam is None else _uphill(gradient_of if is_whole else make(fraction=sam.fraction), form, frozen, sam)
    )

    def train_step(state: TrainState, batch: Batch, arrays: Arrays | None = None) -> tuple[TrainState, Metrics]:
        arrays = arrays or {}
        # Kernels are standardized once, outside the loop over microbatches, and the gradient of this standardization is
        # computed once, after the sum. This is done in `update`, which is a branch of its own, so that compilers do not
        # fuse it with the backward pass. That would need more passes over the parameters, and round differently on
        # other layouts of devices.
        point = state.params if uphill is None else uphill(state, batch, arrays)
        prepared, facts = prepare(point, form)
        gradient, batch_stats, metrics = gradient_of(prepared, state.batch_stats, state.step, batch, arrays)

        def update(state: TrainState, gradient: Params, batch_stats: BatchStats) -> tuple[TrainState, jax.Array]:
            gradient, norms = pull_back(gradient, point, facts, form, frozen)
            norm = global_norm(gradient, norms)
            # AGC compares with the norms of the parameters themselves, not with those of SAM's point.
            known = norms if sam is None else None
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.params, unit_norms=known, global_norm=norm
            )
            trained = {name: state.params[name] for name in gradient}
            params: Params = state.params | optax.apply_updates(trained, updates)
            updated = TrainState(
                step=state.step + 1,
                params=params,
                batch_stats=batch_stats,
                opt_state=opt_state,
                ema_params=update_ema(state.ema_params, params, state.step, optimizer.ema_decay, frozen),
                ema_batch_stats=update_ema(state.ema_batch_stats, batch_stats, state.step, optimizer.ema_decay),
            )
            # The norm is finite if all gradients are. Choosing per element takes no additional pass over memory.
            is_finite = jnp.isfinite(norm)
            return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, state), norm

        metrics["train/learning_rate"] = optimizer.schedule(state.step)
        if "is_corrupt" in batch:
            metrics["data/num_corrupt"] = jnp.sum(batch["is_corrupt"])
        state, metrics["train/grad_norm"] = lax.cond(
            jnp.isfinite(metrics["train/loss"]), update, _unchanged, state, gradient, batch_stats
        )
        return state, metrics | optimizer.metrics(state.opt_state)

    # Without given shardings, the new state could be divided differently, and the step would be compiled a second time.
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(structure, optimizer, mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))
