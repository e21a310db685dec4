"""The one rule of held-out examples: what a run trained on is never counted as one, in training or afterwards.

What is compared is what a `Source` says of itself. Single training images that were copied into another folder go
unnoticed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from nfnet_flax.config import ConfigError, require
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import open_split, reading, source_record
from nfnet_flax.data.random_access import Source, split_off

_OTHERS = "name other images by --data.num-held-out None --data.source.eval FOLDER"


def check_distinct(trained: dict[str, Any], num_held_out: int | None, held_out: Source) -> None:
    """Checks that a held-out split is not a copy of the training split; for one that is no part of it.

    Args:
      trained: `source_record` of the training split.
      num_held_out: how many examples it leaves out at its beginning.
      held_out: all examples of the held-out split.

    Raises:
      ConfigError: they are the same.
    """
    left_out = num_held_out or 0
    if left_out >= len(held_out):
        return
    part = split_off(held_out, left_out, len(held_out)) if left_out else held_out
    if source_record(part) == trained:
        raise ConfigError(
            f"the held-out split ({held_out.describe(0)} is its first example) has the names, sizes and order of the "
            f"{len(part)} training examples: an evaluation on what is trained on says nothing; give other images, or "
            "other names where they only look alike"
        )


def open_held_out(config: DataConfig, class_names: Sequence[str], *, trained: DataConfig, record: Any) -> Source:
    """The held-out examples for an evaluation after training, none of which may have been trained on.

    Args:
      config: which examples.
      class_names: of the run, in the order of its labels.
      trained: what the run was trained with.
      record: the run's `input_identity`.

    Raises:
      ConfigError: as `open_split`; or they are a part of the training split, and not the one that the run left out; or
        they are, or share shards or records with, what it trained on.
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
    remedy = f"must be {held_out}, as in the run, which trained on all that it did not hold out; {_OTHERS}"
    require(config.num_held_out == held_out, "data.num_held_out", config.num_held_out, remedy)
    source = open_split(config, "eval", class_names)
    # What digits and noise are made of depends on their size, in which a run may be evaluated otherwise.
    sized = dataclasses.replace(config, eval_image_size=trained.eval_image_size)
    same = source if sized == config else open_split(sized, "eval", class_names)
    before, now = record["eval_source"]["fingerprint"], same.fingerprint()
    if before != now:
        raise ConfigError(
            f"data.num_held_out = {held_out}: the first {held_out} training examples are not those that the run held "
            f"out (fingerprint {before} -> {now}), as images were added, removed or renamed, or this is another set: "
            f"the run may have trained on some of them; give back the same images, or {_OTHERS}"
        )
    return source
