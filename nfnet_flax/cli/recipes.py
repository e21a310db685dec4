"""`nfnet recipes`."""

import dataclasses
from typing import Annotated

import tyro

from nfnet_flax.cli.options import parsed
from nfnet_flax.config import ConfigError, unknown_name
from nfnet_flax.exit_codes import EXIT_DONE
from nfnet_flax.paths import made_folder
from nfnet_flax.recipe_file import about, recipe_files


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    if argv[:1] == ["copy"]:
        return _copy(argv[1:])

    @dataclasses.dataclass(frozen=True)
    class RecipesOptions:
        pass

    parsed(
        RecipesOptions,
        argv,
        "nfnet recipes",
        "List the recipes that come with the package. To change one, copy it: nfnet recipes copy NAME DIR.",
    )
    files = recipe_files()
    width = max(map(len, files))
    for name, file in files.items():
        print(f"{name:<{width}}  {about(file)}")
    print("\nuse: nfnet train NAME --workdir DIR; change: nfnet recipes copy NAME DIR")
    return EXIT_DONE


def _copy(argv: list[str]) -> int:
    @dataclasses.dataclass(frozen=True)
    class CopyOptions:
        name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
        """Name of the recipe, such as digits."""
        folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[DIR]")]] = "."
        """Folder for the copy."""

    options = parsed(CopyOptions, argv, "nfnet recipes copy", "Copy a recipe, so that it can be changed.")
    files = recipe_files()
    name = options.name.removesuffix(".py")
    if name not in files:
        raise unknown_name("recipe", options.name, files, listed_by="nfnet recipes")
    copy = made_folder("DIR", options.folder) / files[name].name
    try:
        with copy.open("x") as file:
            file.write(files[name].read_text())
    except FileExistsError as error:
        raise ConfigError(f"{copy} exists already: remove it, or give another folder") from error
    except OSError as error:
        raise ConfigError(f"{copy} cannot be written ({error.strerror}): give another folder") from error
    print(f"written: {copy}\nuse: nfnet train {copy} --workdir DIR")
    return EXIT_DONE
