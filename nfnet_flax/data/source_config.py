"""Where labelled images come from; apart from the code that reads them, so that a recipe needs none of it."""

import dataclasses
import os

from nfnet_flax.config import MAX_COUNT, check_types, require, require_count
from nfnet_flax.paths import check_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, which ship with it. They are enlarged to the recipe's image size."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSource:
    """Noise of the recipe's image size that costs nothing to read: to time a step without its input, or to debug."""

    num_train_examples: int = 1_281_167
    """Size of the training set; ImageNet's."""
    num_eval_examples: int = 50_000
    """Size of the held-out set; ImageNet's."""
    num_classes: int = 1000
    """Labels run through them in turn."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("num_train_examples", "num_eval_examples"):
            require_count(f"source.{name}", getattr(self, name))
        remedy = f"must be 2 to {MAX_COUNT:,}"
        require(2 <= self.num_classes <= MAX_COUNT, "source.num_classes", self.num_classes, remedy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Plain image files, `root/train/class_name/*` and `root/val/class_name/*`; classes are sorted by name."""

    root: str
    """Folder of both splits; `~` is the home folder."""
    train: str = "train"
    """Folder of the training split within `root`. Its class folders number the labels of both splits."""
    eval: str = "val"
    """Folder of the held-out split within `root`."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("root", "train", "eval"):
            check_path(f"source.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordSource:
    """ArrayRecord files written by `tools/prepare_imagenet.py`, with their `train.json` or `eval.json` beside them."""

    train: tuple[str, ...]
    """Files of the training split, or shell-style patterns such as `data/train-*.array_record`. The files are read in
    the order of their sorted paths. A pattern must find every shard of the set that it describes, and both splits
    together all shards of that set; files that are named one by one may be a part of it, which is said. `~` is the home
    folder; a folder whose name holds `[`, `]`, `*` or `?` is found by its plain name."""
    eval: tuple[str, ...]
    """Files or patterns of the held-out split."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("train", "eval"):
            value = getattr(self, name)
            require(bool(value), f"source.{name}", value, "give at least one file or pattern")
            for pattern in value:
                check_path(f"source.{name}", pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource:
    """A classification set that TensorFlow Datasets has prepared as `array_record`. TensorFlow is not needed."""

    name: str
    """`name`, `name/config` or `name/config:1.0.0`, as in `tfds.builder`."""
    train_split: str = "train"
    """Training split in TFDS's syntax, such as `train`, `train[:90%]` or `train[10000:]`."""
    eval_split: str = "validation"
    """Held-out split in TFDS's syntax."""
    data_dir: str | None = None
    """Folder of prepared sets, `~` being the home folder; None: TFDS's own default (`TFDS_DATA_DIR`, or
    `~/tensorflow_datasets`)."""
    image_key: str = "image"
    """Feature that holds the image."""
    label_key: str = "label"
    """Feature that holds the class."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("name", "train_split", "eval_split", "image_key", "label_key"):
            require(bool(getattr(self, name)), f"source.{name}", getattr(self, name), "must not be empty")
        if self.data_dir is not None:
            check_path("source.data_dir", self.data_dir)


SourceConfig = DigitsSource | SyntheticSource | FolderSource | ArrayRecordSource | TfdsSource

PLACE_FIELDS: dict[str, tuple[str, ...]] = {
    "FolderSource": ("root", "train", "eval"),
    "ArrayRecordSource": ("train", "eval"),
    "TfdsSource": ("data_dir",),
}
"""By type of source, the fields that only say where the images lie. They may change at a resume, as images may be
moved: what the images are is compared by `Source.fingerprint`."""


def with_places_of(source: SourceConfig, other: SourceConfig) -> SourceConfig:
    """A source with the `PLACE_FIELDS` of another one; unchanged where the other one is of another type."""
    if type(source) is not type(other):
        return source
    names = PLACE_FIELDS.get(type(source).__name__, ())
    return dataclasses.replace(source, **{name: getattr(other, name) for name in names})


def with_training_of(source: SourceConfig, trained: SourceConfig) -> SourceConfig:
    """A source with the training split of another one; unchanged where that belongs to another kind of set."""
    match source, trained:
        case FolderSource(), FolderSource():
            return dataclasses.replace(source, train=os.path.join(trained.root, trained.train))
        case ArrayRecordSource(), ArrayRecordSource():
            return dataclasses.replace(source, train=trained.train)
        case TfdsSource(), TfdsSource() if source.name == trained.name:
            return dataclasses.replace(source, train_split=trained.train_split)
    return source


def with_absolute_places(source: SourceConfig) -> SourceConfig:
    """A source that finds its images from every current folder."""
    match source:
        case FolderSource():
            return dataclasses.replace(source, root=_absolute(source.root))
        case ArrayRecordSource():
            patterns = {name: tuple(map(_absolute, getattr(source, name))) for name in ("train", "eval")}
            return dataclasses.replace(source, **patterns)
        case TfdsSource() if source.data_dir is not None:
            return dataclasses.replace(source, data_dir=_absolute(source.data_dir))
    return source


def _absolute(path: str) -> str:
    # Symbolic links stay: a pattern is no path yet, and a link may be moved to another copy of the same images.
    return os.path.abspath(os.path.expanduser(path))
