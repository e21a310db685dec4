"""What training minimizes, and what an evaluation measures: one frozen configuration per task.

To add an objective, derive a frozen dataclass from `Objective`. Its `train` and `evaluate` get one part of the batch at
a time and are traced by JAX, so Python's control flow must not depend on the values of arrays.
"""

import abc
import dataclasses
from typing import ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from nfnet_flax.config import File, require
from nfnet_flax.multi_label_metrics import multi_label_metrics
from nfnet_flax.open_config import OpenConfig, declare_kinds
from nfnet_flax.paths import check_place
from nfnet_flax.weights.portable import Activation
from nfnet_flax.weights.teacher import teacher_arrays, teacher_logits

Batch: TypeAlias = dict[str, jax.Array]
"""`image` (N, H, W, 3), as the network gets it; `label` (N,) int32, or (N, num_classes) uint8 of zeros and ones if an
example may have several classes; optionally `mix_label`, like `label`, and `label_weight` (N,) float32, the share of
`label` in the target."""
Arrays: TypeAlias = dict[str, jax.Array]
_NUM_CANDIDATES = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of one part of the batch, and how the metric of the whole batch is computed from those of its parts."""

    value: jax.Array
    """(N,), one value for each example, for `mean` and `sum`; any shape for `same`."""
    combine: Literal["mean", "sum", "same"] = dataclasses.field(default="mean", metadata={"static": True})
    """`mean` or `sum` over all examples (a sum of integers stays an integer); `same`: the value is equal in all parts,
    so that of any part is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What an objective may need to know about the run."""

    class_names: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    mean: tuple[float, ...]
    """Mean of each channel, in grey levels, which is subtracted from the images before the network gets them."""
    std: tuple[float, ...]
    """Standard deviation of each channel, in grey levels, by which they are then divided."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(OpenConfig, abc.ABC):
    """Base class of a recipe's `objective`. Fields that name files to read are listed in `place_fields`."""

    activation: ClassVar[Activation] = "softmax"
    """Function that makes probabilities of the logits of a network that was trained with it."""

    @property
    def takes_several_classes(self) -> bool:
        """Whether `label` may be rows of zeros and ones, for examples with several classes or none; by default True. If
        not, a recipe with such images is refused when it is made."""
        return True

    def arrays(self, facts: RunFacts) -> Arrays:
        """Arrays that `train` needs besides the batch, such as a teacher's weights; by default none. They are read
        once, at the start, and must be the same whenever the run continues."""
        del facts
        return {}

    @abc.abstractmethod
    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        """The loss of each example, (N,) float32, and metrics by name; the step minimizes the mean of the loss."""

    @abc.abstractmethod
    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        """Values of each example by name: (N,) float32, whose means are reported, `loss` among them; or arrays with
        further axes, such as logits, of which `summarize` makes metrics of the whole held-out set."""

    def summarize(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics of the whole held-out set that are no means over examples, by name; by default none. Called on the
        host, once for each set of weights.

        Args:
          rows: those values of `evaluate` that have further axes, (number of held-out examples, ...), in the order of
            the examples. The names of the result must depend on nothing but the names of the rows.
        """
        del rows
        return {}

    def small(self) -> "Objective":
        """The objective for `nfnet train --debug`, which has only images of noise and no files; by default the same."""
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Smoothed(Objective):
    """An objective whose targets can be smoothed."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes in training; an evaluation does not smooth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 1, "objective.label_smoothing", self.label_smoothing, "must lie in [0, 1)")


def targets_of(batch: Batch, num_classes: int) -> jax.Array:
    """(N, num_classes) float32 targets without smoothing; mixed if the images of the batch are mixed."""
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


def _hits(logits: jax.Array, batch: Batch) -> dict[str, Metric]:
    """`top1` and, if there are more classes than five, `top5` of a training batch; of mixed images, the first label
    counts."""
    found = hits_of(logits, batch)
    is_shown = {"top1": True, "top5": logits.shape[-1] > _NUM_CANDIDATES}
    return {name: Metric(hits) for name, hits in found.items() if is_shown[name]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxCrossEntropy(_Smoothed):
    """Cross-entropy between a softmax over the classes and the target; each example has one class."""

    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes in training; an evaluation does not smooth."""

    @property
    def takes_several_classes(self) -> bool:
        return False

    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        del arrays
        _require_one_class(batch)
        targets = optax.smooth_labels(targets_of(batch, logits.shape[-1]), self.label_smoothing)
        return softmax_cross_entropy(logits, targets), _hits(logits, batch)

    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        _require_one_class(batch)
        return {"loss": softmax_cross_entropy(logits, targets_of(batch, logits.shape[-1])), **hits_of(logits, batch)}


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each example, (N,) float32."""
    return optax.losses.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def _require_one_class(batch: Batch) -> None:
    shape = jnp.shape(batch["label"])
    remedy = "this objective takes one class per example: give (N,) class numbers, or choose another objective"
    require(len(shape) == 1, "label", f"of shape {shape}", remedy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfEachClass(Objective):
    """An objective that treats each class independently. For examples with several classes, an evaluation also measures
    `mean_average_precision` and `f1` (`multi_label_metrics.py`)."""

    def summarize(self, rows: dict[str, np.ndarray]) -> dict[str, float]:
        return multi_label_metrics(rows["logits"], rows["labels"]) if rows else {}


def _rows_of(logits: jax.Array, batch: Batch) -> Arrays:
    """Logits and labels for the metrics of the whole set, if examples may have several classes."""
    return {"logits": logits, "labels": batch["label"]} if jnp.ndim(batch["label"]) == 2 else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidCrossEntropy(_Smoothed, _OfEachClass):
    """Binary cross-entropy of each class, summed over the classes; an example may have several classes."""

    activation: ClassVar[Activation] = "sigmoid"

    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        del arrays
        targets = optax.smooth_labels(targets_of(batch, logits.shape[-1]), self.label_smoothing)
        return _sigmoid_cross_entropy(logits, targets), _hits(logits, batch)

    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        loss = _sigmoid_cross_entropy(logits, targets_of(batch, logits.shape[-1]))
        return {"loss": loss, **hits_of(logits, batch), **_rows_of(logits, batch)}


def _sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Focal(_OfEachClass):
    """Focal loss (arXiv 1708.02002, equation 4) of each class, summed over the classes."""

    activation: ClassVar[Activation] = "sigmoid"

    gamma: float = 2.0
    """Exponent of the factor that reduces the loss of well classified examples; 0: binary cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma >= 0, "objective.gamma", self.gamma, "must not be negative")

    def train(self, logits: jax.Array, batch: Batch, arrays: Arrays) -> tuple[jax.Array, dict[str, Metric]]:
        del arrays
        return self._loss(logits, batch), _hits(logits, batch)

    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        return {"loss": self._loss(logits, batch), **hits_of(logits, batch), **_rows_of(logits, batch)}

    def _loss(self, logits: jax.Array, batch: Batch) -> jax.Array:
        targets = targets_of(batch, logits.shape[-1])
        return jnp.sum(
            optax.losses.sigmoid_focal_loss(logits.astype(jnp.float32), targets, alpha=None, gamma=self.gamma), axis=-1
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(_Smoothed):
    """Training towards the labels and towards the outputs of a teacher network (arXiv 1503.02531, section 2).

    The loss is `(1 - teacher_share) * cross-entropy + teacher_share * temperature**2 * KL(teacher || student)`, where
    both distributions of the second term are softened by the temperature. The teacher gets the same augmented images.
    """

    place_fields: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: File
    """Weight file (`nfnet convert`) of a network for the same classes; `~` is the home folder."""
    temperature: float = 1.0
    """Number by which the logits of teacher and student are divided before their softmax distributions are compared."""
    teacher_share: float = 0.5
    """Weight of the term that compares with the teacher; the cross-entropy with the labels has the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_place("objective.teacher", self.teacher)
        require(self.temperature > 0, "objective.temperature", self.temperature, "must be positive")
        require(0 <= self.teacher_share <= 1, "objective.teacher_share", self.teacher_share, "must lie in [0, 1]")

    @property
    def takes_several_classes(self) -> bool:
        return False

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
        return loss, {**_hits(logits, batch), "teacher_agreement": Metric(agrees)}

    def evaluate(self, logits: jax.Array, batch: Batch) -> Arrays:
        return SoftmaxCrossEntropy(label_smoothing=0.0).evaluate(logits, batch)

    def small(self) -> SoftmaxCrossEntropy:
        # The teacher was trained on the classes of the recipe's images, not on those of noise.
        return SoftmaxCrossEntropy(label_smoothing=self.label_smoothing)


declare_kinds(Objective, SoftmaxCrossEntropy, SigmoidCrossEntropy, Focal, Distillation)
