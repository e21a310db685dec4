"""Tar files in the form of WebDataset: which members are read, with which labels, and errors for what is wrong."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.data.random_access import Source
from nfnet_flax.data.source_config import WebDatasetSource
from nfnet_flax.data.sources import open_source
from tests.packed_sets import write_tar

Members = list[tuple[str, bytes]]
PLAIN: Members = [("a.jpg", b"A"), ("a.cls", b"1"), ("b.jpg", b"BB"), ("b.cls", b"0")]


def source_of(root: Path, members: Members | None = None, **fields: Any) -> Source:
    if members is not None:
        write_tar(root / "x-train-0.tar", members)
    return open_source(WebDatasetSource(root=str(root), **fields), "train", 0)


def found_in(source: Source) -> dict[str, tuple[bytes, str]]:
    """Member -> image and name of the class."""
    return {
        source.describe(index).partition(" member ")[2]: (
            source[index]["image"],
            source.class_names[source[index]["label"]],
        )
        for index in range(len(source))
    }


@pytest.mark.parametrize(
    ("members", "fields", "wanted"),
    [
        (PLAIN, {}, {"a.jpg": (b"A", "1"), "b.jpg": (b"BB", "0")}),
        (
            [("d/a.PNG", b"A"), ("d/a.txt", b" cat\n"), ("d.e/a.webp", b"B"), ("d.e/a.txt", "hübou".encode())],
            {},
            {"d/a.PNG": (b"A", "cat"), "d.e/a.webp": (b"B", "hübou")},
        ),
        (
            [("./a.jpeg", b"A"), ("./a.json", b'{"label": 1}'), ("./b.gif", b"B"), ("./b.json", b'{"label": "0"}')],
            {},
            {"./a.jpeg": (b"A", "1"), "./b.gif": (b"B", "0")},
        ),
        (
            [
                *(("b.json", b'{"label": 3, "kind": "owl"}'), ("a.json", b'{"kind": "cat"}')),
                *(("a.jpg", b"A"), ("b.jpg", b"B")),
            ],
            {"json_key": "kind"},
            {"a.jpg": (b"A", "cat"), "b.jpg": (b"B", "owl")},
        ),
        (
            [("a.jpg", b""), ("a.cls", b"00"), ("b.jpg", b"B"), ("b.cls", b"1")],
            {},
            {"a.jpg": (b"", "00"), "b.jpg": (b"B", "1")},
        ),
    ],
)  # fmt: skip
def test_images_and_labels_are_found_by_their_key(
    tmp_path: Path, members: Members, fields: dict[str, Any], wanted: dict[str, tuple[bytes, str]]
) -> None:
    source = source_of(tmp_path, members, **fields)
    assert found_in(source) == wanted
    assert source.unused == ()


def test_the_ending_of_the_labels_may_be_chosen(tmp_path: Path) -> None:
    members = [
        *PLAIN,
        ("a.txt", b"a cat,\non a mat"),
        ("a.json", b'{"label": "cat"}'),
        ("b.json", b'{"label": "dog"}'),
        ("c.cls", b"7"),
        ("README.md", b"text"),
        ("a.seg.png", b"mask"),
        ("._a.jpg", b"of macOS"),
    ]
    source = source_of(tmp_path, members)
    assert found_in(source) == {"a.jpg": (b"A", "1"), "b.jpg": (b"BB", "0")}
    said = [(found.num_files, re.sub(r" in /.*", "", found.text)) for found in source.unused]
    assert said == [
        (1, "not used are 1 hidden files, such as '._a.jpg'"),
        (1, "not used are 1 labels without an image, such as 'c.cls'"),
        (2, "not used are 2 members whose names end, from the first dot on, neither like an image nor like a label, "
            "such as 'README.md'"),
        (3, "not used are 3 members with labels of another kind than .cls, which is read, such as 'a.txt'"),
    ]  # fmt: skip
    assert found_in(source_of(tmp_path, label="json")) == {"a.jpg": (b"A", "cat"), "b.jpg": (b"BB", "dog")}
    with pytest.raises(ConfigError, match=r"a\.txt: must have one line with a class, not 'a cat,\\non a mat'"):
        source_of(tmp_path, [("a.jpg", b"A"), ("a.txt", b"a cat,\non a mat")])
    write_tar(tmp_path / "x-train-0.tar", [("a.jpg", b"A"), ("a.cls", b"1")])
    write_tar(tmp_path / "x-train-1.tar", [("b.jpg", b"A"), ("b.txt", b"0")])
    with pytest.raises(ConfigError, match=r"labels are \.cls in .*0\.tar', \.txt in .*1\.tar': choose one ending by"):
        source_of(tmp_path)


def test_numbers_and_names_of_one_set(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.jpg", b"A"), ("a.cls", b"10")])
    write_tar(tmp_path / "train-1.tar", [("b.jpg", b"B"), ("b.cls", b"9")])
    numbers = source_of(tmp_path)
    assert numbers.class_names == tuple(map(str, range(11)))
    assert found_in(numbers) == {"a.jpg": (b"A", "10"), "b.jpg": (b"B", "9")}
    with pytest.raises(ConfigError, match=r"0\.tar member a\.jpg: label 10 is the number of no class, from 0 to 8"):
        source_of(tmp_path, class_names=tuple("abcdefghi"))
    write_tar(tmp_path / "train-1.tar", [("b.jpg", b"B"), ("b.cls", b"owl")])
    mixed = source_of(tmp_path)
    assert (mixed.class_names, found_in(mixed)["a.jpg"]) == (("10", "owl"), (b"A", "10"))


def test_a_key_may_be_in_several_files(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.jpg", b"A"), ("a.cls", b"0")])
    write_tar(tmp_path / "train-1.tar", [("a.jpg", b"B"), ("a.cls", b"1")])
    source = source_of(tmp_path)
    assert sorted(source[index]["image"] for index in range(len(source))) == [b"A", b"B"]
    assert [found.num_files for found in source.unused] == [0]
    assert re.search(
        r"1 images are in several tar files, such as 'a\.jpg': all of them are used", source.unused[0].text
    )
    write_tar(tmp_path / "train-1.tar", [("a.jpg", b"A"), ("a.cls", b"0")])
    with pytest.raises(ConfigError, match=r"train-1\.tar' has the keys, labels and sizes of .*train-0\.tar'"):
        source_of(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*PLAIN, ("a.jpg", b"C")], r"key 'a' has two images, 'a\.jpg' and 'a\.jpg': keys must differ"),
        ([*PLAIN, ("a.png", b"C")], r"key 'a' has two images, 'a\.jpg' and 'a\.png'"),
        ([*PLAIN, ("a.cls", b"1")], r"holds 'a\.cls' twice"),
        ([*PLAIN, ("c.jpg", b"C")], r"'c\.jpg' has no label \.cls, as have 1 of 3 images: add it, or"),
        ([("a.jpg", b"A"), ("b.jpg", b"A")], r"'a\.jpg' has no label, as have 2 images: each needs a member"),
        ([("a.jpg", b"A"), ("a.cls", b"")], r"a\.cls: must have one line with a class, not ''"),
        ([("a.jpg", b"A"), ("a.cls", b"\xff")], r"a\.cls: is no text in UTF-8"),
        ([("a.jpg", b"A"), ("a.cls", b"-1")], r"member a\.jpg: label -1 is the number of no class.*files with labels"),
        ([("a.jpg", b"A"), ("a.cls", str(2**70).encode())], r"label 1180591620717411303424 is the number of no class"),
        ([("a.jpg", b"A"), ("a.json", b"{")], r"a\.json: is no JSON \("),
        ([("a.jpg", b"A"), ("a.json", b"[1]")], r"a\.json: has no entry 'label' \(list\)"),
        ([("a.jpg", b"A"), ("a.json", b'{"x": 1}')], r"has no entry 'label' \('x'\): name .*source\.json-key"),
        *(
            ([("a.jpg", b"A"), ("a.json", json.dumps({"label": value}).encode())], r"entry 'label' is .*: must be the")
            for value in (None, 0.5, [1], True, "")
        ),
        ([("a.tar", b"A"), ("b.md", b"B")], r"has no image in it: .*; not used are 2 members .*'a\.tar'"),
        ([], r"has no image in it"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, members: Members, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        source_of(tmp_path, members)
    assert "x-train-0.tar" in str(caught.value)


def test_files_that_are_cut_off_damaged_or_joined(tmp_path: Path) -> None:
    members = [
        (f"{name}.{ending}", content) for name in "abc" for ending, content in (("jpg", b"A" * 900), ("cls", b"1"))
    ]
    path = write_tar(tmp_path / "train-0.tar", members)
    whole = path.read_bytes()
    end = 3 * (512 + 1024 + 512 + 512)  # of the last member; each has a header of 512 bytes, and is filled up
    assert not whole[end:].strip(b"\0")
    for length in (100, 700, 1500, *range(512, end + 1, 512), end + 511):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"train-0\.tar' (is cut off|has no image)|no tar file \("):
            source_of(tmp_path)
    path.write_bytes(whole[: end + 512])
    assert len(source_of(tmp_path)) == 3
    path.write_bytes(whole + whole)
    with pytest.raises(ConfigError, match=r"several tar files were joined to it, of which only the first can be read"):
        source_of(tmp_path)
    path.write_bytes(whole[:1600] + b"\xff" * 300 + whole[1900:])
    with pytest.raises(ConfigError, match=r"is damaged after byte|no tar file"):
        source_of(tmp_path)
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(ConfigError, match=r"is cut off, damaged or no tar file"):
        source_of(tmp_path)


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz", "train-0.tar.zst", "data/train-0.tar.bz2"])
@pytest.mark.parametrize("entry", ["train", "*train*", "{}", "."])
def test_compressed_tar_files_are_refused(tmp_path: Path, name: str, entry: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    if name.startswith("data/") and entry != "train":
        entry = f"data/{entry}"
    with pytest.raises(ConfigError, match=r"is a compressed tar file, which has no random access .*: decompress it"):
        source_of(tmp_path, train=(entry.format(Path(name).name).replace("data/.", "data/"),))


def test_a_compressed_file_is_refused_whatever_its_name(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "train-0.tar", PLAIN).read_bytes()
    (tmp_path / "train-0.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(ConfigError, match=r"train-0\.tar' is compressed by gzip, so that it has no random access"):
        source_of(tmp_path)


def test_members_of_every_kind(tmp_path: Path) -> None:
    long = f"{'folder/' * 40}{'n' * 120}"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "train-0.tar", "w", format=form) as tar:
            folder = tarfile.TarInfo("folder.jpg")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, f"{long}.jpg"
            tar.addfile(link)
            for name, content in ((f"{long}.jpg", b"A" * 513), (f"{long}.cls", b"0"), ("ü.jpg", b"B"), ("ü.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        source = source_of(tmp_path)
        assert sorted(source[index]["image"] for index in range(len(source))) == [b"A" * 513, b"B"]
        assert [found.num_files for found in source.unused] == [1]
        assert "links and other things that are no files, such as 'link.jpg'" in source.unused[0].text


def test_the_configuration_offers_the_endings_that_are_read() -> None:
    from nfnet_flax.data.tar_index import LABEL_ENDINGS

    for ending in LABEL_ENDINGS:
        WebDatasetSource(root="x", label=ending)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"WebDatasetSource\.label = 'csv'"):
        WebDatasetSource(root="x", label="csv")  # type: ignore[arg-type]
