"""The documentation is true: its commands and its code run, its tables are complete, and what it names is there."""

import dataclasses
import fnmatch
import functools
import itertools
import os
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from flax import nnx

from nfnet_flax import cli, exit_codes
from nfnet_flax.cli.usage import USAGE
from nfnet_flax.config import field_hints, members_of
from nfnet_flax.models import TimmNFNetConfig, build_model, model_config
from nfnet_flax.models.params import merge, split
from nfnet_flax.open_config import kinds_of
from nfnet_flax.parallel.processes import DistributedConfig
from nfnet_flax.recipe import Recipe
from nfnet_flax.training.watchdog import WatchdogConfig
from nfnet_flax.weights import Preprocessing, save_weights, to_haiku
from tests import documents, image_sets
from tests.documents import DOCUMENTS, Block
from tests.runs import ROOT

REASONS = {
    "installs packages and takes minutes",
    "needs a cluster",
    "needs a container engine",
    "needs a network",
    "needs the extra cuda-plan",
    "needs the extra tpu",
    "runs until it is stopped",
    "takes more than a minute",
}
"""Why a block of commands may be left out here."""

MEAN, STD = (128.0, 128.0, 128.0), (64.0, 64.0, 64.0)
SMALL = {"widths": (8,), "depths": (1,), "group_width": 4}
SHORTER_COMMANDS = {
    "nfnet train recipes/": "--model.widths 8 --model.depths 1 --model.group-width 4 --num-steps 4 --no-tensorboard",
    "nfnet train recipes/finetune.py": "--num-steps 4 --no-tensorboard",  # nothing of the line above
    "nfnet train recipes/photos.py": "--data.num-held-out 3 --data.batch-size 8 --data.eval-batch-size 8 "
    "--data.image-size 32 --data.eval-image-size 32",
}
"""What is appended here to commands that begin so: they run as they stand, only shorter."""
FEW_NAMES = {
    "README.md": 4,
    "docs/CONTRIBUTING.md": 5,
    "docs/SECURITY.md": -1,
    "docs/agc.md": 1,
    "docs/changelog.md": 1,
    "docs/claims.md": 3,
    "docs/export.md": 1,
    "docs/extending.md": 3,
    "docs/fine_tuning.md": 4,
    "docs/getting_started.md": 0,
    "docs/index.md": -1,
    "docs/performance.md": 8,
    "docs/telemetry.md": 1,
    "docs/weights.md": 7,
}
"""Documents that name fewer files, fields and options than the others, and more than so many."""
SHORT_COMMANDS = "--num-steps 4"
"""Of commands that are short as they stand."""
SHORTER_CODE = {
    '"nfnet_f0", ': '"nfnet_f0", **SMALL, ',
    'load_recipe("recipes/digits.py")': 'Run("runs/mine").recipe',
    '"runs/digits"': '"runs/mine"',
}
"""What is replaced here in Python code, for the same reason."""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_block_is_run_or_says_why_not(document: str) -> None:
    found = documents.blocks(document)
    assert 2 * len(found) == len(re.findall("^```", documents.text_of(document), re.MULTILINE))
    for block in found:
        assert block.language in ("bash", "python", "dockerfile", "text"), f"{block.place}: name its language"
        if block.language in ("bash", "python"):
            assert block.why_not_run in {None, *REASONS}, f"{block.place}: {block.why_not_run!r} is no known reason"
        else:
            assert block.why_not_run is None, f"{block.place}: {block.language} is never run"
            hidden = re.findall(r"^(?:\$ |nfnet |python |bash |pip ).*", block.text, re.MULTILINE)
            assert not hidden, f"{block.place}: {hidden[0]!r} belongs into a block of bash"


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The run of docs/getting_started.md, trained once for all pages that only read it; called where recipes/ is."""

    @functools.cache
    def train() -> Path:
        workdir = tmp_path_factory.mktemp("trained") / "mine"
        assert _run_command(f"nfnet train recipes/digits.py --workdir {workdir}") == 0
        return workdir

    return train


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_code_run(
    document: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    trained_run: Callable[[], Path],
) -> None:
    (tmp_path / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("*.py"):
        (tmp_path / "recipes" / recipe.name).write_text(recipe.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, object] = {"SMALL": SMALL}
    printed = ""
    for block in documents.blocks(document):
        if block.mark == "printed by the last command":
            assert _outline(block.text) == _outline(printed), f"{block.place}: printed was\n{printed}"
        elif block.why_not_run is not None:
            continue
        elif block.language == "python":
            _run_code(block, names)
        elif block.language == "bash":
            for command in documents.commands(block):
                if "runs/mine" in command and "nfnet train" not in command and not Path("runs/mine").exists():
                    shutil.copytree(trained_run(), "runs/mine")
                _prepare_for(command)
                capfd.readouterr()
                code = _run_command(command)
                printed, errors = capfd.readouterr()
                assert code == _expected_code(command), f"{block.place}: {command}\n{printed}\n{errors}"


def _run_code(block: Block, names: dict[str, object]) -> None:
    """Runs a block of Python, or writes it to the file that its first line names."""
    if file := re.match(r"# (\S+\.py)\n", block.text):
        Path(file[1]).write_text(block.text)
        return
    _prepare_for(block.text)
    text = block.text
    for long, short in SHORTER_CODE.items():
        text = text.replace(long, short)
    exec(compile("\n" * (block.line - 1) + text, block.document, "exec"), names)


def _expected_code(command: str) -> int:
    said = re.search(r"#.* exit code (\d+)", command)
    return int(said[1]) if said else 0


def _run_command(command: str) -> int | str | None:
    """Runs a line as a shell would; a plain `nfnet ...` in this process, which has imported everything already."""
    words = shlex.split(command, comments=True)
    plain = " ".join(words)
    if SHORT_COMMANDS not in plain:
        found = [options for beginning, options in SHORTER_COMMANDS.items() if beginning in plain]
        is_given = "recipes/finetune.py" in plain  # its network is that of the weights, which are small already
        words += " ".join(found[is_given:]).split()
    if words[0] != "nfnet":
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        text = shlex.join(words) if "nfnet" in words else command
        return subprocess.run(["bash", "-c", text], env=environment, check=False, timeout=300).returncode
    assert not set(words) & {"|", "&&", "||", ";", "&", ">", "<"}, f"{command}: needs a shell"
    try:
        return cli.main(words[1:])
    except SystemExit as stopped:
        return stopped.code


def _prepare_for(text: str) -> None:
    """Makes the files that commands and code need and that users have from elsewhere, by real writers."""
    if "F0_haiku.npz" in text:
        Path("F0_haiku.npz").write_bytes(_published_f0())
    elif "weights/nfnet_f0.safetensors" in text:  # in the place of the converted F0, as all that follows is smaller
        small = build_model(model_config("nfnet_f0", **SMALL), num_classes=1000, rngs=nnx.Rngs(0))
        save_weights("weights/nfnet_f0.safetensors", small, source="a test", parameters="unknown", overwrite=True)
    if "photo.jpg" in text:
        Path("photo.jpg").write_bytes(image_sets.image_file(0))
    if "predict samples" in text:
        Path("samples").mkdir()
        Path("samples/1.jpg").write_bytes(image_sets.image_file(1))
    if "digit_images" in text:
        for number in range(10):
            folder = Path("digit_images", str(number))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "image.jpg").write_bytes(image_sets.image_file(number))
    if "weights/eca_nfnet_l0.safetensors" in text and not Path("weights/eca_nfnet_l0.safetensors").exists():
        light = TimmNFNetConfig(widths=(16, 16), depths=(1, 1), stem_width=8, group_width=8, num_final=16)
        seen_as = Preprocessing(image_size=32, crop_margin=0, resampler="pillow_bicubic", mean=MEAN, std=STD)
        save_weights(
            "weights/eca_nfnet_l0.safetensors",
            build_model(light, num_classes=10, rngs=nnx.Rngs(0)),
            source="a test",
            parameters="unknown",
            preprocessing=seen_as,
        )
    names_photos = "recipes/photos.py" in text or "photos" in re.split(r"[\s=,]", text)
    if names_photos and not Path("photos").exists():
        image_sets.make_folder(Path("photos"))


def _published_f0() -> bytes:
    """NFNet-F0 as it was published, with zeros for parameters, which cost nothing to make."""
    config = model_config("nfnet_f0")
    abstract = nnx.eval_shape(lambda: build_model(config, num_classes=1000, rngs=nnx.Rngs(0)))
    structure, params, statistics = split(abstract)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), (params, statistics))
    return pickle.dumps(to_haiku(merge(structure, *zeros)))


def _outline(printed: str) -> list[str]:
    """The first words of each line of a report: what follows, numbers and folders, is other on each machine."""
    words = [re.sub(r"\S*/\S*", "FOLDER", line).split() for line in printed.splitlines()]
    return [" ".join(itertools.takewhile(lambda word: not re.match(r"[\d(]", word), line)) for line in words if line]


def test_all_exit_codes_are_listed() -> None:
    codes = {value for name, value in vars(exit_codes).items() if name.startswith("EXIT_")}
    resuming, laptop_to_pod = map(documents.exit_codes, ("docs/resuming.md", "docs/from_laptop_to_pod.md"))
    assert set(resuming) == codes
    assert set(laptop_to_pod) >= codes  # those that the shell and JAX give, too
    assert {int(code) for code in re.findall(r"\b\d+\b", USAGE.partition("exit codes:")[2])} == codes


def test_the_map_names_every_file() -> None:
    (block,) = [block for block in documents.blocks("docs/architecture.md") if block.text.startswith("nfnet_flax/")]
    named: dict[Path, list[str]] = {}
    for line in block.text.splitlines():
        if heading := re.match(r"( *)([\w/]+)/ ", line):
            folder = Path("nfnet_flax" if heading[1] else "", heading[2])
        named.setdefault(folder, []).extend(
            re.findall(r"[\w*]+\.(?:py|sh|sbatch|yaml|md|svg|cff|dockerignore)\b|\bDockerfile\b(?!\.)", line)
        )
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "nfnet_flax").rglob("*.py")}
    assert folders <= set(named)
    for folder, patterns in named.items():
        if folder == Path("tests"):
            continue  # their names say what they test
        files = {path.name for path in (ROOT / folder).iterdir() if path.is_file()} - {
            "__init__.py",
            "__main__.py",
            "py.typed",
        }
        for pattern in patterns:
            assert fnmatch.filter(files, pattern), f"the map names {folder / pattern}, which is not there"
        missing = {name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
        assert not missing, f"the map lacks {missing} of {folder}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_fields_and_options_that_are_named_exist(document: str) -> None:
    configs = {**typing.get_type_hints(Recipe), "distributed": DistributedConfig, "watchdog": WatchdogConfig}
    num_checked = 0
    for word in {word for span in documents.code_spans(document) for word in span.split()}:
        if path := re.match(r"(?:tools|tests|recipes|nfnet_flax|data|models|training)/[\w/*]*(?:\.\w+|/$)", word):
            found = [*ROOT.glob(path[0]), *(ROOT / "nfnet_flax").glob(path[0])]
            assert found, f"{document} names {word}, which is not there"
            num_checked += 1
        elif field := re.match(r"(?:--)?(\w+)\.([\w.-]*\w)", word):
            # `--execution.no-reproducible` sets a field to False.
            names = field[2].replace(".no-", ".").removeprefix("no-").replace("-", "_").split(".")
            if field[1] in configs and names != ["py"]:
                assert _has_field(configs[field[1]], names), f"{document} names {word}, which is no field"
                num_checked += 1
    assert num_checked > FEW_NAMES.get(document, 10)


def _has_field(hint: typing.Any, names: list[str]) -> bool:
    """Whether a configuration, or one of several, has a field at this path."""
    if not names:
        return True
    members = [kind for kind in members_of(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    hints = [field_hints(kind) for member in members for kind in kinds_of(member).values()]
    return any(_has_field(fields[names[0]], names[1:]) for fields in hints if names[0] in fields)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tools_have_the_options_that_are_named(document: str) -> None:
    for span in documents.code_spans(document):
        if found := re.search(r"tools/\w+\.py\b", span):
            source = documents.text_of(found[0])
            for option in re.findall(r"--(?:no-)?([a-z][\w-]*)", span[found.end() :]):
                named = rf"--{option}\b|^    {option.replace('-', '_')}: "
                assert re.search(named, source, re.MULTILINE), f"{document}: {found[0]} has no option --{option}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", documents.prose(document)):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            path = (ROOT / document).parent / file if file else ROOT / document
            assert path.exists(), f"{document} links {target}"
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


def test_the_readme_is_short_and_links_every_page() -> None:
    assert len(documents.text_of("README.md").splitlines()) <= 150
    for document in DOCUMENTS[1:]:
        assert f"]({document})" in documents.text_of("README.md"), f"README.md does not link {document}"


@pytest.mark.parametrize("document", DOCUMENTS[1:])
def test_each_page_begins_with_what_its_reader_can_do_then(document: str) -> None:
    heading, nothing, first = documents.text_of(document).splitlines()[:3]
    assert heading.startswith("# ")
    assert not nothing
    assert first.startswith("After this page you ")


def test_the_menu_has_every_page_once() -> None:
    menu = yaml.safe_load(documents.text_of(".mkdocs.yml"))["nav"]
    parts = [part for entry in menu for part in entry.values()]
    pages = [page for part in parts for page in ([part] if isinstance(part, str) else [*map(_page_of, part)])]
    assert sorted(f"docs/{page}" for page in pages) == sorted(DOCUMENTS[1:])


def _page_of(entry: dict[str, str]) -> str:
    (page,) = entry.values()
    return page


@pytest.mark.parametrize(
    ("tool", "document"),
    [
        ("tools/make_recipe_reference.py", "docs/recipe_reference.md"),
        ("tools/make_api_overview.py", "docs/api.md"),
    ],
)
def test_generated_pages_are_up_to_date(tool: str, document: str) -> None:
    made = runpy.run_path(str(ROOT / tool))["page"]()
    assert made == documents.text_of(document), f"{document}: run python {tool}"


def test_the_fast_tests_leave_out_tests_that_exist() -> None:
    named = re.findall(r"(tests/test_\w+\.py)::(\w+)", documents.text_of("tools/test.sh"))
    assert len(named) > 5
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"tools/test.sh names {file}::{name}, which is not there"
