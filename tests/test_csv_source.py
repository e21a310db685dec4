"""Images that a CSV file lists: which are read, with which labels, and an error for whatever is wrong in the file."""

import dataclasses
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfnet_flax import cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import from_json, to_json
from nfnet_flax.data.config import DataConfig
from nfnet_flax.data.pipeline import eval_batches, open_split, train_batches
from nfnet_flax.data.random_access import Source, Split
from nfnet_flax.data.source_config import CsvSource, SourceConfig
from nfnet_flax.data.sources import open_source
from tests import runs
from tests.image_sets import image_file

NAMES = ("a.jpg", "b.jpg", "c.jpg", "d/e.jpg")
HEAD = "image,label\n"
ROWS = "a.jpg,cat\nb.jpg,dog\nc.jpg,cat\nd/e.jpg,owl\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    for seed, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(image_file(seed))
    return tmp_path


def source_of(folder: Path, text: str | bytes, split: Split = "train", **fields: Any) -> Source:
    (folder / "set.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(CsvSource(file=str(folder / "set.csv"), **fields), split, 0)


def found_in(source: Source) -> dict[str, str]:
    """File -> class names of each example."""
    found = {}
    for index in range(len(source)):
        record, path = source[index], Path(source.describe(index))
        assert record["image"] == path.read_bytes()
        label = record["label"]
        labels = np.flatnonzero(label) if np.ndim(label) else [label]
        found[path.name] = "+".join(source.class_names[number] for number in labels)
    return found


def test_labels_follow_the_sorted_names_of_the_classes(folder: Path) -> None:
    source = source_of(folder, HEAD + ROWS)
    assert source.class_names == ("cat", "dog", "owl")
    assert found_in(source) == {"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "cat", "e.jpg": "owl"}
    assert isinstance(source[0]["label"], np.int32)
    assert source.unused == ()
    again = pickle.loads(pickle.dumps(source))
    assert found_in(again) == found_in(source)
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match="of a set of 4 examples"):
            source[wrong]
    fixed = source_of(folder, HEAD + ROWS, class_names=("owl", "dog", "cat", "fox"))
    assert fixed.class_names == ("owl", "dog", "cat", "fox")
    assert found_in(fixed) == found_in(source)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ((HEAD + ROWS).encode("utf-8-sig"), {}),
        ((HEAD + ROWS).encode("utf-16"), {}),
        ((HEAD + ROWS.replace("owl", "hübou")).encode("latin-1"), {"encoding": "latin-1"}),
        ((HEAD + ROWS).replace("\n", "\r\n"), {}),
        ((HEAD + ROWS).replace(",", ";"), {"delimiter": ";"}),
        (" image , label \n\n a.jpg , cat \nb.jpg,dog\nc.jpg,cat\nd/e.jpg,owl\n\n", {}),
        ('"label","note","image"\ncat,"one, two\nthree",a.jpg\ndog,"say ""x""",b.jpg\ncat,,c.jpg\nowl,,d/e.jpg', {}),
        ((HEAD + ROWS).replace(".jpg", ""), {"suffix": ".jpg"}),
        ((HEAD + ROWS).replace("image,label", "id,kind"), {"image": "id", "label": "kind"}),
    ],
)
def test_a_file_is_read_as_it_was_written(folder: Path, text: str | bytes, fields: dict[str, Any]) -> None:
    found = found_in(source_of(folder, text, **fields))
    owl = "hübou" if fields.get("encoding") == "latin-1" else "owl"
    assert found == {"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "cat", "e.jpg": owl}


def test_splits_are_a_column_or_two_files_or_images_held_out(folder: Path) -> None:
    text = "image,label,part\na.jpg,cat,train\nb.jpg,dog,train\nc.jpg,cat,val\nd/e.jpg,owl,test\n"
    train, held_out = (source_of(folder, text, split, split_column="part") for split in ("train", "eval"))
    assert (found_in(train), found_in(held_out)) == ({"a.jpg": "cat", "b.jpg": "dog"}, {"c.jpg": "cat"})
    assert train.class_names == held_out.class_names == ("cat", "dog")
    assert [found.num_files for found in train.unused] == [1]
    assert "not used are 1 rows of other splits: 'test'" in train.unused[0].text
    other = source_of(folder, text.replace("c.jpg,cat", "c.jpg,dog"), "eval", split_column="part")
    assert found_in(other) == {"c.jpg": "dog"}
    assert other.fingerprint() != held_out.fingerprint()

    (folder / "held_out.csv").write_text("image,label\nb.jpg,dog\n")
    two = CsvSource(file=str(folder / "set.csv"), eval_file=str(folder / "held_out.csv"))
    (folder / "set.csv").write_text("image,label\na.jpg,cat\nc.jpg,dog\n")
    two.check_splits()
    assert found_in(open_source(two, "eval", 0)) == {"b.jpg": "dog"}
    data = DataConfig(source=CsvSource(file=two.file), num_held_out=1)
    with pytest.raises(ConfigError, match=r"has only one class|nothing"):
        open_split(dataclasses.replace(data, source=CsvSource(file=str(folder / "held_out.csv"))), "train")
    assert len(open_split(data, "eval")) == len(open_split(data, "train")) == 1
    with pytest.raises(ConfigError, match=r"does not say which images are held out: .*--data\.num-held-out"):
        source_of(folder, HEAD + ROWS, "eval")


def test_an_image_of_both_splits_and_a_new_class_are_errors(folder: Path) -> None:
    text = "image,label,part\na.jpg,cat,train\nb.jpg,dog,train\n./d/../a.jpg,cat,val\n"
    (folder / "set.csv").write_text(text)
    config = CsvSource(file=str(folder / "set.csv"), split_column="part")
    with pytest.raises(ConfigError, match=r"set\.csv', line 4: is a training image, too \(line 2 of"):
        open_split(DataConfig(source=config), "train")
    with pytest.raises(ConfigError, match=r"eval split: class 'owl' is unknown .*known are cat, dog"):
        source_of(
            folder, "image,label,part\na.jpg,cat,train\nb.jpg,dog,train\nc.jpg,owl,val\n", "eval", split_column="part"
        )
    same = CsvSource(file=str(folder / "set.csv"), eval_file=str(folder / "d" / ".." / "set.csv"))
    with pytest.raises(ConfigError, match=r"are one file: an evaluation on training images means nothing"):
        same.check_splits()
    (folder / "held_out.csv").write_text(HEAD + "c.jpg,cat\n")
    gone = CsvSource(file=str(folder / "gone.csv"), eval_file=str(folder / "held_out.csv"))
    gone.check_splits()  # a run is evaluated where its training images are not


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("", {}, r"set\.csv' is empty: its first line must name the columns"),
        (HEAD, {}, r"set\.csv' has no row"),
        (
            "file,label\na.jpg,cat\n",
            {},
            r"line 1: there is no column 'image'; there are 'file', 'label': .*source\.image",
        ),
        ("image;label\na.jpg;cat\n", {}, r"seem to be divided by ';': give --data\.source\.delimiter ';'"),
        ("image,label,label\na.jpg,cat,cat\n", {}, r"line 1: 2 columns are named 'label': rename"),
        (HEAD + "a.jpg,cat\nb.jpg,\n", {}, r"line 3: column 'label' is empty: give a class, or remove the line$"),
        (HEAD + "a.jpg,cat\nb.jpg,|\n", {"separator": "|"}, r"line 3: column 'label' is empty: .*allow-none"),
        (HEAD + "a.jpg,cat\n,dog\n", {}, r"line 3: column 'image' is empty"),
        (HEAD + "a.jpg,cat\nb.jpg\n", {}, r"line 3: has 1 cells, and there are 2 columns"),
        (HEAD + "a.jpg,cat\nb.jpg,dog,x\n", {}, r"line 3: has 3 cells, .* into double quotes"),
        (HEAD + 'a.jpg,cat\nb.jpg,"dog\nc.jpg,cat\n', {}, r"line 3: .*: correct the quotes"),
        (HEAD + "a.jpg,cat\nz.jpg,dog\ny.jpg,dog\n", {}, r"line 3: '.*z\.jpg' is no file .* 2 of the 3 .*source\.root"),
        (HEAD + "a.jpg,cat\nd,dog\n", {}, r"line 3: '.*d' is no file"),
        (HEAD + "a.jpg,cat\nd\\e.jpg,dog\n", {}, r"line 3: .*have backslashes, write slashes"),
        (HEAD + "a.jpg,cat\na.jpg,dog\n", {}, r"line 3: image 'a\.jpg' has other classes than in line 2 .*separator"),
        ((HEAD + "a.jpg,kät\n").encode("latin-1"), {}, r"line 2: is not utf-8 .*--data\.source\.encoding latin-1"),
        (HEAD + ROWS, {"class_names": ("cat", "dog")}, r"line 5: class 'owl' is none of source\.class_names: cat, dog"),
        (HEAD + ROWS, {"split_column": "part"}, r"no column 'part'.*--data\.source\.split-column"),
        ("image,label,p\na.jpg,x,learn\n", {"split_column": "p"}, r"never contains 'train', but learn: .*train-split"),
        (HEAD + "a.jpg,cat\nb.jpg,cat\n", {}, r"only one class, 'cat'"),
    ],
)
def test_an_error_names_file_line_and_remedy(
    folder: Path, text: str | bytes, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        source_of(folder, text, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"file": ""}, r"source\.file = '': is empty"),
        ({"root": "gs://bucket"}, r"source\.root = .* is a URL"),
        ({"delimiter": "::"}, r"source\.delimiter = '::': must be one character"),
        ({"separator": ""}, r"source\.separator"),
        ({"encoding": "utf-99"}, r"source\.encoding = 'utf-99': is not known"),
        ({"allow_none": True}, r"source\.allow_none = True: needs source\.separator"),
        ({"class_names": ("a", "a")}, r"source\.class_names = \('a', 'a'\)"),
        ({"split_column": "s", "eval_file": "b.csv"}, r"give source\.split_column or this"),
        ({"split_column": "s", "eval_split": "train"}, r"must differ from source\.train_split"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CsvSource(**{"file": "a.csv", **fields})


def test_rows_that_repeat_are_counted_and_images_may_move(folder: Path) -> None:
    source = source_of(folder, HEAD + ROWS + "a.jpg,cat\n")
    assert len(source) == 4
    assert [found.num_files for found in source.unused] == [1]
    moved = folder / "elsewhere"
    moved.mkdir()
    for name in NAMES:
        (moved / name).parent.mkdir(exist_ok=True)
        os.rename(folder / name, moved / name)
    again = source_of(folder, HEAD + ROWS, root=str(moved))
    assert (again.fingerprint(), again.contents()) == (source.fingerprint(), source.contents())
    config = CsvSource(file="~/set.csv", eval_file=None, root="images")
    absolute = config.with_absolute_places()
    assert absolute.file == os.path.expanduser("~/set.csv")
    assert absolute.root == os.path.abspath("images")
    assert from_json(SourceConfig, to_json(absolute)) == absolute


SEVERAL = HEAD + "a.jpg,cat|dog\nb.jpg, dog | dog \nc.jpg,\nd/e.jpg,owl|cat|dog\n"


def test_several_classes_are_rows_of_zeros_and_ones(folder: Path) -> None:
    source = source_of(folder, SEVERAL, separator="|", allow_none=True)
    want = {"a.jpg": "cat+dog", "b.jpg": "dog", "c.jpg": "", "e.jpg": "cat+dog+owl"}
    assert source.class_names == ("cat", "dog", "owl")
    assert found_in(source) == want
    assert source[0]["label"].dtype == np.uint8
    config = CsvSource(file=str(folder / "set.csv"), separator="|", allow_none=True)
    other = open_source(config, "train", 0, ("fox", "owl", "dog", "cat"))
    assert {name: set(found.split("+")) for name, found in found_in(other).items()} == {
        name: set(found.split("+")) for name, found in want.items()
    }
    data = DataConfig(source=config, num_held_out=1, batch_size=6, eval_batch_size=4, num_threads=1)
    whole = {Path(source.describe(index)).name: source[index]["label"].tolist() for index in range(4)}
    train, held_out = open_split(data, "train"), open_split(data, "eval")
    with train_batches(data, train, seed=0, start_step=0, num_steps=1, process_index=0, num_processes=1) as batches:
        label = next(batches)["label"]
    assert (label.shape, label.dtype) == ((6, 3), np.uint8)
    rows = [whole[Path(train.describe(index)).name] for index in range(3)]
    assert sorted(label.tolist()) == sorted(rows * 2)
    with eval_batches(data, held_out, process_index=0, num_processes=1) as batches:
        (batch,) = batches
    assert batch["mask"].tolist() == [1, 0, 0, 0]
    assert batch["label"].tolist() == [whole[Path(held_out.describe(0)).name], *[[0] * 3] * 3]


def test_the_command_trains_on_a_csv_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "set.csv").write_text(HEAD + ROWS)
    words = [word for option in [*runs.OPTIONS, *runs.SMALL] for word in option.replace("=", " ").split(" ")]
    start = ["train", str(runs.DIGITS), "--workdir", str(folder / "run"), *words, "--num-steps", "2"]
    start += ["--data.batch-size", "8", "--data.num-held-out", "1", "--data.source", "CsvSource"]
    assert cli.main([*start, "--data.source.file", str(folder / "gone.csv")]) == exit_codes.EXIT_BAD_INPUT
    assert re.search(r"gone\.csv' is no file: give the path of a CSV file", capsys.readouterr().err)
    small = ["--data.image-size", "16", "--data.eval-image-size", "16"]
    assert cli.main([*start, *small, "--data.source.file", str(folder / "set.csv")]) == exit_codes.EXIT_DONE
    several = [*start, *small, "--data.source.file", str(folder / "set.csv"), "--data.source.separator", "|"]
    assert cli.main(several) == exit_codes.EXIT_BAD_INPUT
    assert "objective = 'SoftmaxCrossEntropy': takes one class per image" in capsys.readouterr().err
