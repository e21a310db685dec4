"""What training minimizes, and what an evaluation counts: one frozen configuration per task.

An objective of one's own is a frozen dataclass that derives from `Objective`. Its `train` and `evaluate` see a part of
the batch at a time and are traced by JAX: no value of an array may decide what Python does.
"""

import abc
import dataclasses
from typing import ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from nfnet_flax.config import require
from nfnet_flax.open_config import OpenConfig, declare_kinds
from nfnet_flax.paths import check_path
from nfnet_flax.weights.teacher import teacher_arrays, teacher_logits

Batch: TypeAlias = dict[str, jax.Array]
"""`image` (N, H, W, 3), as the network sees it; `label` (N,) int32, or (N, num_classes) of zeros and ones where an
example may be of several classes; optionally `mix_label`, like `label`, and `label_weight` (N,) float32, the share of
`label` in the target."""
Arrays: TypeAlias = dict[str, jax.Array]
_NUM_CANDIDATES = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of a part of the batch, and how those of all parts make that of the whole batch."""

    value: jax.Array
    """(N,), of each example, for `mean` and `sum`; of any shape for `same`."""
    combine: Literal["mean", "sum", "same"] = dataclasses.field(default="mean", metadata={"static": True})
    """The mean or the sum over all examples (whole numbers stay whole in a sum); or the value of any part, as it is the
    same in all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What an objective may need to know of the run."""

    class_names: tuple[str, ...]
    """In the order of the labels."""
    mean: tuple[float, ...]
    """Per channel, in grey levels: subtracted from images before the network sees them."""
    std: tuple[float, ...]
    """Per channel, in grey levels: what they are divided by then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(OpenConfig, abc.ABC):
    """What a recipe's `objective` offers. Files that it reads are named by `place_fields`."""

    def arrays(self, facts: RunFacts) -> Arrays:
        """Arrays that `train` needs besides the batch, such as a teacher's weights; read once, at the start. By default
        none. A run goes on only with the same ones."""
        del facts
        return {}

    @abc.abstractmethod
    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        """The loss of each example, (N,) float32, and metrics by name; the step minimizes the mean of the loss."""

    @abc.abstractmethod
    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        """Values of each example, (N,) float32, by name; their means are reported. `loss` must be among them."""

    def small(self) -> "Objective":
        """What `nfnet train --debug` minimizes, on noise and without files; by default the same."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Smoothed(Objective):
    """An objective whose targets can be smoothed."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes; an evaluation takes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 1, "objective.label_smoothing", self.label_smoothing, "must lie in [0, 1)")


def targets_of(batch: Batch, num_classes: int) -> jax.Array:
    """(N, num_classes) float32 targets, mixed where the batch is, without smoothing."""
    targets = _encoded(batch["label"], num_classes)
    if "mix_label" in batch:
        weight = batch["label_weight"][:, None]
        targets = weight * targets + (1.0 - weight) * _encoded(batch["mix_label"], num_classes)
    return targets


def _encoded(labels: jax.Array, num_classes: int) -> jax.Array:
    if jnp.ndim(labels) == 1:
        return jax.nn.one_hot(labels, num_classes)
    remedy = f"give (N,) class numbers, or (N, {num_classes}) zeros and ones"
    require(labels.shape[1:] == (num_classes,), "label", f"of shape {labels.shape}", remedy)
    return labels.astype(jnp.float32)


def hits_of(logits: jax.Array, batch: Batch) -> Arrays:
    """`top1` and `top5` (N,) float32: whether the highest logit, or one of the highest five, is of a true class."""
    num_candidates = min(_NUM_CANDIDATES, logits.shape[-1])
    candidates = lax.top_k(logits, num_candidates)[1]
    if jnp.ndim(batch["label"]) == 1:
        hits = candidates == batch["label"][:, None]
    else:
        hits = jnp.take_along_axis(batch["label"], candidates, axis=-1) > 0
    return {"top1": hits[:, 0].astype(jnp.float32), "top5": jnp.any(hits, axis=1).astype(jnp.float32)}


def _top1(logits: jax.Array, batch: Batch) -> dict[str, Metric]:
    best = jnp.argmax(logits, axis=-1)
    label = batch["label"]
    hits = best == label if jnp.ndim(label) == 1 else jnp.take_along_axis(label, best[:, None], axis=-1)[:, 0] > 0
    return {"top1": Metric(hits)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxCrossEntropy(_Smoothed):
    """Cross-entropy between a softmax over the classes and the target: each example is of one class."""

    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes; an evaluation takes none."""

    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        del arrays
        _require_one_class(batch)
        targets = optax.smooth_labels(targets_of(batch, logits.shape[-1]), self.label_smoothing)
        return softmax_cross_entropy(logits, targets), _top1(logits, batch)

    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        _require_one_class(batch)
        return {"loss": softmax_cross_entropy(logits, targets_of(batch, logits.shape[-1])), **hits_of(logits, batch)}


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """(N,) in float32."""
    return optax.losses.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def _require_one_class(batch: Batch) -> None:
    shape = jnp.shape(batch["label"])
    remedy = "a softmax is for one class an example: give (N,) class numbers, or another objective"
    require(len(shape) == 1, "label", f"of shape {shape}", remedy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidCrossEntropy(_Smoothed):
    """Binary cross-entropy of every class by itself, summed over the classes: an example may be of several classes."""

    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        del arrays
        targets = optax.smooth_labels(targets_of(batch, logits.shape[-1]), self.label_smoothing)
        return _sigmoid_cross_entropy(logits, targets), _top1(logits, batch)

    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        return {"loss": _sigmoid_cross_entropy(logits, targets_of(batch, logits.shape[-1])), **hits_of(logits, batch)}


def _sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Focal(Objective):
    """Focal loss (arXiv 1708.02002, equation 4) of every class by itself, summed over the classes."""

    gamma: float = 2.0
    """Power of the factor that makes examples count less the better they are classified; 0: binary cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma >= 0, "objective.gamma", self.gamma, "must not be negative")

    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        del arrays
        return self._loss(logits, batch), _top1(logits, batch)

    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        return {"loss": self._loss(logits, batch), **hits_of(logits, batch)}

    def _loss(self, logits: jax.Array, batch: Batch) -> jax.Array:
        targets = targets_of(batch, logits.shape[-1])
        return jnp.sum(
            optax.losses.sigmoid_focal_loss(logits.astype(jnp.float32), targets, alpha=None, gamma=self.gamma), axis=-1
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(_Smoothed):
    """A softmax that follows the labels and a teacher network (arXiv 1503.02531, section 2).

    The loss is `(1 - teacher_share) * cross-entropy + teacher_share * temperature**2 * KL(teacher || student)`, both
    distributions of the latter being softened by the temperature. The teacher sees the same augmented images.
    """

    place_fields: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str
    """Weight file (`nfnet convert`) of a network that knows the same classes; `~` is the home folder."""
    temperature: float = 1.0
    """What the logits of both are divided by before the softmax that is compared."""
    teacher_share: float = 0.5
    """Weight of what the teacher says; the labels have the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("objective.teacher", self.teacher)
        require(self.temperature > 0, "objective.temperature", self.temperature, "must be positive")
        require(0 <= self.teacher_share <= 1, "objective.teacher_share", self.teacher_share, "must lie in [0, 1]")

    def arrays(self, facts: RunFacts) -> Arrays:
        return teacher_arrays(self.teacher, facts.class_names, facts.mean, facts.std)

    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        _require_one_class(batch)
        targets = optax.smooth_labels(targets_of(batch, logits.shape[-1]), self.label_smoothing)
        taught = jax.nn.log_softmax(teacher_logits(self.teacher, batch["image"], arrays) / self.temperature)
        own = jax.nn.log_softmax(logits.astype(jnp.float32) / self.temperature)
        difference = self.temperature**2 * optax.losses.kl_divergence_with_log_targets(own, taught)
        loss = (1 - self.teacher_share) * softmax_cross_entropy(logits, targets) + self.teacher_share * difference
        agrees = jnp.argmax(taught, axis=-1) == jnp.argmax(logits, axis=-1)
        return loss, {**_top1(logits, batch), "teacher_agreement": Metric(agrees)}

    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        return SoftmaxCrossEntropy(label_smoothing=0.0).evaluate(logits, batch)

    def small(self) -> SoftmaxCrossEntropy:
        # A teacher knows the classes of the recipe's images, not those of noise.
        return SoftmaxCrossEntropy(label_smoothing=self.label_smoothing)


declare_kinds(Objective, SoftmaxCrossEntropy, SigmoidCrossEntropy, Focal, Distillation)
