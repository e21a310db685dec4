"""Checks of the images of a run."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nfnet_flax.config import ConfigError
from nfnet_flax.doctor.findings import Finding, nearest, seen, wrong
from nfnet_flax.doctor.images import problem_of
from nfnet_flax.json_files import read_json
from nfnet_flax.training.layout import INPUT
from nfnet_flax.units import human_size

if TYPE_CHECKING:
    from nfnet_flax.data.random_access import Source, Split
    from nfnet_flax.recipe import Recipe

_ALL = "the option --all-images examines all of them"


def check_data(recipe: "Recipe", workdir: Path | None) -> list[Finding]:
    """Opens both splits and decodes one image of each; compares them with the images that the run began with."""
    from nfnet_flax.data.classes import spare_outputs
    from nfnet_flax.data.held_out import check_distinct
    from nfnet_flax.data.index_store import NoIndexYet
    from nfnet_flax.data.pipeline import input_changes, input_identity, open_split, source_record
    from nfnet_flax.training.record import fixed_class_names, has_trained

    class_names = None if workdir is None else fixed_class_names(workdir)
    data = dataclasses.replace(recipe.data, source=recipe.data.source.without_writing())
    findings, sources = [], {}
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        try:
            sources[split] = open_split(data, split, class_names)
            findings += _first_example(split, sources[split])
            findings += [seen(found.text) for found in sources[split].unused]
        except NoIndexYet as error:  # to make it would take long, and would write
            return [*findings, seen(f"{split}: {error}; until then the images are not looked at here")]
        except ConfigError as error:  # its message says what to do
            return [*findings, Finding(text=str(error), is_wrong=True)]
    findings += _check_copies(list(sources.values()))
    num_classes = max(len(source.class_names) for source in sources.values())
    if recipe.num_classes < num_classes:
        findings.append(wrong(f"num_classes = {recipe.num_classes}", f"must be at least {num_classes}"))
    if (spare := spare_outputs(recipe.num_classes, sources["train"].class_names)) is not None:
        findings.append(seen(spare))
    if recipe.data.num_held_out is None:
        try:
            check_distinct(source_record(sources["train"]), None, sources["eval"])
        except ConfigError as error:
            findings.append(Finding(text=str(error), is_wrong=True))
    stored = None if workdir is None or not has_trained(workdir) else workdir / INPUT
    if stored is not None and stored.exists():
        now = input_identity(recipe.data, seed=recipe.seed, train_source=sources["train"], eval_source=sources["eval"])
        recorded = read_json(stored, "put it back from a copy, or start in a new workdir")
        changed, said = input_changes(recorded, now)
        findings += [wrong(f"the run began with another input ({line})", "restore that input") for line in changed]
        findings += [seen(f"held-out images or contents of training images changed ({line})") for line in said]
    return findings


def _check_copies(sources: "list[Source]") -> list[Finding]:
    """Which copies of files from a bucket there are, and whether there is room for the others."""
    from nfnet_flax.data.random_access import copies_of

    found = [copies for source in sources if (copies := copies_of(source)) is not None]
    if not found:
        return []
    folder, free, limit = found[0].folder, found[0].free_bytes, found[0].limit_bytes
    size = sum(copies.missing_bytes for copies in found)
    counts = f"{sum(c.num_files - c.num_missing for c in found)} of {sum(c.num_files for c in found)} shards"
    findings = [seen(f"copies: {counts} are in {folder}" + (f"; the others have {human_size(size)}" if size else ""))]
    if size and not os.access(existing := nearest(folder), os.W_OK | os.X_OK):
        remedy = (
            "change its permissions, or give another folder by --data.source.cache-dir; now each record is a request"
        )
        findings.append(wrong(f"{existing} cannot be written", remedy))
    elif size > free:
        text = f"copies: there is room for {human_size(max(0, free))} more in {folder}"
        remedy = "make room, or give another folder by --data.source.cache-dir"
        rest = "what has no copy is read from the bucket, which is slower"
        findings.append(wrong(text, f"{remedy}; {rest}") if limit is None else seen(f"{text} (cache_gib); {rest}"))
    return findings


def _first_example(split: "Split", source: "Source") -> list[Finding]:
    """How many examples there are, and whether the first can be decoded."""
    from nfnet_flax.data.decode import decode

    num_unused = sum(found.num_files for found in source.unused)
    unused = f", {num_unused} files, rows or members are not used" if num_unused else ""
    text = f"{split}: {len(source)} examples of {len(source.class_names)} classes{unused}"
    if (problem := problem_of(source, 0)) is not None:
        return [seen(text), wrong(f"{split}: {problem}", "repair it, or train with data.on_corrupt = 'skip'; " + _ALL)]
    image = source[0]["image"]
    pixels = decode(image) if isinstance(image, bytes) else image
    return [seen(f"{text}; the first is {pixels.shape[1]} x {pixels.shape[0]} px")]
