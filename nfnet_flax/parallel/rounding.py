"""Rounds each product by itself, so that the bits of a sum do not depend on how it is compiled.

Compilers for CPUs and GPUs compute a product and an addition as one operation with one rounding, wherever they see one
next to the other. If two products are added, only one of them is rounded, and which one depends on the shapes and on
what is computed in the same loop. So arithmetic on each element by itself, too, has other bits on a share of an array
than on the whole array. (The moving average of the parameters had, for kernels of a few channels.)
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

_PRODUCTS = frozenset({"mul", "div", "square", "integer_pow"})
"""Primitives after which a compiler could leave out the rounding. A division by a constant may become a product."""
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
"""Primitives that call a function -> the name of their parameter that holds it."""


def separately_rounded(
    function: Callable[..., Any], not_negative: Callable[..., jax.Array], platform: str
) -> Callable[..., Any]:
    """A function that computes the same, with each product rounded before anything is added to it.

    Bodies of loops stay as they are: the same body is compiled to the same code, however often it runs. On TPUs nothing
    is changed: there `nfnet plan --compare` shows what is computed.

    Args:
      function: function of trees of arrays.
      not_negative: gives, for the same arguments, a number that is never negative, which compilers cannot know.
      platform: that of the devices on which it runs.
    """
    if platform == "tpu":
        return function

    def rounded(*args: Any) -> Any:
        # Not chosen from constants: compilers make code for each of them, and leave out the comparison.
        lowest = -jnp.inf * (not_negative(*args).astype(jnp.float32) + 1.0)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _evaluate(closed, jax.tree.leaves(args), lowest)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rounded


def _evaluate(closed: core.ClosedJaxpr, args: Sequence[jax.Array], lowest: jax.Array) -> list[Any]:
    """The results of a traced function, with the largest of each product and `lowest` in place of the product."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def value_of(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [value_of(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name in _INLINED:
            found = _evaluate(equation.params[_INLINED[name]], given, lowest)
        elif name == "cond":
            index, *operands = given
            branches = [_branch(branch, lowest) for branch in equation.params["branches"]]
            found = lax.switch(index, branches, *operands)
        elif name == "rsqrt":
            found = [_rounded(lax.integer_pow(_rounded(lax.sqrt(given[0]), lowest), -1), lowest)]
        else:
            params = equation.primitive.get_bind_params(equation.params)
            scope = str(equation.source_info.name_stack)
            with equation.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
                result = equation.primitive.bind(*given, **params)
            found = result if equation.primitive.multiple_results else [result]
            if name in _PRODUCTS and jnp.issubdtype(found[0].dtype, jnp.floating):
                found = [_rounded(found[0], lowest)]
        values.update(zip(equation.outvars, found, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _rounded(product: jax.Array, lowest: jax.Array) -> jax.Array:
    # Without `jnp.maximum`, a function within the function, which takes longer to trace.
    return lax.max(product, lax.broadcast(lax.convert_element_type(lowest, product.dtype), product.shape))


def _branch(closed: core.ClosedJaxpr, lowest: jax.Array) -> Callable[..., list[Any]]:
    return lambda *operands: _evaluate(closed, operands, lowest)
