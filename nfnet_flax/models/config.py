"""Base classes of the networks' configurations; a configuration builds its network.

To add a family, derive a frozen dataclass from `ModelConfig`, whose `build` makes a network, which derives from
`Classifier`. The docstring of `params.py` says which names parameters must have.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from flax import nnx

from nfnet_flax.config import MAX_COUNT, require, require_count
from nfnet_flax.config_json import ADDED_LATER
from nfnet_flax.models.layers import ActivationName, ComputeDtype
from nfnet_flax.models.standardization import StandardizationName
from nfnet_flax.open_config import OpenConfig

if TYPE_CHECKING:
    from nfnet_flax.models.classifier import Classifier


GlobalPool = Literal["avg", "max", "avgmax", "catavgmax"]


@dataclasses.dataclass(frozen=True)
class ImageSizes:
    """Height and width of the images that a network was published with, in pixels. A network takes images of any size;
    the sizes of a run are in its `DataConfig`."""

    train: int
    """Size in training."""
    test: int
    """Size in evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(OpenConfig, abc.ABC):
    """Configuration of a network, without the number of classes."""

    compute_dtype: ComputeDtype = "float32"
    """Type of images, activations and kernels in the computation; the stored parameters are float32."""
    in_channels: int = dataclasses.field(default=3, metadata=ADDED_LATER)
    """Number of channels of the images. The input of a run always gives 3 (red, green and blue)."""
    global_pool: GlobalPool = dataclasses.field(default="avg", metadata=ADDED_LATER)
    """How the outputs of all places become one vector of features for each image: their mean (`avg`), their maximum
    (`max`), the mean of both (`avgmax`), or both one after the other (`catavgmax`: twice as many features)."""
    retired_fields = frozenset({"train_image_size", "test_image_size"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("model.in_channels", self.in_channels)

    @abc.abstractmethod
    def build(self, num_classes: int, rngs: nnx.Rngs) -> "Classifier":
        """The network with random parameters, in training mode. Callers use `build_model`, which also checks the
        network.

        Args:
          num_classes: number of outputs of the head; 0: there is no head.
          rngs: source of the initial parameters.
        """

    def small(self) -> Self:
        """Configuration of a network of the same kind that trains a few steps on images of 32 px in seconds, for
        `nfnet train --debug`; by default the configuration itself."""
        return self

    @property
    def standardization(self) -> StandardizationName:
        """Form of the weight standardization of all `WSConv`."""
        return "published"

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks, or a lower bound. A weight file with fewer arrays is refused before the network is
        built; by default 0, which refuses none."""
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedConfig(ModelConfig, abc.ABC):
    """A network of residual blocks in up to four stages; all but the first stage halve the resolution."""

    widths: tuple[int, ...]
    """Number of output channels of each stage."""
    depths: tuple[int, ...]
    """Number of residual blocks of each stage."""
    drop_rate: float = 0.0
    """Probability of dropout before the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.widths, self.depths)
        check_rates(drop_rate=self.drop_rate)

    @property
    def num_blocks(self) -> int:
        return sum(self.depths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizerFreeConfig(StagedConfig, abc.ABC):
    """A network whose residual blocks `x + alpha * f(x / expected_std(x))` control the variance (arXiv 2101.08692)."""

    alpha: float = 0.2
    """Factor on a residual branch."""
    activation: ActivationName = "relu"
    """Activation function, scaled to unit variance; weights that were trained with timm need `gelu_erf`."""
    stochdepth_rate: float = 0.1
    """Stochastic depth: block k of n is dropped with probability `stochdepth_rate * k / n`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rates(stochdepth_rate=self.stochdepth_rate)


def check_stages(widths: Sequence[int], depths: Sequence[int]) -> None:
    """Raises `ConfigError` unless there are a width and a depth for each stage, and at most four stages."""
    for name, values in (("widths", widths), ("depths", depths)):
        remedy = "give one number for each stage, of which the published networks have 4 and none may have more"
        require(1 <= len(values) <= 4 and len(values) == len(widths), f"model.{name}", values, remedy)
        remedy = f"every stage needs at least one, and at most {MAX_COUNT:,}"
        require(min(values) >= 1 and max(values) <= MAX_COUNT, f"model.{name}", values, remedy)


def check_rates(**rates: float) -> None:
    """Raises `ConfigError` unless the given fields of the model lie in [0, 1)."""
    for name, rate in rates.items():
        require(0 <= rate < 1, f"model.{name}", rate, "must lie in [0, 1)")


def check_positive(**numbers: float | None) -> None:
    """Raises `ConfigError` unless the given fields of the model are positive, or None, which turns a part off."""
    for name, value in numbers.items():
        require(value is None or value > 0, f"model.{name}", value, "must be positive")
