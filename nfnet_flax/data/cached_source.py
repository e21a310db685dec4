"""The settings of sources that may lie in a bucket: where copies of their files are kept, and how many."""

import dataclasses
from pathlib import Path
from typing import ClassVar

from nfnet_flax.config import ConfigError, require
from nfnet_flax.config_json import ADDED_LATER
from nfnet_flax.data.random_access import SourceConfig
from nfnet_flax.paths import check_path, local_path, user_cache
from nfnet_flax.storage.cache import ObjectCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedSource(SourceConfig):
    """A source whose files (shards) may be in a bucket (`gs://`, `s3://`)."""

    place_fields: ClassVar[tuple[str, ...]] = ("cache_dir", "cache_gib")

    cache_dir: str | None = dataclasses.field(default=None, metadata=ADDED_LATER)
    """Folder for copies of files from a bucket, which all processes of this host share; None: `nfnet_flax/shards` in
    the user's cache folder (`~/.cache`, or `XDG_CACHE_HOME`)."""
    cache_gib: float | None = dataclasses.field(default=None, metadata=ADDED_LATER)
    """Room that all copies in that folder may take, in GiB; None: what its disk has, except 5% (at most 10 GiB).
    Files without a copy are read directly from the bucket, which is slower; 0: all of them are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_dir is not None:
            check_path("source.cache_dir", self.cache_dir)
        remedy = "must not be negative"
        require(self.cache_gib is None or self.cache_gib >= 0, "source.cache_gib", self.cache_gib, remedy)

    def kept_copies(self) -> ObjectCache:
        """The copies of files from buckets. Nothing is made yet.

        Raises:
          ConfigError: there is no such folder.
        """
        return ObjectCache(self._cache_folder(), None if self.cache_gib is None else int(self.cache_gib * 2**30))

    def _cache_folder(self) -> Path:
        if self.cache_dir is not None:
            return local_path("source.cache_dir", self.cache_dir)
        try:
            return user_cache("shards")
        except RuntimeError as error:
            raise ConfigError(f"source.cache_dir = None: {error}: give a folder") from error
