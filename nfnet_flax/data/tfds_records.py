"""Sets prepared by TensorFlow Datasets as `array_record`, read without TensorFlow and with images left encoded."""

import bisect
import dataclasses
import itertools
import os
from typing import Any, ClassVar, Self

import numpy as np

from nfnet_flax.config import ConfigError, Folder, Name, require
from nfnet_flax.data.random_access import (
    CorruptRecordError,
    Record,
    SourceConfig,
    Split,
    Unused,
    check_index,
    digest,
)
from nfnet_flax.paths import check_path, local_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource(SourceConfig):
    """A classification set that TensorFlow Datasets has prepared as `array_record`. TensorFlow is not needed."""

    place_fields: ClassVar[tuple[str, ...]] = ("data_dir",)

    name: Name
    """Name of the set: `name`, `name/config` or `name/config:1.0.0`, as in `tfds.builder`."""
    train_split: Name = "train"
    """Training split in TFDS's syntax, such as `train`, `train[:90%]` or `train[10000:]`."""
    eval_split: Name = "validation"
    """Held-out split in TFDS's syntax."""
    data_dir: Folder | None = None
    """Folder of prepared sets, where `~` is the home folder; None: TFDS's own default (`TFDS_DATA_DIR`, or
    `~/tensorflow_datasets`)."""
    image_key: Name = "image"
    """Name of the feature that contains the image."""
    label_key: Name = "label"
    """Name of the feature that contains the class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("name", "train_split", "eval_split", "image_key", "label_key"):
            require(bool(getattr(self, name)), f"source.{name}", getattr(self, name), "must not be empty")
        if self.data_dir is not None:
            check_path("source.data_dir", self.data_dir)

    def open(self, split: Split, image_size: int) -> "TfdsRecords":
        del image_size  # encoded files of any size
        return TfdsRecords(self, split)

    def training_classes(self, image_size: int) -> tuple[str, ...]:
        del image_size
        return _check_features(self, dict(_open_builder(self).info.features.items()))

    def with_training_of(self, trained: SourceConfig) -> Self:
        if not isinstance(trained, TfdsSource) or self.name != trained.name:
            return self
        return dataclasses.replace(self, train_split=trained.train_split)

    def check_splits(self) -> None:
        _check_apart(self)


def _how_to_prepare(config: TfdsSource) -> str:
    where = "" if config.data_dir is None else f", data_dir={config.data_dir!r}"
    name = config.name
    return f'prepare it with tfds.builder({name!r}{where}, file_format="array_record").download_and_prepare()'


def _open_builder(config: TfdsSource) -> Any:
    """TFDS's builder of a prepared set, made from the set's files: the code that prepared it is not needed."""
    import tensorflow_datasets as tfds  # takes half a second, which users of other sources need not wait
    from tensorflow_datasets.core import read_only_builder

    data_dir = None if config.data_dir is None else str(local_path("source.data_dir", config.data_dir))
    if data_dir is None and "TFDS_DATA_DIR" in os.environ:
        check_path("TFDS_DATA_DIR", os.environ["TFDS_DATA_DIR"])
    try:
        builder = read_only_builder.builder_from_files(config.name, data_dir=data_dir)
    except ValueError as error:  # also TFDS's DatasetNotFoundError
        reason = str(error).splitlines()[0]
        raise ConfigError(f"TFDS set {config.name!r} is not there ({reason}): {_how_to_prepare(config)}") from error
    wanted = tfds.core.FileFormat.ARRAY_RECORD
    if builder.info.file_format != wanted:
        try:  # a set may exist in several formats
            builder = tfds.builder_from_directory(builder.data_dir, file_format=wanted)
        except ValueError as error:
            raise ConfigError(
                f"TFDS set {config.name!r} in {str(builder.data_dir)!r} is prepared as "
                f"{builder.info.file_format.value}, which has no random access: "
                f"{_how_to_prepare(config)} in another data_dir"
            ) from error
    return builder


def _check_features(config: TfdsSource, features: dict[str, Any]) -> tuple[str, ...]:
    """The class names, after a check that the features of image and label have the right types."""
    import tensorflow_datasets as tfds

    for field, key, kind in (
        ("image_key", config.image_key, tfds.features.Image),
        ("label_key", config.label_key, tfds.features.ClassLabel),
    ):
        if not isinstance(features.get(key), kind):
            known = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in sorted(features.items()))
            raise ConfigError(
                f"source.{field} = {key!r}: TFDS set {config.name!r} has no such {kind.__name__}; it has {known}"
            )
    names = tuple(features[config.label_key].names)
    if len(names) < 2:
        raise ConfigError(f"TFDS set {config.name!r} has only {len(names)} class: nothing can be learned from it")
    return names


def _pieces(builder: Any, config: TfdsSource, split: Split) -> list[Any]:
    """The parts of files that a split consists of.

    Raises:
      ConfigError: the set has no such split.
    """
    wanted = config.train_split if split == "train" else config.eval_split
    try:
        return list(builder.info.splits[wanted].file_instructions)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"source.{split}_split = {wanted!r}: not a part of TFDS set {config.name!r} "
            f"({str(error).splitlines()[0]}); its splits are {', '.join(builder.info.splits)}"
        ) from error


def _check_apart(config: TfdsSource) -> None:
    """Raises ConfigError if both splits contain the same record; ignores a missing split."""
    builder = _open_builder(config)
    try:
        train, held_out = _pieces(builder, config, "train"), _pieces(builder, config, "eval")
    except ConfigError:  # reported when that split is opened
        return
    num_shared = sum(
        max(0, min(one.skip + one.take, other.skip + other.take) - max(one.skip, other.skip))
        for one, other in itertools.product(train, held_out)
        if one.filename == other.filename
    )
    if num_shared:
        raise ConfigError(
            f"source.train_split = {config.train_split!r} and source.eval_split = {config.eval_split!r} share "
            f"{num_shared} examples: an evaluation on training images means nothing; give parts that do not overlap"
        )


class TfdsRecords:
    """A split of a prepared TFDS set."""

    unused: tuple[Unused, ...] = ()
    """Files that are not used: none, as the split determines what is read."""

    def __init__(self, config: TfdsSource, split: Split) -> None:
        """Reads the set's metadata; opens none of its data files.

        Args:
          config: which set.
          split: which of its splits.

        Raises:
          ConfigError: the set is not prepared, or in another format; or features, the split, examples or files are
            missing.
          OSError: the disk or the network failed.
        """
        import tensorflow_datasets as tfds

        builder = _open_builder(config)
        self.class_names = _check_features(config, dict(builder.info.features.items()))
        self._config = config
        wanted = config.train_split if split == "train" else config.eval_split
        pieces = _pieces(builder, config, split)
        self._pieces = [(piece.filename, piece.skip) for piece in pieces]
        self._ends = list(itertools.accumulate(piece.take for piece in pieces))
        if not pieces or not self._ends[-1]:
            raise ConfigError(f"source.{split}_split = {wanted!r}: has no examples; choose a larger part")
        missing = [name for name, _ in self._pieces if not os.path.isfile(name)]
        if missing:
            raise ConfigError(
                f"TFDS set {config.name!r}: {len(missing)} of {len(pieces)} files are missing, such as "
                f"{missing[0]!r}: copy them, or {_how_to_prepare(config)} in another data_dir"
            )
        whole = [str(info.num_bytes) for info in builder.info.splits.values()]
        parts = [
            f"{os.path.basename(piece.filename)}:{piece.skip}+{piece.take} of {os.path.getsize(piece.filename)} bytes"
            for piece in pieces
        ]
        self._fingerprint = digest("tfds", builder.info.full_name, *self.class_names, *whole, *parts)
        self._features = builder.info.features
        self._decoders = {config.image_key: tfds.decode.SkipDecoding()}
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split=wanted, deserialize_method=raw)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        from nfnet_flax.data.record_files import read_record

        path, _ = self._place(index)
        try:
            record = read_record(self._records, index, path)
        except CorruptRecordError as error:
            raise CorruptRecordError(f"{self.describe(index)} is damaged: {error}") from error
        example = self._features.deserialize_example_np(record, decoders=self._decoders)
        label = example[self._config.label_key]
        if not 0 <= label < len(self.class_names):  # TFDS marks unlabelled test sets by -1
            raise ConfigError(f"{self.describe(index)} has label {label}: choose a split with labels")
        return {"image": example[self._config.image_key], "label": np.int32(label)}

    def fingerprint(self) -> str:
        """Digest of the set's name and version, its classes, its size, which records of which files are read, and the
        size of each file."""
        return self._fingerprint

    def contents(self) -> str:
        """Empty: the fingerprint covers what is known about the contents."""
        return ""

    def describe(self, index: int) -> str:
        path, number = self._place(index)
        return f"{path} record {number}"

    def _place(self, index: int) -> tuple[str, int]:
        """The file of an example, and the example's number in it."""
        index = check_index(index, len(self))
        piece = bisect.bisect_right(self._ends, index)
        path, skip = self._pieces[piece]
        return path, skip + index - (self._ends[piece - 1] if piece else 0)
