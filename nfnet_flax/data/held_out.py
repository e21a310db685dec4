"""The rule for held-out examples: a run is never evaluated on examples that it trained on, in training or afterwards.

The fingerprints of the sources are compared. Single training images that were copied into another folder are not
noticed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import open_split, reading, source_record
from nfnet_flax.data.random_access import Source, split_off

_OTHERS = "give other images by --data.num-held-out None --data.source.eval FOLDER"


def check_distinct(trained: dict[str, Any], num_held_out: int | None, held_out: Source) -> None:
    """Checks that a held-out split which is not a part of the training split is not a copy of it either.

    Args:
      trained: `source_record` of the training split.
      num_held_out: number of examples at the beginning of the training split that were left out of training.
      held_out: all examples of the held-out split.

    Raises:
      ConfigError: both are the same.
    """
    left_out = num_held_out or 0
    if left_out >= len(held_out):
        return
    part = split_off(held_out, left_out, len(held_out)) if left_out else held_out
    if source_record(part) == trained:
        raise ConfigError(
            f"the held-out split ({held_out.describe(0)} is its first example) has the names, sizes and order of the "
            f"{len(part)} training examples: an evaluation on training images means nothing; give other images, or, if "
            "these are other images, other file names"
        )


def open_held_out(config: DataConfig, class_names: Sequence[str], *, trained: DataConfig, record: Any) -> Source:
    """The held-out examples for an evaluation after training; the run must not have trained on any of them.

    Args:
      config: which examples.
      class_names: class names of the run, in the order of its labels.
      trained: the data settings that the run was trained with.
      record: the run's `input_identity`.

    Raises:
      ConfigError: as for `open_split`; or the examples are a part of the training split, but not the part that the run
        left out; or they are the training examples, or share shards or records with them.
      InputFailed: the disk or the network failed.
    """
    if config.num_held_out is None:
        with reading("eval"):
            config.source.check_splits()
            config.source.with_training_of(trained.source).check_splits()
        source = open_split(config, "eval", class_names)
        check_distinct(record["source"], trained.num_held_out, source)
        return source
    held_out = trained.num_held_out
    remedy = f"must be {held_out}, as in the run, which trained on all other examples; {_OTHERS}"
    require(config.num_held_out == held_out, "data.num_held_out", config.num_held_out, remedy)
    source = open_split(config, "eval", class_names)
    # Digits and noise have other pixels at another size, and a run may be evaluated at another size.
    sized = dataclasses.replace(config, eval_image_size=trained.eval_image_size)
    same = source if sized == config else open_split(sized, "eval", class_names)
    before, now = record["eval_source"]["fingerprint"], same.fingerprint()
    if before != now:
        raise ConfigError(
            f"data.num_held_out = {held_out}: the first {held_out} training examples are not those that the run held "
            f"out (fingerprint {before} -> {now}), as images were added, removed or renamed, or this is another set: "
            f"the run may have trained on some of them; restore the same images, or {_OTHERS}"
        )
    return source
