"""Counts the multiply-adds of a network in its traced program."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from nfnet_flax.models import convolution
from nfnet_flax.models.classifier import Classifier
from nfnet_flax.models.params import merge, split


def forward_flops(model: Classifier, image_size: int) -> int:
    """Multiply-adds of one image's forward pass in evaluation mode, as the papers count FLOPs.

    Convolutions and matrix products are counted; additions of biases, activations and pools are not. Nothing is
    computed: the network may be abstract (`nnx.eval_shape`).
    """
    return sum(_counts(model, image_size))


def training_flops(model: Classifier, image_size: int) -> int:
    """Floating-point operations of one image's forward and backward pass, counted in the same way.

    A multiplication and an addition are two operations. The backward pass computes the gradient of each layer's
    parameters and of its input, except for the input of the first layer: the image. What a step computes a second time
    (rematerialization), or twice on purpose (SAM), is not counted; neither is it left out if layers are frozen.
    """
    first, *others = _counts(model, image_size)
    return 2 * (2 * first + 3 * sum(others))


def _counts(model: Classifier, image_size: int) -> list[int]:
    """Multiply-adds of each convolution and matrix product, in order."""
    graphdef, params, batch_stats = split(model)

    def forward(params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        network = merge(graphdef, params, batch_stats)
        network.eval()
        with convolution.for_platform("tpu"):  # on a CPU a convolution is computed in pieces
            return network(images)

    images = jax.ShapeDtypeStruct((1, image_size, image_size, model.config.in_channels), jnp.float32)
    found = map(_multiply_adds, _equations(jax.make_jaxpr(forward)(params, batch_stats, images).jaxpr))
    return [count for count in found if count]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr")]
        if not inner:
            yield equation
        for closed in inner:
            yield from _equations(closed.jaxpr)


def _multiply_adds(equation: Any) -> int:
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_channels
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    return 0
