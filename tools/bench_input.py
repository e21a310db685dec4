"""Compares the speed of the training input with torchvision in a PyTorch DataLoader and with tf.data, on the same
JPEGs, and of the storages that the package reads with one another.

`python tools/bench_input.py [--cores 2] [--rounds 7]` (extras `bench`, `parquet`) writes a folder of JPEGs,
500x375, quality 90. Each contestant reads each image, draws the random resized crop, flips, resizes to 224 px and makes
batches of uint8. Each runs in its own process, bound to the same cores; all are started and warmed up first, then they
take turns for `--rounds` rounds. The table shows medians, and medians of the ratios of ours to each contestant within a
round. Contestants that cannot be imported are named and left out. Ratios are only meaningful on an otherwise idle
machine: TensorFlow runs more threads than ours, and so gets a larger share of a busy machine. `--only ours` leaves the
others out. Two more tables compare the kinds of storage: the pipeline, and images that are read at random and not
decoded.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

HEIGHT, WIDTH, QUALITY = 375, 500, 90
NUM_CLASSES = 4
Pass = Callable[[int], int]
"""Function of the number of the round that reads all images once, and returns how many it read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options that are the same for all contestants."""

    folder: str
    num_images: int
    image_size: int
    batch_size: int
    cores: int
    storages: str
    """Folder of the same images as ArrayRecord, Parquet and tar files."""


def write_images(folder: Path, num_images: int) -> None:
    """Writes `folder/train/<class>/<number>.jpg`: random textures with detail at every scale, as photographs have."""
    import cv2
    from PIL import Image

    for split, count in (("train", num_images), ("val", NUM_CLASSES)):
        for index in range(count):
            rng = np.random.default_rng(index)
            texture = np.full((HEIGHT, WIDTH, 3), 120, np.float32)
            for octave in range(2, 9):
                coarse = rng.standard_normal((max(2, 3 * 2**octave // 4), 2**octave, 3), np.float32)
                grey = coarse.mean(axis=2, keepdims=True)
                strength = 60 * 0.62 ** (octave - 2)
                texture += strength * cv2.resize(0.7 * grey + 0.3 * coarse, (WIDTH, HEIGHT))
            path = folder / split / f"class_{index % NUM_CLASSES}" / f"{index:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(texture.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def ours(options: Options, *, published: bool, storage: str = "image folder") -> Pass:
    """This package's pipeline, in threads; with `published`, also RandAugment (4 layers) and mixing."""
    from nfnet_flax.data.augment_config import CropAugment
    from nfnet_flax.data.config import DataConfig
    from nfnet_flax.data.mixing_config import MixingConfig, RandAugmentConfig
    from nfnet_flax.data.pipeline import open_split, train_batches
    from tools.storages import storages

    config = DataConfig(
        source=storages(Path(options.folder), Path(options.storages))[storage],
        image_size=options.image_size,
        batch_size=options.batch_size,
        augment=CropAugment(),
        randaugment=RandAugmentConfig() if published else None,
        mixing=MixingConfig() if published else None,
        num_threads=options.cores,
        prefetch_batches=2 * options.cores,
    )
    source = open_split(config, "train")
    num_steps = options.num_images // options.batch_size

    def run(round_index: int) -> int:
        first = round_index * num_steps
        batches = train_batches(
            config,
            source,
            seed=0,
            start_step=first,
            num_steps=first + num_steps,
            process_index=0,
            num_processes=1,
        )
        try:
            return sum(len(batch["image"]) for batch in batches)
        finally:
            batches.close()

    return run


class TorchvisionImages:
    """A map-style dataset of the training files, like `torchvision.datasets.ImageFolder`."""

    def __init__(self, options: Options, *, decoder: str, interpolation: str) -> None:
        from torchvision.transforms import v2

        self.paths = sorted(str(path) for path in Path(options.folder, "train").rglob("*.jpg"))
        self.decoder = decoder
        crop = v2.RandomResizedCrop(options.image_size, interpolation=v2.InterpolationMode(interpolation))
        steps = [crop, v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([*steps, v2.PILToTensor()] if decoder == "pillow" else steps)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        if self.decoder == "pillow":
            from PIL import Image

            with Image.open(self.paths[index]) as image:
                return self.transform(image.convert("RGB"))
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        return self.transform(decode_jpeg(read_file(self.paths[index]), mode=ImageReadMode.RGB))


def torchvision(options: Options, *, decoder: str, interpolation: str) -> Pass:
    """torchvision's transforms in a DataLoader of one worker process per core."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        TorchvisionImages(options, decoder=decoder, interpolation=interpolation),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.cores,
        persistent_workers=True,
    )
    return lambda round_index: sum(len(batch) for batch in loader)


def tf_data(options: Options) -> Pass:
    """The published decode-and-crop: TensorFlow decodes only the crop, with the fast DCT; bicubic, not antialiased."""
    import tensorflow as tf

    def load(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            tf.zeros([1, 0, 4]),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        crop = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        image = tf.image.random_flip_left_right(tf.image.decode_and_crop_jpeg(encoded, crop, channels=3))
        image = tf.image.resize(image, [options.image_size] * 2, tf.image.ResizeMethod.BICUBIC)
        return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)

    paths = sorted(str(path) for path in Path(options.folder, "train").rglob("*.jpg"))
    dataset = (
        tf.data.Dataset.from_tensor_slices(paths)
        .shuffle(len(paths))
        .map(load, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(options.batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )
    threads = tf.data.Options()
    threads.threading.private_threadpool_size = options.cores
    dataset = dataset.with_options(threads)
    return lambda round_index: sum(len(batch) for batch in dataset.as_numpy_iterator())


BICUBIC, BILINEAR = "bicubic", "bilinear"
CONTESTANTS: dict[str, Callable[[Options], Pass]] = {
    "ours": lambda options: ours(options, published=False),
    "torchvision, PIL, bicubic": lambda options: torchvision(options, decoder="pillow", interpolation=BICUBIC),
    "torchvision, PIL, bilinear": lambda options: torchvision(options, decoder="pillow", interpolation=BILINEAR),
    "torchvision v2, tensors, bicubic": lambda options: torchvision(options, decoder="own", interpolation=BICUBIC),
    "torchvision v2, tensors, bilinear": lambda options: torchvision(options, decoder="own", interpolation=BILINEAR),
    "tf.data, decode_and_crop, bicubic": tf_data,
    "ours, with RandAugment and mixing": lambda options: ours(options, published=True),
    "ours, from ArrayRecord": lambda options: ours(options, published=False, storage="ArrayRecord"),
    "ours, from Parquet": lambda options: ours(options, published=False, storage="Parquet"),
    "ours, from Parquet, compressed": lambda options: ours(options, published=False, storage="Parquet, compressed"),
    "ours, from tar files": lambda options: ours(options, published=False, storage="tar files"),
}


def serve(name: str, options: Options) -> None:
    """A contestant's process: warms up, prints `ready`, then answers each line of its input with images/s of one
    pass."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    try:
        run = CONTESTANTS[name](options)
    except ImportError as error:
        print(f"absent: {error}", flush=True)
        return
    run(0)
    print("ready", flush=True)
    for round_index, _ in enumerate(sys.stdin, start=1):
        started = time.perf_counter()
        count = run(round_index)
        print(count / (time.perf_counter() - started), flush=True)


def start(name: str, options: Options) -> subprocess.Popen[str]:
    """Starts a contestant's process with the same Python interpreter."""
    given = [f"--{field.replace('_', '-')}={value}" for field, value in dataclasses.asdict(options).items()]
    quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, __file__, *given, "--contestant", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet},
    )


def ask(process: subprocess.Popen[str], request: str | None) -> str:
    """Sends `request` to a contestant, if given, and returns its next line; empty if it has died."""
    assert process.stdin is not None
    assert process.stdout is not None
    if request is not None:
        process.stdin.write(request + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def compare(options: Options, rounds: int, only: str) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Images per second of each round of each contestant, and why the others did not run."""
    processes, missing = {}, {}
    try:
        for name in [name for name in CONTESTANTS if name.startswith(only)]:
            processes[name] = start(name, options)
            answer = ask(processes[name], None)
            if answer != "ready":
                missing[name] = answer or "failed; its error is printed above"
        rates: dict[str, list[float]] = {name: [] for name in processes if name not in missing}
        for _ in range(rounds):
            for name, values in rates.items():
                values.append(float(ask(processes[name], "next")))
        return rates, missing
    finally:
        for process in processes.values():
            process.communicate()  # closes the process's input, which ends it


def main() -> None:
    """Prints the table; with `--contestant`, runs the process of that contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="number of cores")
    parser.add_argument("--rounds", type=int, default=7, help="number of timed passes of each contestant")
    parser.add_argument("--num-images", type=int, default=1024, help="number of JPEGs, which each pass reads once")
    parser.add_argument("--image-size", type=int, default=224, help="height and width of the output, in pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--folder", help="folder of JPEGs in train/<class>/ and val/<class>/; default: generated")
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="beginning of the names of the contestants that run, such as ours")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the table there, as docs/figures/ has them"
    )
    parser.add_argument("--storages", default="", help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    contestant, rounds, only, json = (arguments.pop(name) for name in ("contestant", "rounds", "only", "json"))
    if contestant:
        serve(contestant, Options(**arguments))
        return
    from tools.figures import Row, write_figures
    from tools.storages import print_of_array_record, rows_per_second, write_storages

    with tempfile.TemporaryDirectory() as folder:
        if arguments["folder"] is None:
            arguments["folder"] = f"{folder}/images"
            write_images(Path(folder, "images"), arguments["num_images"])
        arguments["storages"] = f"{folder}/storages"
        write_storages(Path(arguments["folder"]), Path(folder, "storages"))
        options = Options(**arguments)
        sizes = [path.stat().st_size for path in Path(options.folder, "train").rglob("*.jpg")]
        print(
            f"{len(sizes)} JPEGs of {statistics.mean(sizes) / 1e3:.0f} kB, {options.image_size} px, batch "
            f"{options.batch_size}, {options.cores} cores, {rounds} rounds"
        )
        rates, missing = compare(options, rounds, only)
        of_storages = rows_per_second(
            Path(options.folder), Path(options.storages), num_threads=options.cores, num_rounds=rounds
        )
    print(f"{'':<36}{'images/s':>9}{'per core':>10}{'ours is faster by':>19}")
    rows: list[Row] = []
    for name, values in rates.items():
        median = statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], values, strict=True))
        print(f"{name:<36}{median:>9.0f}{median / options.cores:>10.0f}{ratio:>18.2f}x")
        rows.append({"pipeline": name, "images/s": round(median), "ours is faster by": f"{ratio:.2f}x"})
    if json:
        write_figures(json, rows)
    for name, reason in missing.items():
        print(f"{name:<36}not run: {reason}")
    began = "ours, from "
    print_of_array_record("from storage to batches", {n.removeprefix(began): v for n, v in rates.items() if began in n})
    print_of_array_record(f"read at random, {options.cores} threads", of_storages)


if __name__ == "__main__":
    main()
