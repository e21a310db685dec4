"""Weights by what a user writes: a file, a folder, or a name in a model hub."""

import dataclasses
import os
from pathlib import Path

from nfnet_flax.config import ConfigError
from nfnet_flax.paths import hub_name, local_path
from nfnet_flax.storage import bucket_url, copy_of
from nfnet_flax.weights.entries import HostArrays
from nfnet_flax.weights.hub import CONFIG, WEIGHTS, fetch
from nfnet_flax.weights.portable import WeightsInfo, read_weights
from nfnet_flax.weights.timm_folder import is_folder, read_folder


def open_weights(reference: str | os.PathLike[str], *, field: str = "weights") -> tuple[WeightsInfo, HostArrays]:
    """Weights and their description.

    Args:
      reference: a `.safetensors` file that `nfnet convert` or `save_weights` wrote, or a folder with timm's
        `config.json` and `model.safetensors`, as a path or a URL such as `gs://BUCKET/FILE`; or a name in a model hub
        (`paths.hub_name`), such as `timm/eca_nfnet_l0.ra2_in1k`.
      field: name of the value in messages.

    Returns:
      The description, and our name -> array.

    Raises:
      ConfigError: there are no such weights, they are damaged, or of a network that is not known.
      HubUnreachable: the hub cannot be reached.
      StorageFailed: the bucket cannot be read.
    """
    if (name := hub_name(reference)) is not None:
        fetched = fetch(name)
        info, arrays = read_folder(fetched.folder)
        return dataclasses.replace(info, source=fetched.source), arrays
    url = bucket_url(field, reference)
    if url is None:
        return _read_from(local_path(field, reference), f"{field} = {os.fspath(reference)!r}")
    with copy_of(field, url, (CONFIG, WEIGHTS)) as path:
        info, arrays = _read_from(path, f"{field} = {str(url)!r}")
    return dataclasses.replace(info, source=str(url)), arrays


def _read_from(path: Path, named: str) -> tuple[WeightsInfo, HostArrays]:
    if path.is_dir():
        if not is_folder(path):
            raise ConfigError(
                f"{named}: the folder holds no {CONFIG} with {WEIGHTS}: give a weight file, "
                "or such a folder (of the folder of a run, `nfnet convert run` makes a weight file)"
            )
        return read_folder(path)
    if path.name == WEIGHTS and is_folder(path.parent):
        return read_folder(path.parent)
    return read_weights(path)
