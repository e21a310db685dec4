"""Compares `nfnet eval --weights` with timm's own evaluation (PyTorch) on the same image files, preprocessing included.

`pip install torch torchvision timm`, then `python tools/compare_eval_with_timm.py [NAME ...]`. It makes JPEG files of
various sizes in class folders, and for each network a folder of weights as timm writes it, with the parameters of
`make_timm_golden.fill`, which are random and not uniform. Then it evaluates the folder by the command `nfnet eval` and
by timm (`create_transform`, `create_model`), and prints how far they differ. Ends with exit code 1 if logits differ by
more than `--tolerance`, relative to the largest logit, if any top-1 differs, or if a prepared image differs at all
by more than `--grey-levels`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from nfnet_flax import cli
from nfnet_flax.data.source_config import FolderSource
from nfnet_flax.data.transforms import preprocess
from nfnet_flax.training.evaluating import evaluate_weights
from nfnet_flax.weights import open_weights
from tools.make_timm_golden import fill

NUM_CLASSES = 10
GOLDEN_IMAGES, GOLDEN_PX, GOLDEN_ROWS = 6, 260, 5
"""Number of images in the golden file, their largest side, and the distance between the rows of pixels it contains."""
NUM_PX = 700
"""Largest side of the images otherwise."""
_SUBSAMPLINGS = (0, 2)  # 4:4:4 and 4:2:0


def photo(rng: np.random.Generator, most: int) -> Image.Image:
    """An image with the coarse and the fine structure of a photo, of a random size."""
    width, height = (int(value) for value in rng.integers(120, most, 2))
    parts: list[np.ndarray] = []
    for cells, strength in ((3, 90.0), (12, 50.0), (60, 25.0)):
        coarse = rng.standard_normal((cells, cells, 3)) * strength + 128
        enlarged = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((width, height))
        parts.append(np.asarray(enlarged, np.float64) - 128)
    noise = rng.standard_normal((height, width, 3)) * 8
    return Image.fromarray(np.clip(sum(parts) + noise + 128, 0, 255).astype(np.uint8))


def make_images(folder: Path, count: int, seed: int, most: int = NUM_PX) -> None:
    """Writes `count` JPEG files into class folders."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        place = folder / f"class_{number % NUM_CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        quality, subsampling = int(rng.integers(70, 97)), _SUBSAMPLINGS[number // NUM_CLASSES % 2]
        photo(rng, most).save(place / f"image_{number:05d}.jpg", quality=quality, subsampling=subsampling)


def timm_network(name: str) -> Any:
    """One of timm's networks for `NUM_CLASSES` classes, with random parameters in float32."""
    import timm
    import torch

    model = timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES).eval()
    tensors = {key: torch.from_numpy(fill(key, tuple(value.shape))) for key, value in model.state_dict().items()}
    model.load_state_dict(tensors)
    return model


def write_folder(model: Any, folder: Path) -> None:
    """Writes weights and configuration by timm, with the names of the classes."""
    from timm.models._hub import save_for_hf

    names = [f"class_{number}" for number in range(NUM_CLASSES)]
    save_for_hf(model, str(folder), model_config={"label_names": names}, safe_serialization=True)


def by_timm(model: Any, paths: list[Path]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits in float32, and the images as timm's transforms prepare them, in grey levels (H, W, 3)."""
    import timm
    import torch

    config = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    transform = timm.data.create_transform(**config)
    mean, std = (np.asarray(config[key])[:, None, None] for key in ("mean", "std"))
    logits, images = [], []
    for path in paths:
        with Image.open(path) as image, torch.no_grad():
            prepared = transform(image.convert("RGB"))
            logits.append(model(prepared[None])[0].numpy())
        grey = (prepared.numpy().astype(np.float64) * std + mean) * 255
        images.append(grey.transpose(1, 2, 0))
    return np.stack(logits), images


def by_us(weights: Path, images: Path, paths: list[Path]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Logits and top-1 in the order of `paths`, and the prepared images in grey levels."""
    found = evaluate_weights(weights, FolderSource(root=str(images), eval="."), keeps_logits=True)
    rows = found.predictions
    row_of = {found.labelled.source.describe(int(index)): row for row, index in enumerate(rows.index)}
    order = [row_of[str(path)] for path in paths]
    info = open_weights(weights)[0].preprocessing
    assert info is not None
    assert rows.logits is not None
    settings = {**vars(info), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    prepared = [preprocess([path.read_bytes()], **settings)[0] for path in paths]
    return rows.logits[order], rows.best[order, 0], prepared


def write_golden(file: Path) -> None:
    """Writes a few images, with the logits and the pixels that timm computes from them, for a test without PyTorch."""
    name = "test_nfnet"
    model = timm_network(name)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images", GOLDEN_IMAGES, 1, GOLDEN_PX)
        paths = sorted(Path(folder).glob("images/*/*.jpg"), key=lambda path: path.name)
        write_folder(model, Path(folder) / name)
        logits, images = by_timm(model, paths)
        np.savez_compressed(
            file,
            allow_pickle=False,
            names=[f"{path.parent.name}/{path.name}" for path in paths],
            logits=logits,
            pixels=np.round(images).astype(np.uint8)[:, ::GOLDEN_ROWS],
            config=(Path(folder) / name / "config.json").read_text(),
            **{path.name: np.frombuffer(path.read_bytes(), np.uint8) for path in paths},
        )


def compare(name: str, folder: Path, images: Path, options: argparse.Namespace) -> bool:
    """Compares one network; returns whether both agree."""
    model, weights, table = timm_network(name), folder / name, folder / f"{name}.json"
    write_folder(model, weights)
    root = ["--data.source.root", str(images), "--data.source.eval", "."]
    code = cli.main(["eval", "--weights", str(weights), *root, "--json", str(table), "--overwrite"])
    if code != 0:
        return False
    paths = sorted(images.glob("*/*.jpg"), key=lambda path: path.name)
    labels = np.asarray([int(path.parent.name.rpartition("_")[2]) for path in paths])
    wanted, theirs = by_timm(model, paths)
    logits, best, ours = by_us(weights, images, paths)
    absolute, size = float(np.max(np.abs(logits - wanted))), float(np.max(np.abs(wanted)))
    differences = [np.abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    mean, largest = float(np.mean([each.mean() for each in differences])), float(max(map(np.max, differences)))
    top1, same = float(np.mean(wanted.argmax(axis=1) == labels)), int(np.sum(best == wanted.argmax(axis=1)))
    printed = json.loads(table.read_text())[0]["metrics"]["top1"]
    print(f"{name}: {len(paths)} images of {ours[0].shape[0]} px")
    print(f"  logits: differ by at most {absolute:.1e}; the largest is {size:.3f} ({absolute / size:.1e} of it)")
    print(f"  best class: the same for {same} of {len(paths)}; {len(set(best.tolist()))} classes occur")
    print(f"  top-1: timm {top1:.4f}, nfnet eval {printed:.4f}")
    print(f"  prepared images: differ by {mean:.1e} grey levels on average, {largest:.1e} at most", flush=True)
    is_same = same == len(paths) and printed == top1
    return is_same and absolute <= size * options.tolerance and largest <= options.grey_levels


def main() -> None:
    """Compares the networks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=["test_nfnet", "eca_nfnet_l0"], help="timm's names")
    parser.add_argument("--num-images", type=int, default=200, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference of logits")
    parser.add_argument("--grey-levels", type=float, default=1e-3, help="largest difference of prepared images")
    parser.add_argument("--golden", type=Path, help="write tests/goldens/timm_eval.npz instead of comparing")
    options = parser.parse_args()
    if options.golden is not None:
        write_golden(options.golden)
        return
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder).resolve() / "images"
        make_images(images, options.num_images, options.seed)
        failed = [name for name in options.names if not compare(name, Path(folder).resolve(), images, options)]
    print(f"{len(options.names) - len(failed)} of {len(options.names)} agree")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
