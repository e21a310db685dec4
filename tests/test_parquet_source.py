"""Parquet files as many writers write them: which bytes and labels are read, and an error for whatever is wrong."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import from_json, to_json
from nfnet_flax.data import parquet_pages
from nfnet_flax.data.random_access import CorruptRecordError, Source, SourceConfig
from nfnet_flax.data.source_config import ParquetSource
from nfnet_flax.data.sources import open_source
from tests.packed_sets import IMAGE, compressed, hub_metadata, plain

NAMES = ("cat", "dog", "owl")
ROWS = 40


def image(row: int) -> bytes:
    """Bytes that need be no image; other lengths, among them none at all, and one that is longer than a page."""
    rng = np.random.default_rng(row)
    return rng.bytes(0 if row == 3 else 90_000 if row == 7 else int(rng.integers(1, 5000)))


def table(
    images: Any = None, labels: Any = None, names: Sequence[str] | None = NAMES, *, rows: int = ROWS, **more: Any
) -> Any:
    if images is None:
        images = pa.array([{"bytes": image(row), "path": f"{row:03}.jpg"} for row in range(rows)], IMAGE)
    labels = pa.array([row % 3 for row in range(rows)], pa.int64()) if labels is None else labels
    made = pa.table({"image": images, "label": labels, **more})
    return made.replace_schema_metadata(None if names is None else hub_metadata(names))


def source_of(root: Path, **fields: Any) -> Source:
    return open_source(ParquetSource(root=str(root), **fields), "train", 0)


def found_in(source: Source) -> dict[int, tuple[bytes, str]]:
    """Row -> image and name of the class."""
    found = {}
    for index in range(len(source)):
        record = source[index]
        row = re.search(r"row (\d+)", source.describe(index))
        assert row is not None
        found[int(row[1])] = (record["image"], source.class_names[record["label"]])
    return found


WANTED = {row: (image(row), NAMES[row % 3]) for row in range(ROWS)}


@pytest.mark.parametrize(
    ("options", "is_copied"),
    [
        ({"compression": "NONE", "use_dictionary": False}, False),
        ({"compression": "NONE", "use_dictionary": False, "data_page_version": "2.0"}, False),
        ({"compression": "NONE", "use_dictionary": False, "data_page_size": 100, "row_group_size": 1000}, False),
        ({"compression": "NONE", "use_dictionary": False, "write_statistics": True, "write_page_index": True}, False),
        ({"compression": {"image.bytes": "NONE", "label": "ZSTD"}, "use_dictionary": ["label"]}, False),
        ({"compression": "NONE", "use_dictionary": False, "write_page_checksum": True}, False),
        ({"compression": "NONE", "use_dictionary": True}, True),
        ({"compression": "NONE", "use_dictionary": False, "use_byte_stream_split": False, "column_encoding": {
            "image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}, True),
        ({"compression": "SNAPPY"}, True),
        ({"compression": "ZSTD", "data_page_version": "2.0"}, True),
        ({"compression": "GZIP", "use_dictionary": False, "row_group_size": 1000}, True),
    ],
)  # fmt: skip
def test_images_are_read_from_the_file_or_from_one_copy(
    tmp_path: Path, options: dict[str, Any], is_copied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    plain(table(), tmp_path / "train.parquet", **options)
    assert found_in(source_of(tmp_path, keep_index=False)) == WANTED
    capsys.readouterr()
    assert found_in(source_of(tmp_path)) == WANTED
    assert bool(list(tmp_path.glob(".nfnet_index/*.images"))) == is_copied
    # Nothing is copied without saying so first, but if a file is encoded in a way that its metadata do not tell.
    assert ("have compressed images" in capsys.readouterr().err) == (is_copied and "column_encoding" not in options)


def test_each_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed(table(), tmp_path / "train.parquet", row_group_size=4)
    groups: list[int] = []
    read = pq.ParquetFile.iter_batches

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        if options["columns"] == ["image.bytes"]:
            groups.extend(range(self.num_row_groups) if options["row_groups"] is None else options["row_groups"])
        return read(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    source = source_of(tmp_path)
    assert found_in(source) == found_in(source_of(tmp_path)) == WANTED
    assert groups == list(range(10))


@pytest.mark.parametrize("write", [plain, compressed])
@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())]), pa.struct([*IMAGE, ("w", pa.int8())])],
)
def test_images_are_bytes_or_structures(tmp_path: Path, kind: Any, write: Any) -> None:
    values = [
        image(row) if pa.types.is_large_binary(kind) or pa.types.is_binary(kind) else {"bytes": image(row)}
        for row in range(ROWS)
    ]
    write(table(pa.array(values, kind)), tmp_path / "train-0.parquet")
    assert found_in(source_of(tmp_path)) == WANTED
    assert source_of(tmp_path).describe(0).endswith(tuple("0123456789"))  # there are no names


def test_rows_without_names_are_ordered_by_their_number(tmp_path: Path) -> None:
    without = pa.array([{"bytes": image(row), "path": None} for row in range(ROWS)], IMAGE)
    whole = plain(table(without), tmp_path / "one" / "train.parquet")
    for number, start in enumerate((0, 10)):
        part = table(without).slice(start, 10 if start == 0 else None)
        compressed(part, tmp_path / "two" / f"train-0000{number}-of-00002.parquet")
    one, two = source_of(whole.parent), source_of(tmp_path / "two")
    assert [one[i] for i in range(ROWS)] == [two[i] for i in range(ROWS)]
    assert one.fingerprint() == two.fingerprint()
    assert len({int(one[index]["label"]) for index in range(6)}) > 1


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (pa.array(["owl", "cat"] * 20, pa.string()), ("cat", "owl")),
        (pa.array(["owl", "cat"] * 20, pa.large_string()), ("cat", "owl")),
        (pa.array(["owl", "cat"] * 20).dictionary_encode(), ("cat", "owl")),
        (pa.array([2, 0] * 20, pa.uint8()), ("0", "1", "2")),
        (pa.array([10, 2] * 20, pa.int32()), tuple(map(str, range(11)))),
    ],
)
def test_labels_are_numbers_or_texts(tmp_path: Path, labels: Any, wanted: tuple[str, ...]) -> None:
    plain(table(labels=labels, names=None), tmp_path / "train.parquet")
    source = source_of(tmp_path)
    assert source.class_names == wanted
    found = found_in(source)
    assert [found[row][1] for row in range(ROWS)] == list(map(str, labels.to_pylist()))
    assert isinstance(source[0]["label"], np.int32)


def test_columns_are_named(tmp_path: Path) -> None:
    rows = table().rename_columns(["img", "fine_label"]).replace_schema_metadata(hub_metadata(NAMES, "fine_label"))
    plain(rows, tmp_path / "train.parquet")
    assert found_in(source_of(tmp_path, image="img", label="fine_label")) == WANTED
    config = ParquetSource(root=str(tmp_path), image="img", label="fine_label")
    assert from_json(SourceConfig, to_json(config)) == config
    assert set(to_json(config, places=False)) == {"type", "image", "label", "class_names"}


def structures(*values: dict[str, Any] | None) -> Any:
    return pa.array([*values, *[{"bytes": b"x", "path": "x"}] * (ROWS - len(values))], IMAGE)


@pytest.mark.parametrize("write", [plain, compressed])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table().rename_columns(["a", "label"]), r"no column 'image'; there are 'a', 'label': name .*source\.image"),
        (table().rename_columns(["image", "kind"]), r"no column 'label'; .*--data\.source\.label"),
        (table(pa.array(["a.jpg"] * ROWS)), r"column 'image' is of type string: must have the bytes"),
        (table(pa.array([{"path": "a.jpg"}] * ROWS)), r"column 'image' is of type struct<path: string>"),
        (table(pa.array([[1, 2]] * ROWS)), r"column 'image' is of type list"),
        (table(labels=pa.array([[1]] * ROWS)), r"column 'label' is of type list<.*one class for each image"),
        (table(labels=pa.array([0.5] * ROWS)), r"column 'label' is of type double"),
        (table(labels=pa.array([0] * 9 + [None] * 31)), r"train\.parquet row 9: column 'label' is null"),
        (table(labels=pa.array([0] * 9 + [3] * 31)), r"row 9 \(009\.jpg\): label 3 .*0 to 2 \(31 such .*names-file"),
        (
            table(labels=pa.array([0, -1] * 20)),
            r"row 1 \(001\.jpg\): label -1 is .*\(20 such .*: give files with labels",
        ),
        (table(labels=pa.array([0, 2**40] * 20), names=None), r"label 1099511627776 is the number of no class"),
        (table(labels=pa.array([0, 2**63] * 20, pa.uint64()), names=None), r"label 9223372036854775808 is the number"),
        (table(names=["a", "a", "b"]), r"class names \['a', 'a', 'b'\] in its metadata must be texts, each of them"),
        (table(structures(*[{"bytes": b"x", "path": "x"}] * 8, None)), r"row 8: column 'image\.bytes' is null"),
        (table(structures({"bytes": None, "path": "x"})), r"row 0: column .* is null: .*a file outside"),
        (table().replace_schema_metadata({b"huggingface": b"{"}), r"its metadata `huggingface` is damaged"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, rows: Any, message: str, write: Any) -> None:
    write(rows, tmp_path / "train.parquet")
    for keep_index in (True, False):
        with pytest.raises(ConfigError, match=message):
            source_of(tmp_path, keep_index=keep_index)
    assert not list(tmp_path.rglob("*.partial"))


def test_files_of_a_set_have_the_same_columns(tmp_path: Path) -> None:
    plain(table(), tmp_path / "train-0.parquet")
    for other in (
        table(names=("cat", "dog", "fox")),
        table(names=None),
        table(labels=pa.array(["cat"] * ROWS), names=None),
        table(pa.array([image(row) for row in range(ROWS)])),
    ):
        plain(other, tmp_path / "train-1.parquet")
        with pytest.raises(ConfigError, match=r"train-1\.parquet' and .*train-0\.parquet' have columns of other kinds"):
            source_of(tmp_path)
    compressed(table(), tmp_path / "train-1.parquet")  # how they are stored may differ
    assert len(source_of(tmp_path)) == 2 * ROWS


@pytest.mark.parametrize("write", [plain, compressed])
def test_files_that_are_cut_off_or_damaged(tmp_path: Path, write: Any) -> None:
    path = write(table(), tmp_path / "train.parquet")
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], r"is cut off: its \d+ bytes do not end like a Parquet file: copy or download it again"),
        (whole[: len(whole) // 2], "is cut off"),
        (whole[:3], "is no Parquet file: it begins with b'PAR'"),
        (whole[1:], "is no Parquet file"),
        (b"<html>not found</html>", r"is no Parquet file: it begins with b'<htm'"),
        (whole[:-30] + b"\xff" * 22 + whole[-8:], r"is damaged \(.*\): copy or download it again"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            source_of(tmp_path)
    assert not list(tmp_path.rglob("*.images*"))


def test_a_damaged_row_group_is_a_corrupt_record(tmp_path: Path) -> None:
    path = compressed(table(), tmp_path / "train.parquet")
    source = source_of(tmp_path, keep_index=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data[start : start + 30] = b"\xff" * 30
    path.write_bytes(data)
    damaged = []
    for index in range(ROWS):
        try:
            assert len(source[index]["image"]) >= 0
        except CorruptRecordError as error:
            damaged.append(str(error))
    assert len(damaged) == 5  # the rows of one group
    assert re.search(r"train\.parquet row \d: '.*is damaged", damaged[0])


def test_pages_that_are_damaged_are_never_read_as_something_else(tmp_path: Path) -> None:
    path = plain(table(rows=20), tmp_path / "a.parquet", row_group_size=1000, data_page_size=4000)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = chunk.data_page_offset
    stop = start + chunk.total_compressed_size
    whole = path.read_bytes()

    def places(content: bytes) -> list[tuple[int, int]] | None:
        path.write_bytes(content)
        with path.open("rb") as file:
            try:
                found = parquet_pages.plain_values(file.fileno(), start, stop, 20, has_levels=True)
            except parquet_pages.NotPlain:
                return None
        return list(zip(*(part.tolist() for part in found), strict=True))

    right = places(whole)
    assert right is not None
    assert [whole[offset : offset + size] for offset, size in right] == [image(row) for row in range(20)]
    rng = np.random.default_rng(0)
    num_refused = 0
    for position in [*range(start, start + 60), *rng.integers(start, stop, 60).tolist()]:
        for value in (0, 255, int(rng.integers(256))):
            found = places(whole[:position] + bytes([value]) + whole[position + 1 :])
            num_refused += found is None
            assert found is None or found == right or len(found) == 20
    assert num_refused > 20
    for length in (start, start + 10, (start + stop) // 2):
        assert places(whole[:length]) is None


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(table(), tmp_path / "train.parquet")
    source = source_of(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert found_in(source_of(tmp_path)) == found_in(source) == WANTED  # it is needed for the index alone
    with pytest.raises(ConfigError, match=r"needs the package pyarrow: pip install 'nfnet_flax\[parquet\]'"):
        source_of(tmp_path, keep_index=False, label="other")


def test_very_long_names_take_little_memory(tmp_path: Path) -> None:
    values = [
        {"bytes": image(row), "path": f"{'x' * 3000 * (row == 5)}/{'y' * 300}{row:03}.jpg"} for row in range(ROWS)
    ]
    plain(table(pa.array(values, IMAGE)), tmp_path / "train.parquet")
    assert found_in(source_of(tmp_path)) == WANTED
    assert sum(path.stat().st_size for path in tmp_path.glob(".nfnet_index/*")) < 20_000


def test_fields_that_only_say_where_files_are_may_change() -> None:
    here = ParquetSource(root="a", cache="b", train=("train",))
    there = dataclasses.replace(here, root="c", cache=None, keep_index=False, train=("x",), eval=("y",))
    assert to_json(here, places=False) == to_json(there, places=False)
