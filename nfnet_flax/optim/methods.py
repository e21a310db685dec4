"""How an update is computed from a gradient: one frozen configuration for each method, made of Optax's transformations.

To add a method, derive a frozen dataclass from `Method`. Each layer has its own arrays, so a layer-wise method has the
same effect on a layer whatever the depth of the network.
"""

import abc
import dataclasses
from collections.abc import Sequence

import jax
import optax

from nfnet_flax.config import require
from nfnet_flax.open_config import OpenConfig, declare_kinds
from nfnet_flax.optim.param_groups import ParamGroup, assign, require_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(OpenConfig, abc.ABC):
    """Base class of a recipe's `optim.method`."""

    @property
    def is_divisible(self) -> bool:
        """Whether a device can be given a part of each kernel, some of its input channels, and its update is then that
        part of the whole update. If not, which is the default, every device has whole kernels and makes the whole
        update."""
        return False

    @property
    def is_reproducible(self) -> bool:
        """Whether the same gradient gives the same bits of the update on any number of devices; by default True."""
        return True

    @abc.abstractmethod
    def transformation(
        self, learning_rate: optax.Schedule, decay: optax.GradientTransformation, names: Sequence[str]
    ) -> optax.GradientTransformation:
        """An Optax transformation from gradients to updates, which are added to the parameters: both `{name: array}`.

        Args:
          learning_rate: learning rate as a function of the step, counted from 0. The update must be proportional to it,
            because the factors of `optim.learning_rate_groups` are multiplied with the update.
          decay: transformation that adds `weight_decay * parameter` to its input. Put before the momentum, weight decay
            is a part of the gradient; put directly before the learning rate, it is decoupled (arXiv 1711.05101).
          names: names of all parameters of the network. Parameters that are not trained are not passed to the
            transformation.

        Raises:
          ConfigError: the method's numbers do not fit the network.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Method):
    """Gradient descent with momentum; weight decay is part of the gradient. The defaults are published for NFNets."""

    is_divisible = True

    momentum: float = 0.9
    """Factor on the momentum of the previous step."""
    nesterov: bool = True
    """Whether to use Nesterov's form of momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share("momentum", self.momentum)

    def transformation(
        self, learning_rate: optax.Schedule, decay: optax.GradientTransformation, names: Sequence[str]
    ) -> optax.GradientTransformation:
        del names
        momentum = optax.trace(decay=self.momentum, nesterov=self.nesterov)
        return optax.chain(decay, momentum, optax.scale_by_learning_rate(learning_rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSProp(Method):
    """RMSProp as TensorFlow computes it, for EfficientNets (arXiv 1905.11946, section 5.2).

    Weight decay is part of the gradient, the average of squared gradients starts at 1, and the momentum is computed
    from updates that are already multiplied by the learning rate.
    """

    is_divisible = True

    decay: float = 0.9
    """Decay rate of the average of squared gradients."""
    eps: float = 1e-3
    """Number added to that average, under the root."""
    momentum: float = 0.9
    """Factor on the previous update, which is added to the new one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share("decay", self.decay)
        _require_share("momentum", self.momentum)
        _require_positive("eps", self.eps)

    def transformation(
        self, learning_rate: optax.Schedule, decay: optax.GradientTransformation, names: Sequence[str]
    ) -> optax.GradientTransformation:
        del names
        return optax.chain(
            decay,
            optax.scale_by_rms(self.decay, self.eps, initial_scale=1.0, eps_in_sqrt=True),
            optax.scale_by_learning_rate(learning_rate),
            optax.trace(decay=self.momentum),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decoupled(Method, abc.ABC):
    """A method with decoupled weight decay, which is multiplied by the learning rate only (arXiv 1711.05101)."""

    @abc.abstractmethod
    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        """Transformation from gradients to updates, without weight decay and learning rate."""

    def transformation(
        self, learning_rate: optax.Schedule, decay: optax.GradientTransformation, names: Sequence[str]
    ) -> optax.GradientTransformation:
        return optax.chain(self._scale(names), decay, optax.scale_by_learning_rate(learning_rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AdamLike(_Decoupled, abc.ABC):
    """A method with averages of gradients and of their squares."""

    b1: float = 0.9
    """Decay rate of the average of gradients."""
    b2: float = 0.999
    """Decay rate of the average of squared gradients."""
    eps: float = 1e-8
    """Number added to the root of the average of squared gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share("b1", self.b1)
        _require_share("b2", self.b2)
        _require_positive("eps", self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(_AdamLike):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    is_divisible = True

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        del names
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RAdam(_AdamLike):
    """Rectified Adam (arXiv 1908.03265), which does not divide by the root in the first steps, while its variance is
    unknown; decoupled weight decay."""

    is_divisible = True

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        del names
        return optax.scale_by_radam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMB(_AdamLike):
    """Adam whose update of each layer, weight decay included, is scaled to the norm of the layer (arXiv 1904.00962).

    Every device has the whole state, as the norm is that of a whole layer.
    """

    eps: float = 1e-6
    """Number added to the root of the average of squared gradients."""

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        del names
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)

    def transformation(
        self, learning_rate: optax.Schedule, decay: optax.GradientTransformation, names: Sequence[str]
    ) -> optax.GradientTransformation:
        within = optax.chain(decay, optax.scale_by_trust_ratio())
        return super().transformation(learning_rate, within, names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(_Decoupled):
    """Lion (arXiv 2302.06675): the update is the sign of an average gradient; decoupled weight decay. Its state takes
    half the memory of Adam's."""

    is_divisible = True

    b1: float = 0.9
    """Weight of the momentum in the average whose sign is the update; the gradient has the rest."""
    b2: float = 0.99
    """Decay rate of the momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share("b1", self.b1)
        _require_share("b2", self.b2)

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        del names
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(_Decoupled):
    """Adafactor (arXiv 1804.04235): the average of squared gradients is stored by rows and columns; decoupled weight
    decay.

    Weight decay is multiplied by the learning rate, as in the other methods; in `optax.adafactor` the caller has to do
    that. Every device has the whole state.
    """

    decay_rate: float = 0.8
    """Exponent of the decay rate of the average of squared gradients, which is `1 - t ** -decay_rate` at step t,
    counted from 1."""
    eps: float = 1e-30
    """Number added to squared gradients."""
    min_dim_size_to_factor: int = 128
    """The average for an array is stored by rows and columns if its two longest axes are at least this long."""
    clipping_threshold: float | None = 1.0
    """Largest root mean square of a layer's update before it is multiplied by the learning rate; None: no limit."""
    multiply_by_parameter_scale: bool = True
    """Multiply a layer's update by the root mean square of its parameters, so that the learning rate is relative to
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive("decay_rate", self.decay_rate)
        _require_positive("eps", self.eps)
        _require_positive("min_dim_size_to_factor", self.min_dim_size_to_factor)
        if self.clipping_threshold is not None:
            _require_positive("clipping_threshold", self.clipping_threshold)

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        del names
        parts = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate,
                min_dim_size_to_factor=self.min_dim_size_to_factor,
                epsilon=self.eps,
            )
        ]
        if self.clipping_threshold is not None:
            parts.append(optax.clip_by_block_rms(self.clipping_threshold))
        if self.multiply_by_parameter_scale:
            parts.append(optax.scale_by_param_block_rms())
        return optax.chain(*parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(_Decoupled):
    """Muon: momentum whose matrices are made nearly orthogonal (Jordan et al. 2024, github.com/KellerJordan/Muon).

    The kernel of a convolution is taken as a matrix of inputs (height, width and channels) by outputs. Parameters that
    are not matrices, and the head, are updated by Adam with the same learning rate, as its authors do. Weight decay is
    decoupled.

    Its last bits depend on the number of devices: on CPUs, programs for another number of devices add the squares of a
    matrix in another order. So a recipe with Muon must turn `execution.reproducible` off.
    """

    momentum: float = 0.95
    """Factor on the momentum of the previous step."""
    nesterov: bool = True
    """Whether to use Nesterov's form of momentum, also in Adam's part."""
    num_iterations: int = 5
    """Number of Newton-Schulz iterations, which make a matrix nearly orthogonal."""
    eps: float = 1e-8
    """Number added to the norm of a matrix, and in Adam's part to the root of the average of squared gradients."""
    consistent_rms: float | None = None
    """Root mean square of a matrix's update before the learning rate, whatever its shape: 0.2 is about that of Adam, so
    Adam's learning rates can be used (arXiv 2502.16982); None: the update is `sqrt(max(1, outputs / inputs))` times an
    orthogonal matrix."""
    adam_b1: float = 0.9
    """Decay rate of the average of gradients in Adam's part."""
    adam_b2: float = 0.999
    """Decay rate of the average of squared gradients in Adam's part."""
    groups: tuple[ParamGroup, ...] = (ParamGroup("head.*", 0.0), ParamGroup("*.kernel", 1.0), ParamGroup("*", 0.0))
    """Patterns of parameter names, each with 1 (Muon) or 0 (Adam); the first pattern that matches a name counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("momentum", self.momentum), ("adam_b1", self.adam_b1), ("adam_b2", self.adam_b2)):
            _require_share(name, value)
        _require_positive("eps", self.eps)
        _require_positive("num_iterations", self.num_iterations)
        if self.consistent_rms is not None:
            _require_positive("consistent_rms", self.consistent_rms)
        require_flags("optim.method.groups", self.groups, "use 1 (Muon) or 0 (Adam)")

    @property
    def is_reproducible(self) -> bool:
        return False

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        flags = assign("optim.method.groups", self.groups, names)

        def matrices(params: dict[str, jax.Array]) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
            return {name: _as_matrix(value) if flags[name] else None for name, value in params.items()}

        return optax.contrib.muon(
            -1.0,  # changes neither size nor sign: the learning rate is applied later, after the weight decay
            ns_steps=self.num_iterations,
            beta=self.momentum,
            eps=self.eps,
            nesterov=self.nesterov,
            adam_b1=self.adam_b1,
            adam_b2=self.adam_b2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=self.consistent_rms,
        )


def _as_matrix(kernel: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    """A kernel as a matrix of inputs by outputs; the outputs are the last axis."""
    last = kernel.ndim - 1
    return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(range(last)), output_axis=last)


declare_kinds(Method, SGD, RMSProp, AdamW, RAdam, Lion, LAMB, Adafactor, Muon)


def _require_share(field: str, value: float) -> None:
    require(0 <= value < 1, f"optim.method.{field}", value, "must lie in [0, 1)")


def _require_positive(field: str, value: float) -> None:
    require(value > 0, f"optim.method.{field}", value, "must be positive")
