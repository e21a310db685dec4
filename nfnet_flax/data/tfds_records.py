"""Sets prepared by TensorFlow Datasets as `array_record`, read without TensorFlow and with images left encoded."""

import bisect
import itertools
import os
from typing import Any

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.data.random_access import CorruptRecordError, Record, Split, check_index, digest
from nfnet_flax.data.source_config import TfdsSource


def _how_to_prepare(config: TfdsSource) -> str:
    where = "" if config.data_dir is None else f", data_dir={config.data_dir!r}"
    name = config.name
    return f'prepare it with tfds.builder({name!r}{where}, file_format="array_record").download_and_prepare()'


def _open_builder(config: TfdsSource) -> Any:
    """TFDS's builder of a prepared set, found by its files: the code that prepared it is not needed."""
    import tensorflow_datasets as tfds  # half a second, which users of other sources need not wait
    from tensorflow_datasets.core import read_only_builder

    data_dir = None if config.data_dir is None else os.path.expanduser(config.data_dir)
    try:
        builder = read_only_builder.builder_from_files(config.name, data_dir=data_dir)
    except ValueError as error:  # also TFDS's DatasetNotFoundError
        reason = str(error).splitlines()[0]
        raise ConfigError(f"TFDS set {config.name!r} is not there ({reason}): {_how_to_prepare(config)}") from error
    wanted = tfds.core.FileFormat.ARRAY_RECORD
    if builder.info.file_format != wanted:
        try:  # a set may be there in several formats
            builder = tfds.builder_from_directory(builder.data_dir, file_format=wanted)
        except ValueError as error:
            raise ConfigError(
                f"TFDS set {config.name!r} in {str(builder.data_dir)!r} is prepared as "
                f"{builder.info.file_format.value}, which has no random access: "
                f"{_how_to_prepare(config)} in another data_dir"
            ) from error
    return builder


def _check_features(config: TfdsSource, features: dict[str, Any]) -> tuple[str, ...]:
    """The class names, once image and label are seen to be what their names say."""
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


class TfdsRecords:
    """A split of a prepared TFDS set."""

    def __init__(self, config: TfdsSource, split: Split) -> None:
        """Reads the set's metadata; opens none of its data files.

        Args:
          config: which set.
          split: which of its splits.

        Raises:
          ConfigError: the set is not prepared, or in another format; it lacks the features, the split, examples or
            files.
        """
        import tensorflow_datasets as tfds

        builder = _open_builder(config)
        self.class_names = _check_features(config, dict(builder.info.features.items()))
        self._config = config
        wanted = config.train_split if split == "train" else config.eval_split
        try:
            pieces = builder.info.splits[wanted].file_instructions
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"source.{split}_split = {wanted!r}: not a part of TFDS set {config.name!r} "
                f"({str(error).splitlines()[0]}); its splits are {', '.join(builder.info.splits)}"
            ) from error
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
        lengths = [f"{os.path.basename(piece.filename)}:{piece.skip}+{piece.take}" for piece in pieces]
        self._fingerprint = digest("tfds", builder.info.full_name, *self.class_names, *whole, *lengths)
        self._records = builder.as_data_source(split=wanted, decoders={config.image_key: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        index = check_index(index, len(self))
        try:
            example = self._records[index]
        except RuntimeError as error:
            raise CorruptRecordError(f"{self.describe(index)} is damaged: {error}") from error
        label = example[self._config.label_key]
        if not 0 <= label < len(self.class_names):  # TFDS marks unlabelled test sets by -1
            raise ConfigError(f"{self.describe(index)} has label {label}: choose a split with labels")
        return {"image": example[self._config.image_key], "label": np.int32(label)}

    def fingerprint(self) -> str:
        """Of the set's name and version, its classes, its size, and which records of which files are read."""
        return self._fingerprint

    def describe(self, index: int) -> str:
        index = check_index(index, len(self))
        piece = bisect.bisect_right(self._ends, index)
        path, skip = self._pieces[piece]
        return f"{path} record {skip + index - (self._ends[piece - 1] if piece else 0)}"
