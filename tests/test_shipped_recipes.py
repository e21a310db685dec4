"""Recipes that come with the package: their names, `nfnet recipes`, and copies to change."""

from pathlib import Path

import pytest

from nfnet_flax import __version__, cli, exit_codes
from nfnet_flax.config import ConfigError
from nfnet_flax.config_json import differences, to_json
from nfnet_flax.recipe_file import about, load_recipe, recipe_files
from tests.runs import ROOT
from tests.test_cli import fails


def test_a_name_stands_for_the_file_of_the_package() -> None:
    files = recipe_files()
    assert set(files) == {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert differences(to_json(load_recipe("digits")), to_json(load_recipe(files["digits"]))) == []
    assert load_recipe("nfnet_imagenet:variant=f3").name == load_recipe(f"{files['nfnet_imagenet']}:variant=f3").name
    with pytest.raises(ConfigError, match=r"recipe 'digit': there is no such file, .* or one of digits, .*nfnet_im"):
        load_recipe("digit")
    with pytest.raises(ConfigError, match=r"'variant' is not a name=value, such as variant=f3"):
        load_recipe("nfnet_imagenet:variant")
    with pytest.raises(ConfigError, match=r"recipe file './digits' does not exist: give the path of a \.py file"):
        load_recipe("./digits")


def test_recipes_are_listed_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["recipes"]) == exit_codes.EXIT_DONE
    printed = capsys.readouterr().out
    for name, file in recipe_files().items():
        assert f"{name} " in printed
        assert about(file)
        assert about(file) in printed
    assert cli.main(["recipes", "copy", "digits"]) == exit_codes.EXIT_DONE
    assert cli.main(["recipes", "copy", "digits.py", "mine"]) == exit_codes.EXIT_DONE
    assert "use: nfnet train" in capsys.readouterr().out
    for copy in ("digits.py", "mine/digits.py"):
        assert Path(copy).read_text() == recipe_files()["digits"].read_text()
    Path("digits.py").write_text("# changed")
    assert "exists already: remove it, or give another folder" in fails(capsys, "recipes", "copy", "digits", ".")
    assert Path("digits.py").read_text() == "# changed"
    assert "unknown recipe 'digit': known are digits" in fails(capsys, "recipes", "copy", "digit")
    assert "DIR = 'digits.py': cannot be made" in fails(capsys, "recipes", "copy", "digits", "digits.py")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == exit_codes.EXIT_DONE
    printed = capsys.readouterr().out
    assert printed.startswith(f"nfnet_flax {__version__}, ")
    assert ", jax " in printed
