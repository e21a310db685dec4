"""Figures of the papers and of the published code that claims are compared with; accuracies are in `models/registry`.

Nothing here was measured or counted by this package.
"""

import dataclasses
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType

_FACTORS = {"B": 10**9, "M": 10**6}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number as it was published."""

    text: str
    """As it is printed, such as `12.38B` or `71,489,284`."""

    @property
    def value(self) -> float:
        """The number."""
        return float(self._number * self._factor)

    def contains(self, value: float) -> bool:
        """Whether the number can be a value that was rounded to its digits."""
        exponent = self._number.as_tuple().exponent
        assert isinstance(exponent, int)  # a number, not NaN
        return abs(value - self.value) <= float(self._factor * Decimal(10) ** exponent / 2)

    @property
    def _number(self) -> Decimal:
        return Decimal(self.text.rstrip("BM").replace(",", ""))

    @property
    def _factor(self) -> int:
        return _FACTORS.get(self.text[-1], 1)


@dataclasses.dataclass(frozen=True)
class PublishedSize:
    """How large a network with 1000 classes is."""

    parameters: Figure | None
    """None: not on record in this package."""
    multiply_adds: Figure | None
    """Of one image's forward pass at the test resolution; papers call them FLOPs. None: not on record."""
    source: str


_CODE = "code"
"""Counted in the published Haiku code."""
_PAPER = f"{_CODE}; arXiv 2102.06171"
"""Parameters as above; FLOPs of table 3."""
_EFFICIENTNET = "arXiv 1905.11946"
"""Table 2."""


def _nfnet(parameters: str, flops: str) -> PublishedSize:
    return PublishedSize(Figure(parameters), Figure(flops), _PAPER)


def _counted(parameters: str) -> PublishedSize:
    """A network of which only the number of parameters is on record, as the published Haiku code makes them."""
    return PublishedSize(Figure(parameters), None, _CODE)


def _efficientnet(parameters: str, flops: str) -> PublishedSize:
    return PublishedSize(Figure(parameters), Figure(flops), _EFFICIENTNET)


SIZES: Mapping[str, PublishedSize] = MappingProxyType(
    {
        "nfnet_f0": _nfnet("71,489,284", "12.38B"),
        "nfnet_f1": _nfnet("132,634,256", "35.54B"),
        "nfnet_f2": _nfnet("193,779,228", "62.59B"),
        "nfnet_f3": _nfnet("254,924,200", "114.76B"),
        "nfnet_f4": _nfnet("316,069,172", "215.24B"),
        "nfnet_f5": _nfnet("377,214,144", "289.76B"),
        "nfnet_f6": _nfnet("438,359,116", "377.28B"),
        "nfnet_f7": _counted("499,504,088"),
        "nfnet_f0+": _counted("118,824,516"),
        "nf_resnet50": _counted("25,557,048"),
        "nf_regnet_b0": _counted("8,595,372"),
        "resnet50": _counted("25,549,352"),
        "efficientnet_b0": _efficientnet("5.3M", "0.39B"),
        "efficientnet_b1": _efficientnet("7.8M", "0.70B"),
        "efficientnet_b2": _efficientnet("9.2M", "1.0B"),
        "efficientnet_b3": _efficientnet("12M", "1.8B"),
        "efficientnet_b4": _efficientnet("19M", "4.2B"),
        "efficientnet_b5": _efficientnet("30M", "9.9B"),
        "efficientnet_b6": _efficientnet("43M", "19B"),
        "efficientnet_b7": _efficientnet("66M", "37B"),
    }
)
"""Name of a network -> its published size."""

STEP_MS: Mapping[str, float] = MappingProxyType(
    {
        "nfnet_f0": 73.3,
        "nfnet_f1": 158.5,
        "nfnet_f2": 295.8,
        "nfnet_f3": 532.2,
        "nfnet_f4": 1033.3,
        "nfnet_f5": 1398.5,
        "nfnet_f6": 2774.1,
    }
)
"""Name of a network -> time of a training step on TPUv3 with 32 images for each core, in milliseconds (arXiv
2102.06171, table 3; F6 with SAM)."""
B7_OVER_F1 = 8.7
"""Time of EfficientNet-B7's training step divided by that of NFNet-F1, which is as accurate (arXiv 2102.06171,
abstract)."""
STEP_IMAGES = 32
"""Number of images of each core in `STEP_MS`."""
NUM_EPOCHS, BATCH_SIZE, NUM_IMAGES = 360, 4096, 1_281_167
"""The published runs: their number of epochs, the number of images of an update, and the number of training images of
ImageNet (arXiv 2102.06171, section 4)."""
