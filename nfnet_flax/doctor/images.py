"""Decodes every image of a run, and names those that are damaged."""

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from nfnet_flax.config import ConfigError
from nfnet_flax.doctor.findings import Finding, seen, wrong
from nfnet_flax.doctor.machine import usable_cpus
from nfnet_flax.progress import tracking
from nfnet_flax.storage.background import BackgroundThreads

if TYPE_CHECKING:
    from nfnet_flax.data.random_access import Source, Split
    from nfnet_flax.recipe import Recipe

_PIECE = 16
"""Number of images that a thread decodes before it reports them."""
_REMEDY = (
    "repair them under the same names, or train with data.on_corrupt = 'skip'; remove them only before a run begins, "
    "because a run that has trained refuses another set"
)
_HANGS = "a disk or store hangs; look at it, or give more --timeout-s"


def check_images(recipe: "Recipe | None", workdir: Path | None, *, timeout_s: float) -> Iterator[Finding]:
    """Reads and decodes every image of both splits, in as many threads as there are processors.

    Each finding is yielded at once: whoever stops this has the names of the images that were found damaged so far.

    Args:
      recipe: the recipe whose images these are; None: there is none, which is a finding.
      workdir: folder of the run, if there is one, whose class names count.
      timeout_s: longest time without any image being decoded, in seconds.
    """
    from nfnet_flax.data.index_store import NoIndexYet
    from nfnet_flax.data.pipeline import open_split
    from nfnet_flax.data.prefetch import InputFailed
    from nfnet_flax.training.record import fixed_class_names

    if recipe is None:
        yield wrong("no recipe is known, so no image", "give --recipe FILE, or the --workdir of a run")
        return
    splits: tuple[Split, ...] = ("train", "eval")
    opening = BackgroundThreads(1, "opening")
    for split in splits:
        try:
            class_names = None if workdir is None else fixed_class_names(workdir)
            data = dataclasses.replace(recipe.data, source=recipe.data.source.without_writing())
            source = opening.submit(open_split, data, split, class_names).result(timeout_s)
        except NoIndexYet as error:
            yield wrong(f"{split}: {error}", "start training once, which makes it")
        except TimeoutError:
            yield wrong(f"{split}: it was not opened within {timeout_s:g} s", _HANGS)
            return
        except (ConfigError, InputFailed) as error:  # its message says what to do
            yield Finding(text=f"{split}: {error}", is_wrong=True)
        else:
            yield from _of_split(split, source, timeout_s)


def _of_split(split: "Split", source: "Source", timeout_s: float) -> Iterator[Finding]:
    """A finding for each image that cannot be decoded or read, and one about all."""
    num_seen, num_wrong = 0, 0
    with tracking(f"decoding every image of the {split} split", len(source), "images") as task:
        pieces = _decoded(source, timeout_s)
        while num_seen < len(source):
            try:
                num_images, problems = next(pieces)
            except TimeoutError:
                text = f"{split}: no image was decoded within {timeout_s:g} s, after {num_seen} of {len(source)}"
                yield wrong(text, _HANGS)
                return
            for problem in problems:
                yield Finding(text=f"{split}: {problem}", is_wrong=True)
            num_seen += num_images
            num_wrong += len(problems)
            task.advance(num_images)
    if not num_wrong:
        yield seen(f"{split}: all {len(source)} can be decoded")
    elif num_wrong == len(source):
        yield seen(f"{split}: none of {len(source)} can be decoded or read: nothing is left to train on or to evaluate")
    else:
        yield seen(f"{split}: {num_wrong} of {len(source)} cannot be decoded or read: {_REMEDY}")


def _decoded(source: "Source", timeout_s: float) -> Iterator[tuple[int, list[str]]]:
    """Number of images and what is wrong with which of them, piece after piece; few pieces are under way at once.

    Raises:
      TimeoutError: the next piece is not ready in time.
    """
    num_threads = usable_cpus()
    threads = BackgroundThreads(num_threads, "decoding")
    waiting: deque[Future[tuple[int, list[str]]]] = deque()
    for start in range(0, len(source), _PIECE):
        waiting.append(threads.submit(_examine, source, range(start, min(start + _PIECE, len(source)))))
        if len(waiting) > 2 * num_threads:
            yield waiting.popleft().result(timeout_s)
    while waiting:
        yield waiting.popleft().result(timeout_s)


def _examine(source: "Source", indexes: range) -> tuple[int, list[str]]:
    from nfnet_flax.data.random_access import read_ahead

    read_ahead(source, indexes)
    return len(indexes), [problem for index in indexes if (problem := problem_of(source, index)) is not None]


def problem_of(source: "Source", index: int) -> str | None:
    """What is wrong with an image, with its name; None if nothing is."""
    from nfnet_flax.data.decode import decode
    from nfnet_flax.data.random_access import CorruptRecordError

    try:
        image = source[index]["image"]
        if isinstance(image, bytes):
            decode(image)
    except CorruptRecordError as error:  # it names file and record
        return f"{error} (example {index})"
    except (ConfigError, OSError) as error:
        return f"{source.describe(index)!r} (example {index}): {error}"
    except Exception as error:  # whatever a decoder or a source of somebody's own may raise
        return f"{source.describe(index)!r} (example {index}): {type(error).__name__}: {error}"
    return None
