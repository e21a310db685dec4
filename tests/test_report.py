"""`nfnet report` and `nfnet agc` on real runs: complete, older, damaged and in a bucket."""

import dataclasses
import html.parser
import json
import re
import shutil
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfnet_flax import cli
from nfnet_flax.config import ConfigError
from nfnet_flax.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from nfnet_flax.json_files import write_json
from nfnet_flax.models.registry import PUBLISHED, PUBLISHED_TOP1_PERCENT, name_of
from nfnet_flax.recipe import save_recipe
from nfnet_flax.recipe_file import load_recipe
from nfnet_flax.report.curves import charts_of, thinned
from nfnet_flax.report.facts import RunFacts, read_facts, with_labels
from nfnet_flax.report.page import report_page
from nfnet_flax.report.recipe_changes import defaults_of, differences_between, fields_of
from nfnet_flax.storage import BucketFolder, BucketUrl
from nfnet_flax.telemetry.layer_records import in_order, place_of, read_layers
from nfnet_flax.training.metrics import read_rows
from tests import runs, stores
from tests.test_reading import files_in

NAME = """<img src=x onerror=alert(1)> & "q" 'r' </script>"""
NUM_STEPS = 12
OPTIONS = (f"--num-steps={NUM_STEPS}", "--eval-every-steps=6", "--checkpoint.every-steps=6")
VOID = {"meta", "img", "path", "br"}


@dataclasses.dataclass(frozen=True)
class Made:
    """Two runs: one that clips by AGC, and one that does not clip."""

    clipped: Path
    plain: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    for name, options in (("clipped", [f"--name={NAME}"]), ("plain", ["--optim.clipping=none", "--seed=1"])):
        words = runs.command(folder / name, *OPTIONS, *options[1:])[3:]
        assert cli.main([*words, *options[:1]]) == EXIT_DONE
    return Made(folder / "clipped", folder / "plain")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A copy of the run that clips, without its checkpoints."""
    return Path(shutil.copytree(made.clipped, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "best")))


class Seen(html.parser.HTMLParser):
    """What a browser sees of a page: its elements, all closed in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data if self._open and self._open[-1] != "style" else ""


def is_alone(page: str) -> bool:
    """Whether a page runs nothing, and loads nothing."""
    elements = Seen(page).elements
    links = [value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href")]
    handlers = [name for _, attributes in elements for name in attributes if name.startswith("on")]
    tags = {tag for tag, _ in elements}
    return (
        not {"script", "link", "iframe", "object", "a"} & tags
        and not handlers
        and all(str(link).startswith("data:image/png;base64,") for link in links)
        and "url(" not in page
        and "@import" not in page
    )


def report(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert cli.main(["report", *words]) == EXIT_DONE
    return capsys.readouterr().out


def test_a_report_shows_what_is_on_record_and_changes_nothing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(made.clipped)
    page = tmp_path / "report.html"
    text = report(str(made.clipped), "--out", str(page), capsys=capsys)
    assert files_in(made.clipped) == before
    seen = Seen(page.read_text())
    assert is_alone(page.read_text())
    assert page.stat().st_size < 200_000
    rows = read_rows(made.clipped / "metrics.jsonl")
    last = rows[-1]
    steps, losses = zip(*[(row["step"], row["train/loss"]) for row in rows if "train/loss" in row], strict=True)
    environment = json.loads((made.clipped / "environment.json").read_text())
    for found in (text, seen.text):
        assert f"finished, step {NUM_STEPS} of {NUM_STEPS}" in found
        assert f"{last['eval_ema/top1']:.2%}" in found
        assert f"{last['eval/top5']:.2%}" in found
        assert "no published accuracy is on record" in found
        assert environment["cpu_features"][:40] in found
        assert re.search(r"optim\.clipping\.ratio\s*0\.01\s*0\.05", found)  # the default, and the recipe's
        assert "compared with the defaults" in found
        assert f"{NUM_STEPS} steps count, 0 were lost and repeated" in found
        assert "not recorded" not in found
        share = np.mean([row["agc/clipped_fraction"] for row in rows if "agc/clipped_fraction" in row])
        assert f"of the units of all parameters, {share:.1%} were clipped" in found
        assert f"{losses[0]:.4g} at step {steps[0]} to {losses[-1]:.4g} at step {steps[-1]}" in found
    assert ("not much better than guessing one of 10 classes (10.0%)" in text) == (last["eval_ema/top1"] <= 0.15)
    assert f"report: {page}" in text
    assert NAME in seen.text
    assert [tag for tag, _ in seen.elements].count("img") == 1  # the picture of the layers
    titles = {attributes["aria-label"] for tag, attributes in seen.elements if tag == "svg"}
    assert {"Loss", "Top-1 accuracy", "Images per second", "Steps done", "Units clipped by AGC"} <= titles


def test_curves_end_at_the_values_of_the_run(made: Made) -> None:
    run = read_facts(made.clipped)
    rows = read_rows(made.clipped / "metrics.jsonl")
    by_title = {chart.title: chart for chart in charts_of([run])}
    for title, name, index in (
        ("Loss", "train/loss", 0),
        ("Loss", "eval/loss", 1),
        ("Top-1 accuracy", "eval_ema/top1", 2),
    ):
        (points,) = by_title[title].curves[index].parts
        assert list(points) == [(row["step"], row[name]) for row in rows if name in row]
    done = by_title["Steps done"]
    (points,) = done.curves[0].parts
    assert points[-1][1] == NUM_STEPS
    assert run.account is not None
    unit_s = {"seconds": 1, "minutes": 60}[done.x_label.split()[0]]  # pytest may have imported the package long ago
    # Times are rounded to milliseconds, and this run takes a few seconds only.
    assert points[-1][0] == pytest.approx(run.account.wall_s / unit_s, rel=1e-4, abs=0.002 / unit_s)
    assert [times for times, _ in points] == sorted(times for times, _ in points)


def test_ten_thousand_steps_stay_small(made: Made, copy: Path) -> None:
    rows = read_rows(copy / "metrics.jsonl")
    many = [rows[step % len(rows)] | {"step": step} for step in range(1, 10_001)]
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in many))
    page = report_page(with_labels([read_facts(copy), read_facts(made.plain)]), None)
    assert len(page) < 1_000_000
    assert is_alone(page)
    paths = [attributes["d"] or "" for tag, attributes in Seen(page).elements if tag == "path"]
    assert max(len(re.findall(r"\d+ \d+", path)) for path in paths) <= 2 * 400 + 2


def test_thinned_curves_keep_what_can_be_seen() -> None:
    xs = list(range(10_000))
    values = np.random.default_rng(0).normal(size=10_000)
    values[7000] = 1e6
    ys = [None if x == 5000 else float("nan") if x == 2500 else float(y) for x, y in zip(xs, values, strict=True)]
    parts = thinned(xs, ys, 100)
    assert [part[0][0] for part in parts] == [0, 2501, 5001]
    assert [part[-1][0] for part in parts] == [2499, 4999, 9999]
    assert sum(map(len, parts)) <= 2 * 100 + 9
    kept = {point for part in parts for point in part}
    assert kept <= set(zip(xs, values.tolist(), strict=True))
    assert (7000, 1e6) in kept
    for start in range(0, 2400, 100):  # intervals of the first part
        inside = values[start : start + 99]
        assert {inside.min(), inside.max()} <= {y for _, y in parts[0]}
    assert thinned([1, 2], [1.0, 2.0], 100) == (((1, 1.0), (2, 2.0)),)
    assert thinned([], [], 100) == thinned([1], [None], 100) == ()


def test_several_runs_stand_side_by_side(made: Made, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "recipe.json").write_text((made.plain / "recipe.json").read_text())  # another run of the same name
    text = report(str(made.clipped), str(made.plain), str(copy), capsys=capsys)
    compared = text.partition("Fields in which the recipes differ")[2].partition("\n\n")[0]
    assert re.search(r"^  optim\.clipping +- +null +null$", compared, re.MULTILINE)
    assert re.search(r"^  optim\.clipping\.ratio +0\.05 +- +-$", compared, re.MULTILINE)
    assert re.search(r"^  seed +0 +1 +1$", compared, re.MULTILINE)
    assert f"=== {made.plain.name}\n" in text
    assert f"=== {copy.name}\n" in text
    page = report_page(with_labels([read_facts(made.clipped), read_facts(made.plain)]), None)
    seen = Seen(page)
    assert [tag for tag, _ in seen.elements].count("section") == 2
    colours = {attributes.get("style") for tag, attributes in seen.elements if tag == "path"}
    assert {"--c:var(--c0)", "--c:var(--c1)"} <= colours


def test_runs_of_older_versions_show_what_there_is(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("events.jsonl", "agc.jsonl", "environment.json"):
        (copy / name).unlink()
    text = report(str(copy), capsys=capsys)
    assert "time: not recorded: the run has no events.jsonl, which older versions did not write" in text
    assert "clipping: not recorded: there is no agc.jsonl" in text
    assert "environment: not recorded: there is no environment.json" in text
    assert f"at its last step, step {NUM_STEPS} of {NUM_STEPS}" in text
    assert "goodput" not in text
    assert is_alone(report_page([read_facts(copy)], None))
    (found,) = json.loads(report(str(copy), "--format", "json", capsys=capsys))
    assert (found["time"], found["clipping"], found["environments"]) == (None, None, [])


def test_damage_is_named_and_the_rest_is_shown(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (copy / "events.jsonl").read_text().splitlines()
    (copy / "events.jsonl").write_text("\n".join([lines[0], '{"event": "slept", "at_s": 1}', *lines[1:]]) + "\n")
    (copy / "environment.json").write_text("{")
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join([rows[0], "\0\0", *rows[2:]]) + "\n")
    (copy / "agc.jsonl").write_text('{"step": 1, "layers": {"a": [1, 2]}}\n')
    text = report(str(copy), capsys=capsys)
    assert "events.jsonl, line 2: event = 'slept': it was written by another version of nfnet_flax" in text
    assert "environment.json is damaged" in text
    assert "metrics.jsonl is damaged: line 2 cannot be read" in text
    assert "agc.jsonl, line 1: layers.a = [1, 2]" in text
    assert "Held-out accuracy" in text
    (copy / "recipe.json").write_text('{"name": "half"')
    text = report(str(copy), capsys=capsys)
    assert "recipe.json is damaged" in text
    assert "Held-out accuracy" in text
    assert "recipe.json is damaged" in Seen(report_page([read_facts(copy)], None)).text


def test_a_recipe_file_can_be_the_base(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    text = report(str(made.plain), "--base", str(runs.DIGITS), capsys=capsys)
    table = text.partition("\nRecipe\n")[2].partition("\n\n")[0]
    found = {line.split()[0] for line in table.splitlines()[1:]}
    given = {"num_steps", "log_every_steps", "eval_every_steps", "checkpoint.every_steps", "tensorboard", "seed"}
    given |= {"model.widths", "model.depths", "optim.clipping", "optim.clipping.type", "optim.clipping.ratio"}
    given |= {f"data.{name}" for name in ("batch_size", "num_held_out", "image_size", "eval_image_size")}
    assert given <= found <= given | {"optim.clipping.eps", "optim.clipping.groups"}


def test_a_named_network_is_compared_with_itself_and_with_its_paper(copy: Path) -> None:
    recipe = load_recipe(runs.ROOT / "recipes" / "nfnet_imagenet.py")
    assert name_of(recipe.model) == "nfnet_f0"
    changes = differences_between([defaults_of(recipe), fields_of(recipe)])
    by_field = {change.field: change.values for change in changes}
    assert [field for field in by_field if field.startswith("model.")] == ["model.compute_dtype"]
    assert by_field["data.batch_size"] == ("64", "4096")
    assert by_field["num_classes"] == ("(no default)", "1000")
    save_recipe(recipe, copy / "recipe.json")
    run = read_facts(copy)
    assert run.published == ("nfnet_f0", PUBLISHED["nfnet_f0"])
    page = Seen(report_page([run], None)).text
    assert "published for nfnet_f0" in page
    assert "83.6%" in page
    assert "96.8%" in page
    assert "arXiv 2102.06171, table 3" in page
    levels = {chart.title: chart.level for chart in charts_of([run])}
    assert levels["Top-1 accuracy"] == ("published", 0.836)
    assert levels["Loss"] is None
    save_recipe(dataclasses.replace(recipe, num_classes=999), copy / "recipe.json")
    assert read_facts(copy).published is None
    assert PUBLISHED_TOP1_PERCENT["efficientnet_b7"] == 84.3


def test_an_environment_that_changed_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((copy / "environment.json").read_text())
    write_json(copy / "environment-until-step-6.json", facts | {"jax": "0.1"})
    text = report(str(copy), capsys=capsys)
    assert f"changed after step 6: jax: 0.1 -> {facts['jax']}" in text


def test_a_run_in_a_bucket(made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with stores.store("gs") as url:
        stores.use(monkeypatch, "gs", url)
        place = BucketUrl("gs", stores.BUCKET, "runs/a")
        folder = BucketFolder(place)
        for name in ("recipe.json", "input.json", "events.jsonl", "metrics.jsonl", "agc.jsonl", "environment.json"):
            folder.put(name, (made.clipped / name).read_bytes())
        before = folder.files()
        (here,) = json.loads(report(str(made.clipped), "--format", "json", capsys=capsys))
        (there,) = json.loads(report(str(place), "--format", "json", capsys=capsys))
        assert folder.files() == before
        assert there.pop("place") == str(place)
        del here["place"]
        assert there == here
        folder.put("environment.json", b"{")
        text = report(str(place), capsys=capsys)
        assert f"{place}/environment.json is damaged" in text
        assert cli.main(["agc", str(place)]) == EXIT_DONE
        assert "head.bias" in capsys.readouterr().out


def test_bad_arguments_are_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "empty").mkdir()
    run = str(made.clipped)
    for words, said in (
        (["report"], "runs"),
        (["report", str(tmp_path / "none")], "there is no such folder: give the folder of a run"),
        (["report", run, str(tmp_path / "empty")], "the folder holds no run (no recipe.json)"),
        (["report", run, "--out", str(tmp_path / "there.html")], "exists already"),
        (["report", run, "--out", str(tmp_path / "report")], "give a name that ends in .html, .htm, .json, .txt"),
        (["report", run, "--out", str(made.clipped / "a.html")], "lies in the folder of what the command reads"),
        (["report", run, "--out", str(tmp_path / "no" / "a.html")], "there is no folder"),
        (["report", run, "--base", str(tmp_path / "no.py")], "recipe file"),
        (["agc", str(made.plain)], "the run does not clip by AGC (optim.clipping is none)"),
        (["agc", run, "--out", str(tmp_path / "a.gif")], "give a name that ends in .png or .svg"),
        (["agc", run, "--out", str(made.clipped / "a.png")], "lies in the folder of what the command reads"),
        (["agc", str(tmp_path / "empty")], "the folder holds no run"),
    ):
        capsys.readouterr()
        assert cli.main(words) == EXIT_BAD_INPUT, words
        assert said in capsys.readouterr().err, words
    assert (tmp_path / "there.html").read_text() == "mine"
    assert cli.main(["report", run, "--out", str(tmp_path / "there.html"), "--overwrite"]) == EXIT_DONE
    assert "<!DOCTYPE html>" in (tmp_path / "there.html").read_text()


def test_layers_are_summarised_as_numpy_does(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (made.clipped / "agc.jsonl").read_text().splitlines()]
    assert len(rows) > 1
    assert cli.main(["agc", str(made.clipped), "--format", "json"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["lambda"], found["steps"]) == (0.05, [row["step"] for row in rows])
    names = [layer["name"] for layer in found["layers"]]
    assert sorted(names) == sorted(rows[0]["layers"])
    for layer in found["layers"]:
        values = np.array([row["layers"][layer["name"]] for row in rows])
        assert layer["mean_fraction"] == pytest.approx(values[:, 0].mean())
        assert layer["median_ratio"] == pytest.approx(np.median(values[:, 1]))
        assert layer["largest_ratio"] == pytest.approx(values[:, 2].max())
    assert [place_of(name)[0] for name in names] == sorted(
        (place_of(name)[0] for name in names),
        key=["stem", "stage 0 block 0", "final_conv", "head"].index,
    )
    assert cli.main(["agc", str(made.clipped)]) == EXIT_DONE
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 2 + len(names)
    assert f"{found['layers'][0]['mean_fraction']:.1%}" in text


def test_layers_are_in_the_order_of_the_network() -> None:
    names = [
        "final_conv.bias",
        "head.bias",
        "stages.0.0.a.bias",
        "stages.0.10.a.bias",
        "stages.0.2.a.bias",
        "stem.0.gain",
    ]
    assert in_order(names) == (names[5], names[2], names[4], names[3], names[0], names[1])
    assert place_of("stages.1.2.squeeze_excite.expand.bias") == ("stage 1 block 2", "squeeze_excite.expand.bias")
    assert place_of("gain") == ("gain", "")


def test_the_picture_shows_layers_and_steps(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("png", "svg"):
        assert cli.main(["agc", str(made.clipped), "--out", str(tmp_path / f"agc.{kind}")]) == EXIT_DONE
    assert f"picture: {tmp_path / 'agc.svg'}" in capsys.readouterr().out
    with Image.open(tmp_path / "agc.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    lowest, highest = (68, 1, 84), (253, 231, 37)  # viridis: nothing and everything of a parameter was clipped
    records = read_layers(made.clipped / "agc.jsonl")
    assert {0.0, 1.0} <= set(records.fraction.ravel())
    for colour in (lowest, highest):
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) <= 1).sum() > 500
    root = xml.etree.ElementTree.parse(tmp_path / "agc.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = (tmp_path / "agc.svg").read_text()
    for label in ("stage 0 block 0   conv0.bias", "squeeze_excite.expand.bias", "share of clipped units"):
        assert f"<!-- {label} -->" in text or f"<!--    {label} -->" in text, label


def test_what_a_picture_needs_is_named(made: Made, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    from nfnet_flax.cli import agc

    with pytest.raises(ConfigError, match=re.escape("pip install 'nfnet_flax[plots]'")):
        agc.run([str(made.clipped), "--out", str(copy / "a.png")])
    (copy / "agc.jsonl").unlink()
    with pytest.raises(
        ConfigError, match=r"no clipping is on record in agc\.jsonl: the run has just begun, or had fewer"
    ):
        agc.run([str(copy)])


def test_lines_of_layers_that_were_cut_short(made: Made, copy: Path) -> None:
    whole = read_layers(copy / "agc.jsonl")
    lines = (copy / "agc.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "agc.jsonl").write_bytes(lines[0][:50] + b"".join(lines[1:]) + lines[-1])  # the last step twice
    found = read_layers(copy / "agc.jsonl")
    assert found.unread_lines == (1,)
    assert found.steps.tolist() == whole.steps.tolist()[1:]
    np.testing.assert_array_equal(found.fraction, whole.fraction[:, 1:])


def test_labels_are_different(made: Made) -> None:
    run = read_facts(made.plain)
    twice: list[RunFacts] = with_labels([run, run])
    assert [one.label for one in twice] == [f"{made.plain.name} [1]", f"{made.plain.name} [2]"]
    place = made.plain.parent
    others = [dataclasses.replace(run, place=f"{place}/{name}") for name in ("a/x", "b/x", "b/y")]
    assert [one.label for one in with_labels(others)] == ["a/x", "b/x", "y"]
