"""Times exported ONNX files in onnxruntime against timm's own ONNX export of the same network with the same weights.

`pip install 'nfnet_flax[export,bench]' onnxscript`, then `python tools/bench_export.py [NAME ...]`. Both files run
alternately in one process on `--threads` threads; each timed call follows an untimed one of the same file. Printed are
the median times of a call with the median of the ratios of calls that follow one another, and the shortest times with
their ratio, which other work on the machine disturbs less. Both take (N, C, H, W).
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))

import nfnet_flax
from nfnet_flax.models import IMAGE_SIZES, NFNetConfig, build_model, model_config
from nfnet_flax.models.params import merge, split
from nfnet_flax.weights import TIMM_FORM, save_weights
from nfnet_flax.weights.timm import timm_arrays
from tools.compare_with_timm import timm_name
from tools.make_timm_golden import fill

NETWORKS = ("eca_nfnet_l0", "nfnet_f0", "timm_nf_regnet_b1", "timm_nf_resnet50")


def export_theirs(name: str, path: Path, size: int, *, dynamo: bool) -> dict[str, np.ndarray]:
    """Writes timm's export; returns the weights."""
    import timm
    import torch
    from timm.utils.onnx import onnx_export

    theirs = timm_name(name)
    assert theirs is not None, f"timm has no {name}"
    model = timm.create_model(theirs, pretrained=False, exportable=True).eval()
    tensors = {key: fill(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    onnx_export(model, str(path), batch_size=2, input_size=(3, size, size), use_dynamo=dynamo, check=False)
    return tensors


def export_ours(name: str, folder: Path, size: int, tensors: dict[str, np.ndarray]) -> Path:
    """Writes our export of the same weights."""
    form = TIMM_FORM if isinstance(model_config(name), NFNetConfig) else {}
    model = nnx.eval_shape(lambda: build_model(model_config(name, **form), num_classes=1000, rngs=nnx.Rngs(0)))
    arrays = {key: jnp.asarray(value) for key, value in timm_arrays(model, tensors).items()}
    save_weights(folder / "ours.safetensors", merge(split(model)[0], arrays, {}), source="random", parameters="raw")
    written = nfnet_flax.export_model(folder / "ours.safetensors", folder, to="onnx", image_size=size, layout="nchw")
    return written.path


def measure(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Prints rows for one network."""
    import onnxruntime

    size = options.image_size or IMAGE_SIZES[name].test
    theirs = folder / "theirs.onnx"
    tensors = export_theirs(name, theirs, size, dynamo=options.dynamo)
    ours = export_ours(name, folder, size, tensors)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    sessions = [onnxruntime.InferenceSession(path, settings) for path in (ours, theirs)]
    del tensors
    gc.collect()
    for batch in options.batches:
        images = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
        calls = [(session, {session.get_inputs()[0].name: images}) for session in sessions]
        results = [session.run(None, given)[0] for session, given in calls]
        difference = np.max(np.abs(results[0] - results[1])) / np.max(np.abs(results[1]))
        times: list[list[float]] = [[], []]
        for round_number in range(options.rounds):
            for which in (0, 1) if round_number % 2 else (1, 0):
                # The threads of a session spin for a while after a call, which slows down a call of another session.
                calls[which][0].run(None, calls[which][1])
                start = time.perf_counter()
                calls[which][0].run(None, calls[which][1])
                times[which].append(1000 * (time.perf_counter() - start))
        ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
        medians = [statistics.median(part) for part in times]
        lowest = [min(part) for part in times]
        print(
            f"{name:<20}{size} px, batch {batch}: ours {medians[0]:.1f} ms, timm's {medians[1]:.1f} ms, ratio "
            f"{ratio:.3f}; shortest {lowest[0]:.1f} and {lowest[1]:.1f} ms, ratio {lowest[0] / lowest[1]:.3f}; results "
            f"differ by {difference:.1e}",
            flush=True,
        )


def main() -> None:
    """Measures the networks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=NETWORKS, help="names of networks")
    parser.add_argument("--image-size", type=int, help="height and width in pixels; by default as published")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="numbers of images in a call")
    parser.add_argument("--rounds", type=int, default=15, help="number of calls of each file")
    parser.add_argument("--threads", type=int, default=2, help="number of threads of onnxruntime")
    parser.add_argument("--dynamo", action="store_true", help="timm's export by torch.export, not by TorchScript")
    options: Any = parser.parse_args()
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), options)
        gc.collect()


if __name__ == "__main__":
    main()
