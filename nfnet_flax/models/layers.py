"""Layers that the families of networks use.

Parameters are float32; images, activations and kernels are computed in `compute_dtype`. Statistics of weight
standardization and of BatchNorm are at least float32. Layers have no random state: random numbers are drawn from one
key per example, which the caller gives (see `example_keys`), so they do not depend on how a batch is divided.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nfnet_flax.models.convolution import conv2d
from nfnet_flax.models.scopes import NamedLayer, scoped
from nfnet_flax.models.standardization import StandardizationName, standardize

ActivationName = Literal[
    "gelu", "gelu_erf", "relu", "silu", "leaky_relu", "elu", "celu", "selu", "relu6", "tanh",
    "sigmoid", "softplus", "soft_sign", "log_sigmoid", "identity",
]  # fmt: skip
ComputeDtype = Literal["float32", "bfloat16", "float64"]
"""float64 is for verification; it needs `jax.enable_x64(True)`."""
DTYPES: dict[ComputeDtype, jnp.dtype] = {name: jnp.dtype(name) for name in ("float32", "bfloat16", "float64")}

# Function and gamma, which restores unit variance for a standard normal input (arXiv 2101.08692, section 3).
ACTIVATIONS: dict[ActivationName, tuple[Callable[[jax.Array], jax.Array], float]] = {
    "gelu": (jax.nn.gelu, 1.7015043497085571),
    "gelu_erf": (functools.partial(jax.nn.gelu, approximate=False), 1.7015043497085571),  # timm's form
    "relu": (jax.nn.relu, 1.7139588594436646),
    "silu": (jax.nn.silu, 1.7881293296813965),
    "leaky_relu": (jax.nn.leaky_relu, 1.70590341091156),
    "elu": (jax.nn.elu, 1.2716004848480225),
    "celu": (jax.nn.celu, 1.270926833152771),
    "selu": (jax.nn.selu, 1.0008515119552612),
    "relu6": (jax.nn.relu6, 1.7131484746932983),
    "tanh": (jnp.tanh, 1.5939117670059204),
    "sigmoid": (jax.nn.sigmoid, 4.803835391998291),
    "softplus": (jax.nn.softplus, 1.9203323125839233),
    "soft_sign": (jax.nn.soft_sign, 2.338853120803833),
    "log_sigmoid": (jax.nn.log_sigmoid, 1.9193484783172607),
    "identity": (lambda x: x, 1.0),
}


class InitRngs:
    """Replacement of `nnx.Rngs` within a constructor: one key, and a counter that is a Python number.

    The counter of `nnx.Rngs` is an array; under `eval_shape` each use of it takes time that grows with the network:
    computing the shapes of all 16 variants took 76 s instead of 8.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        self._key = rngs.params()
        self._count = 0

    def params(self) -> jax.Array:
        """A new key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


AnyRngs = nnx.Rngs | InitRngs


def statistics_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Type of statistics, means and logits for a compute type: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def activate(name: ActivationName, x: jax.Array, *, scaled: bool = True) -> jax.Array:
    """Activation in the dtype of `x`, multiplied by its gamma if `scaled`; in a folded network the next kernel is."""
    function, gamma = ACTIVATIONS[name]
    return function(x) * jnp.asarray(gamma, x.dtype) if scaled else function(x)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _initial(init: nnx.Initializer, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # Under `jit`, so that arrays of the same shape are traced and compiled once.
    return init(key, shape, jnp.float32)


FAN_IN_NORMAL = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
FAN_IN_TRUNCATED = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class WSConv(NamedLayer):
    """Convolution with scaled weight standardization, and a gain and a bias per output channel.

    Padding is SAME, or by half of the window on each side if `has_symmetric_padding`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        standardization: StandardizationName = "published",
        has_symmetric_padding: bool = False,
        compute_dtype: ComputeDtype,
        rngs: AnyRngs,
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(_initial(FAN_IN_NORMAL, rngs.params(), shape))
        self.gain = nnx.Param(jnp.ones((out_channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
        self.stride = stride
        self.groups = groups
        self.standardization: StandardizationName = standardization
        self.has_symmetric_padding = has_symmetric_padding
        self.compute_dtype: ComputeDtype = compute_dtype
        self.is_prepared = False

    @scoped
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, I) -> (N, H / stride, W / stride, O)."""
        y, bias = self._convolved(x)
        return y + bias

    @scoped
    def without_bias(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The convolution (N, H / stride, W / stride, O), and the bias (O,) that has to be added to it."""
        return self._convolved(x)

    def _convolved(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype = DTYPES[self.compute_dtype]
        kernel = self.kernel[...]
        if not self.is_prepared:  # otherwise it is already standardized, once for many calls (`preparation.prepare`)
            with jax.named_scope("standardize"):
                kernel = standardize(kernel.astype(statistics_dtype(dtype)), self.gain[...], self.standardization)
        kernel = kernel.astype(dtype)
        is_symmetric = self.has_symmetric_padding
        y = conv2d(x.astype(dtype), kernel, stride=self.stride, groups=self.groups, is_symmetric=is_symmetric)
        return y, self.bias[...].astype(dtype)


class Conv(NamedLayer):
    """Plain convolution without bias and with SAME padding, for the networks with BatchNorm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        kernel_init: nnx.Initializer = FAN_IN_TRUNCATED,
        compute_dtype: ComputeDtype,
        rngs: AnyRngs,
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(_initial(kernel_init, rngs.params(), shape))
        self.stride = stride
        self.groups = groups
        self.compute_dtype: ComputeDtype = compute_dtype

    @scoped
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, I) -> (N, H / stride, W / stride, O)."""
        dtype = DTYPES[self.compute_dtype]
        return conv2d(x.astype(dtype), self.kernel[...].astype(dtype), stride=self.stride, groups=self.groups)


class BatchNorm(NamedLayer):
    """Batch normalization over N, H and W (Ioffe and Szegedy 2015), in the form of the published baselines.

    In training mode it normalises with the statistics of the batch it is given (a microbatch if the step cuts the
    batch) and updates the running statistics; in evaluation mode it uses the running statistics. Their average is not
    biased towards its initial value: after n batches the newest has the weight `(1 - decay) / (1 - decay ** n)`.
    """

    def __init__(self, channels: int, *, decay: float, epsilon: float) -> None:
        self.gain = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones((channels,), jnp.float32))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.decay = decay
        self.epsilon = epsilon
        self.deterministic = False
        self.is_folded = False
        """Whether `fold_batch_norms` has put the running statistics into gain and bias, or the gain into the
        convolution before (then it is empty)."""

    @scoped
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) -> the same shape and dtype; the arithmetic is at least float32."""
        h = x.astype(statistics_dtype(x.dtype))
        if self.is_folded:
            scaled = h * self.gain[...] if self.gain[...].size else h
            return (scaled + self.bias[...]).astype(x.dtype)
        if self.deterministic:
            mean, variance = self.mean[...], self.variance[...]
        else:
            mean = jnp.mean(h, axis=(0, 1, 2))
            # As in the published code. Both sums are made while the convolution before writes its result, where a mean
            # of squared deviations would read it again.
            variance = jnp.maximum(jnp.mean(jnp.square(h), axis=(0, 1, 2)) - jnp.square(mean), 0.0)
            count = self.count[...] + 1
            share = (1.0 - self.decay) / (1.0 - self.decay ** count.astype(jnp.float32))
            for running, seen in ((self.mean, mean), (self.variance, variance)):
                running[...] += share * (lax.stop_gradient(seen).astype(jnp.float32) - running[...])
            self.count[...] = count
        scale = lax.rsqrt(variance + self.epsilon) * self.gain[...]
        return ((h - mean) * scale + self.bias[...]).astype(x.dtype)


class Dense(NamedLayer):
    """Dense layer: an affine map of the last axis."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: nnx.Initializer,
        compute_dtype: ComputeDtype,
        rngs: AnyRngs,
    ) -> None:
        self.kernel = nnx.Param(_initial(kernel_init, rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32))
        self.compute_dtype: ComputeDtype = compute_dtype

    @scoped
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., I) -> (..., O)."""
        dtype = DTYPES[self.compute_dtype]
        return x.astype(dtype) @ self.kernel[...].astype(dtype) + self.bias[...].astype(dtype)


class SqueezeExcite(NamedLayer):
    """Channel gate in (0, 1): mean over H and W, dense, activation, dense, sigmoid (Hu et al. 2018)."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        compute_dtype: ComputeDtype,
        rngs: AnyRngs,
    ) -> None:
        init = FAN_IN_TRUNCATED
        self.reduce = Dense(channels, hidden, kernel_init=init, compute_dtype=compute_dtype, rngs=rngs)
        self.expand = Dense(hidden, channels, kernel_init=init, compute_dtype=compute_dtype, rngs=rngs)
        self.activation = activation

    @scoped
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) -> (N, 1, 1, C)."""
        return self._of_mean(jnp.mean(x, axis=(1, 2), keepdims=True))

    @scoped
    def gate(self, y: jax.Array, bias: jax.Array) -> jax.Array:
        """`self(y + bias) * (y + bias)` for a convolution (N, H, W, C) and its bias (C,).

        In this form the gradient of the bias follows from sums per example, which the gate's gradient needs anyway, so
        it takes no separate pass over the images.
        """
        factor = self._of_mean(jnp.mean(y, axis=(1, 2), keepdims=True) + bias)
        return factor * y + factor * bias

    def _of_mean(self, pooled: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.expand(self.activation(self.reduce(pooled))))


def max_pool_3x3(x: jax.Array, *, is_symmetric: bool = False) -> jax.Array:
    """3x3 maximum with stride 2 and SAME padding, or padding by one pixel on each side if `is_symmetric`."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0)) if is_symmetric else "SAME"
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def layer_keys(keys: jax.Array | None, layer: jax.typing.ArrayLike) -> jax.Array:
    """The keys of the examples for one layer.

    Raises:
      ValueError: no keys were given, although the layer draws random numbers.
    """
    if keys is None:
        raise ValueError(
            "this model draws dropout or stochastic depth in training mode: call it with keys=, one PRNG key per "
            "example (nfnet_flax.models.example_keys), or call model.eval() first"
        )
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, layer)


@jax.named_scope("drop_path")
def drop_path(x: jax.Array, rate: jax.typing.ArrayLike, keys: jax.Array, *, rescale: bool = False) -> jax.Array:
    """Stochastic depth: sets all values of an example to zero with probability `rate`.

    The other examples are divided by `1 - rate` if `rescale` (EfficientNet's drop-connect), and are unchanged otherwise
    (normalizer-free networks).
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate))(keys)
    scale = jnp.where(keep, 1.0 / (1.0 - rate) if rescale else 1.0, 0.0).astype(x.dtype)
    return x * scale.reshape(-1, *[1] * (x.ndim - 1))


@jax.named_scope("dropout")
def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Inverted dropout of (N, C) features: features that are kept are divided by `1 - rate`."""
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
