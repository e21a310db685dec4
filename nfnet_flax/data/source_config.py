"""The package's sources of labelled images, for recipes; each is defined in the file that also reads it."""

from nfnet_flax.data.array_record_source import ArrayRecordSource
from nfnet_flax.data.csv_source import CsvSource
from nfnet_flax.data.digits import DigitsSource
from nfnet_flax.data.image_folder import FolderSource
from nfnet_flax.data.parquet_source import ParquetSource
from nfnet_flax.data.random_access import SourceConfig
from nfnet_flax.data.synthetic import SyntheticSource
from nfnet_flax.data.tfds_records import TfdsSource
from nfnet_flax.data.webdataset_source import WebDatasetSource
from nfnet_flax.open_config import declare_kinds

declare_kinds(
    SourceConfig,
    DigitsSource,
    SyntheticSource,
    FolderSource,
    CsvSource,
    ParquetSource,
    WebDatasetSource,
    ArrayRecordSource,
    TfdsSource,
)

__all__ = [
    "ArrayRecordSource",
    "CsvSource",
    "DigitsSource",
    "FolderSource",
    "ParquetSource",
    "SourceConfig",
    "SyntheticSource",
    "TfdsSource",
    "WebDatasetSource",
]
