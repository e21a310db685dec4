"""JSON files of a run: whole or not written, and whatever they hold, an error that names them."""

import copy
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfnet_flax.config import ConfigError
from nfnet_flax.json_files import StorageFailed, read_json, write_json
from nfnet_flax.parallel.processes import current
from nfnet_flax.recipe import read_recipe, save_recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.training.identity import claim
from nfnet_flax.training.record import stored_class_names
from nfnet_flax.training.run_folder import RunFolder
from nfnet_flax.training.setup import assemble
from tests import runs

DAMAGED = {
    "empty": b"",
    "cut short": b'{"a": 1, "b',
    "never written": b"\0" * 512,
    "no UTF-8": b'{"a": "\xff"}',
    "a list": b"[1]",
    "too deep": b"[" * 100_000,
}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data in ({"a": [1, 2.5, None, "ü"]}, {}):
        write_json(path, data)
        assert read_json(path, "unused") == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_with_the_remedy(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ConfigError, match=rf"^{path} is damaged \(.+\): put it back$"):
        read_json(path, "put it back")


def test_what_lies_in_its_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ConfigError, match="does not exist: put it back"):
        read_json(path, "put it back")
    path.mkdir()
    with pytest.raises(ConfigError, match="is a folder instead of a file: put it back"):
        read_json(path, "put it back")
    # That it cannot be opened says nothing of what it holds.
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(StorageFailed, match=rf"^{path}: OSError: .*symbolic links"):
        read_json(path, "put it back")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_json(path, {"a": "x" * 2000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_json(path, "unused") == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_every_start_names_a_damaged_file_of_the_run(tmp_path: Path) -> None:
    identity = assemble(load_recipe(runs.DIGITS), None).identity()

    def start() -> None:
        stored_class_names(tmp_path)
        claim(current(), RunFolder(tmp_path), identity, 60.0)

    start()
    for name in ("recipe.json", "input.json", "classes.json", "environment.json"):
        good = (tmp_path / name).read_bytes()
        for content in (good[: len(good) // 2], DAMAGED["no UTF-8"], DAMAGED["a list"]):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ConfigError, match=rf"{name} is damaged \("):
                start()
            assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).write_bytes(good)
    start()


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield data, key
        yield from places(data[key])


def test_whatever_a_recipe_file_holds_is_a_recipe_or_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    save_recipe(load_recipe(runs.DIGITS), path)
    stored = json.loads(path.read_bytes())
    wrong: list[Any] = [True, "x", [], [[1]], {}, {"type": [1]}]
    messages = []
    for index in range(len(list(places(stored)))):
        for value in wrong:
            changed = copy.deepcopy(stored)
            container, key = list(places(changed))[index]
            container[key] = value
            path.write_text(json.dumps(changed))
            try:
                read_recipe(path)
            except ConfigError as error:
                messages.append(str(error))
    assert len(messages) > 400
    assert [message for message in messages if str(path) not in message] == []
