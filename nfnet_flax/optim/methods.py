"""How a step is made of a gradient: one frozen configuration for each method, made of Optax's transformations.

A method of one's own is a frozen dataclass that derives from `Method`. No transformation sees several layers in one
array: a layer-wise method does the same to a layer whatever the depth of the network.
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
    """What a recipe's `optim.method` must offer."""

    @property
    def is_reproducible(self) -> bool:
        """Whether the same gradient gives an update of the same bits on any number of devices, each of which holds
        whole parameters; by default it does."""
        return True

    @abc.abstractmethod
    def transformation(
        self, learning_rate: optax.Schedule, decay: optax.GradientTransformation, names: Sequence[str]
    ) -> optax.GradientTransformation:
        """An Optax transformation from gradients to what is added to the parameters: both are `{name: array}`.

        Args:
          learning_rate: of a step counted from 0. What is added to a parameter must be proportional to it, since
            `optim.learning_rate_groups` multiplies what this transformation gives.
          decay: adds `weight_decay * parameter` to what passes through it. Before the momentum it makes part of the
            gradient; before the learning rate alone it is decoupled (arXiv 1711.05101).
          names: of all parameters of the network. Those that are not trained never get to the transformation.

        Raises:
          ConfigError: the method's numbers do not fit the network.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Method):
    """Gradient descent with momentum; decay is part of the gradient. With these numbers, as published for NFNets."""

    momentum: float = 0.9
    """Share of the last step's momentum that stays."""
    nesterov: bool = True
    """Nesterov's form, which looks one step of the momentum ahead."""

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

    Decay is part of the gradient, the average of squared gradients starts at 1, and the momentum is of the steps:
    the learning rate counts before it.
    """

    decay: float = 0.9
    """Share of the last step's average of squared gradients that stays."""
    eps: float = 1e-3
    """Added to that average, under the root."""
    momentum: float = 0.9
    """Share of the last step that is repeated."""

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
    """A method whose weight decay is multiplied by the learning rate alone (arXiv 1711.05101)."""

    @abc.abstractmethod
    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        """From gradients to steps, but for decay and learning rate."""

    def transformation(
        self, learning_rate: optax.Schedule, decay: optax.GradientTransformation, names: Sequence[str]
    ) -> optax.GradientTransformation:
        return optax.chain(self._scale(names), decay, optax.scale_by_learning_rate(learning_rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AdamLike(_Decoupled, abc.ABC):
    """A method with averages of gradients and of their squares."""

    b1: float = 0.9
    """Share of the last step's average gradient that stays."""
    b2: float = 0.999
    """Share of the last step's average of squared gradients that stays."""
    eps: float = 1e-8
    """Added to the root of that average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share("b1", self.b1)
        _require_share("b2", self.b2)
        _require_positive("eps", self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(_AdamLike):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        del names
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RAdam(_AdamLike):
    """Rectified Adam (arXiv 1908.03265): no division by the root until its variance is known; decoupled decay."""

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        del names
        return optax.scale_by_radam(b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMB(_AdamLike):
    """Adam whose step, decay included, has the size of the parameter, layer by layer (arXiv 1904.00962).

    With `execution.fsdp` the norm of a layer is a sum over devices: the same up to rounding on any number of them.
    """

    eps: float = 1e-6
    """Added to the root of that average."""

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
    """The sign of an average gradient (arXiv 2302.06675), with decoupled decay. Half the memory of Adam's state."""

    b1: float = 0.9
    """Share of the momentum in what the sign is taken of; the rest is of the gradient."""
    b2: float = 0.99
    """Share of the last step's momentum that stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share("b1", self.b1)
        _require_share("b2", self.b2)

    def _scale(self, names: Sequence[str]) -> optax.GradientTransformation:
        del names
        return optax.scale_by_lion(b1=self.b1, b2=self.b2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(_Decoupled):
    """Adam whose average of squared gradients is kept by rows and columns (arXiv 1804.04235); decoupled decay.

    Decay is multiplied by the learning rate, as in the other methods; `optax.adafactor` leaves that to its caller. With
    `execution.fsdp` its sums go over devices: the same up to rounding on any number of them.
    """

    decay_rate: float = 0.8
    """At step t, counted from 1, `1 - t ** -decay_rate` of the average of squared gradients stays."""
    eps: float = 1e-30
    """Added to squared gradients."""
    min_dim_size_to_factor: int = 128
    """An array is kept by rows and columns where its two longest axes are at least so long."""
    clipping_threshold: float | None = 1.0
    """Largest root mean square of a layer's step before it is multiplied by the learning rate; None: any."""
    multiply_by_parameter_scale: bool = True
    """Multiply a layer's step by the root mean square of its parameters: the learning rate is relative to it."""

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
    """Momentum whose matrices are made nearly orthogonal (Jordan et al. 2024, github.com/KellerJordan/Muon).

    The kernel of a convolution is the matrix of its inputs (height, width and channels) by its outputs. All that is no
    matrix, and the head, is moved by Adam, as its authors do, with the same learning rate. Decay is decoupled.

    Its last bits follow the number of devices, as on CPUs programs for another number of them add the squares of a
    matrix in another order: so a recipe with it has `execution.reproducible` off.
    """

    momentum: float = 0.95
    """Share of the last step's momentum that stays."""
    nesterov: bool = True
    """Nesterov's form, which looks one step of the momentum ahead; of Adam's part, too."""
    num_iterations: int = 5
    """Newton-Schulz iterations, which make a matrix nearly orthogonal."""
    eps: float = 1e-8
    """Added to the norm of a matrix, and by Adam to the root of its average of squared gradients."""
    consistent_rms: float | None = None
    """Root mean square of a matrix's step before the learning rate, whatever its shape: 0.2 is about Adam's, so that
    its learning rates fit (arXiv 2502.16982); None: `sqrt(max(1, outputs / inputs))` times an orthogonal matrix."""
    adam_b1: float = 0.9
    """Share of the last step's average gradient that stays, in Adam's part."""
    adam_b2: float = 0.999
    """Share of the last step's average of squared gradients that stays, in Adam's part."""
    groups: tuple[ParamGroup, ...] = (ParamGroup("head.*", 0.0), ParamGroup("*.kernel", 1.0), ParamGroup("*", 0.0))
    """1: a matrix for Muon, 0: for Adam; the first pattern that matches counts."""

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
            -1.0,  # neither size nor sign: both are given below, behind the decay
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
    """Inputs by outputs, which lie along the last axis."""
    last = kernel.ndim - 1
    return optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(range(last)), output_axis=last)


declare_kinds(Method, SGD, RMSProp, AdamW, RAdam, Lion, LAMB, Adafactor, Muon)


def _require_share(field: str, value: float) -> None:
    require(0 <= value < 1, f"optim.method.{field}", value, "must lie in [0, 1)")


def _require_positive(field: str, value: float) -> None:
    require(value > 0, f"optim.method.{field}", value, "must be positive")
