"""Folders of this machine and in buckets have the same operations; faults of a store pass or are explained."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import StorageFailed
from nfnet_flax.storage import BucketFolder, BucketUrl, Folder, LocalFolder, bucket, bucket_url, google_login
from tests import stores

ODD = "odd/a b%20#[v2]é?.txt"


@pytest.fixture(scope="module", params=["local", "gs", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    if request.param == "local":
        yield LocalFolder(tmp_path_factory.mktemp("place") / "run")
        return
    with stores.store(request.param) as url, pytest.MonkeyPatch.context() as patch:
        stores.use(patch, request.param, url)
        yield BucketFolder(BucketUrl(request.param, stores.BUCKET, "runs/run 1"))


def test_every_place_has_the_same_operations(folder: Folder, tmp_path: Path) -> None:
    assert folder.files() == {}
    folder.put("a/b.txt", b"1")
    folder.put("a/b.txt", b"two")
    folder.put(ODD, b"x")
    assert folder.files() == {"a/b.txt": 3, ODD: 1}
    assert folder.files("a") == {"a/b.txt": 3}
    assert (folder.read("a/b.txt"), folder.read(ODD)) == (b"two", b"x")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40_000_000))
    folder.upload(source, "c/large")
    folder.download("c/large", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    with pytest.raises(FileNotFoundError):
        folder.read("a/none")
    with pytest.raises(FileNotFoundError):
        folder.download("a/none", tmp_path / "none")
    folder.delete([ODD, "a/none", "c/large"])
    assert folder.files() == {"a/b.txt": 3}


def test_of_many_that_create_a_file_one_succeeds(folder: Folder) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: folder.create("owner/1", f"{number}".encode()), range(8)))
    assert sum(won) == 1
    assert folder.read("owner/1") == f"{won.index(True)}".encode()


@pytest.mark.parametrize("kind", stores.KINDS)
def test_faults_that_pass_are_survived_and_others_say_what_to_do(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6_000_000))
    with stores.proxied(kind, []) as (url, set_rules):
        stores.use(monkeypatch, kind, url)
        folder = BucketFolder(BucketUrl(kind, stores.BUCKET, "run"), retry_s=20)
        unavailable = {"do": "status", "status": 503, "times": 2}
        for rule in (
            unavailable,
            {"do": "status", "status": 429, "times": 1},
            {"do": "reset", "bytes": 1000, "times": 1, "method": "PUT|POST"},
            {"do": "lost", "times": 1, "method": "PUT|POST"},
            {"do": "truncate", "bytes": 100_000, "times": 1, "method": "GET", "url": "large"},
        ):
            set_rules([rule])
            folder.upload(source, "large")
            folder.download("large", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == source.read_bytes(), rule
        set_rules([{"do": "lost", "times": 1, "method": "PUT|POST"}])
        assert folder.create("owner", b"me")
        assert not folder.create("owner", b"other")
        for status, needed in ((403, "permission is missing"), (401, "log in")):
            set_rules([{"do": "status", "status": status, "body": "no"}])
            with pytest.raises(StorageFailed, match=needed) as failed:
                folder.put("x", b"1")
            assert f"{kind}://bucket/run/x: cannot write" in str(failed.value)
        set_rules([])
        assert folder.files() == {"large": 6_000_000, "owner": 2}
        with pytest.raises(StorageFailed, match="there is no bucket 'absent'"):
            BucketFolder(BucketUrl(kind, "absent", "run")).files()
        with pytest.raises(StorageFailed, match="there is no bucket 'absent'"):
            BucketFolder(BucketUrl(kind, "absent", "run")).put("x", b"1")
        if kind == "gs":  # its library repeats each request for half a minute; tools/soak_faults.py does this
            return
        set_rules([{"do": "status", "status": 503}])
        started = time.monotonic()
        with pytest.raises(StorageFailed, match=r"cannot read.*repeated for"):
            BucketFolder(folder.url, retry_s=3).read("large")
        assert time.monotonic() - started < 60


def test_who_has_no_login_and_no_network_is_told_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "NO_GCE_CHECK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    nobody = f"127.0.0.1:{stores.free_port()}"
    monkeypatch.setenv("GCE_METADATA_IP", nobody)
    monkeypatch.setenv("GCE_METADATA_HOST", nobody)
    monkeypatch.setattr(google_login, "_STORE", ("127.0.0.1", stores.free_port()))
    bucket._file_system.cache_clear()
    started = time.monotonic()
    with pytest.raises(StorageFailed, match=r"cannot be reached without one .*: log in \(gcloud auth application-def"):
        BucketFolder(BucketUrl("gs", "bucket", "run")).files()
    assert time.monotonic() - started < 15.0


def test_a_login_that_is_given_and_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    login = tmp_path / "login.json"
    login.write_text('{"type": "nonsense"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(login))
    bucket._file_system.cache_clear()
    with pytest.raises(StorageFailed, match=rf"{login} does not have a valid type.*log in"):
        BucketFolder(BucketUrl("gs", "bucket", "run")).files()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("gs://b-1/runs/a", BucketUrl("gs", "b-1", "runs/a")),
        ("s3://b.c/runs//a b/", BucketUrl("s3", "b.c", "runs/a b")),
        ("GS://bucket", BucketUrl("gs", "bucket", "")),
        ("runs/a", None),
        ("/runs/a:b", None),
    ],
)
def test_urls(text: str, url: BucketUrl | None) -> None:
    assert bucket_url("workdir", text) == url


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("az://bucket/run", "kind that is not supported"),
        ("http://host/run", "kind that is not supported"),
        ("gs:/bucket/run", "one slash"),
        ("gs:bucket/run", "without its slashes"),
        ("s3://bucket/" + "n" * 900, "longer than 850 bytes"),
        ("gs://B_/run", "no name of a bucket"),
        ("gs:///run", "no name of a bucket"),
        ("gs://bucket/../run", "holds . or .."),
        ("gs://bucket/a\nb", "holds '\\\\n'"),
    ],
)
def test_bad_urls_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bucket_url("workdir", text)


def test_a_url_in_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="give it as text"):
        bucket_url("workdir", Path("gs://bucket/run"))
