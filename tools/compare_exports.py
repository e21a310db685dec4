"""Compares exported networks of real size with the trained ones: onnxruntime, OpenVINO, and StableHLO alone.

`pip install 'nfnet_flax[export]' openvino`, then `python tools/compare_exports.py [NAME ...]`. Weights and images are
random, and no array is uniform. Each result is the largest difference on batches of 1, 3 and 16 images, as a share of
the largest logit of the trained network. StableHLO is loaded in a process that cannot import this package. Ends with
exit code 1 if a difference is above 1e-4 (StableHLO: 1e-5).
"""

import argparse
import collections
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import nfnet_flax
from nfnet_flax.export.options import ExportOptions, network_for
from nfnet_flax.export.verify import Call, relative_difference, trained
from nfnet_flax.models import IMAGE_SIZES, model_config
from nfnet_flax.weights import read_weights, save_weights
from tests.networks import lifelike

NETWORKS = ("eca_nfnet_l0", "nfnet_f0", "nf_regnet_b1", "nf_resnet50", "resnet50", "efficientnet_b0")
_BATCHES = (1, 3, 16)
_ALONE = """
import sys
sys.modules["nfnet_flax"] = None
sys.path.insert(0, sys.argv[1])
import numpy as np
from net_stablehlo import predict
images = np.load(sys.argv[1] + "/images.npy")
np.save(sys.argv[1] + "/got.npy", np.concatenate([predict(part) for part in np.split(images, [1, 4])]))
"""


def compare(name: str, folder: Path, image_size: int | None) -> bool:
    """Prints a row for one network; returns whether all differences are small enough."""
    size = image_size or IMAGE_SIZES[name].test
    model = lifelike(model_config(name), 1000)
    path = folder / "net.safetensors"
    save_weights(path, model, source="random", parameters="raw", overwrite=True)
    exported = network_for(name, *read_weights(path), ExportOptions(to="onnx", image_size=size))
    images = np.random.default_rng(1).standard_normal((sum(_BATCHES), size, size, 3), np.float32)
    call = trained(exported)
    wanted = np.concatenate([call(part) for part in np.split(images, 5)])  # four at a time, so that it is compiled once
    del exported, model, call
    gc.collect()
    start = time.perf_counter()
    onnx_path = nfnet_flax.export_model(path, folder, to="onnx", image_size=size, overwrite=True).path
    told = f"{name:<16}{size} px, onnx in {time.perf_counter() - start:.0f} s"
    worst = {}
    for kind, make in (("onnxruntime", onnxruntime_call), ("OpenVINO", openvino_call)):
        run = make(onnx_path)
        parts = [run(part) for part in np.split(images, np.cumsum(_BATCHES)[:-1])]
        ends = np.split(wanted, np.cumsum(_BATCHES)[:-1])
        worst[kind] = [relative_difference(got, want) for got, want in zip(parts, ends, strict=True)]
    counts = operators(onnx_path)
    np.save(folder / "images.npy", images)
    nfnet_flax.export_model(path, folder, to="stablehlo", image_size=size, overwrite=True)
    subprocess.run([sys.executable, "-I", "-c", _ALONE, str(folder)], check=True)
    worst["StableHLO"] = [relative_difference(np.load(folder / "got.npy"), wanted)]
    for kind, differences in worst.items():
        told += f"; {kind} " + ", ".join(f"{difference:.1e}" for difference in differences)
    print(f"{told}\n    {' '.join(f'{operator} {count}' for operator, count in counts.most_common())}", flush=True)
    return all(max(found) <= (1e-5 if kind == "StableHLO" else 1e-4) for kind, found in worst.items())


def onnxruntime_call(path: Path) -> Call:
    """The network in onnxruntime."""
    from nfnet_flax.export.onnx_file import call_onnx

    return call_onnx(path)


def openvino_call(path: Path) -> Call:
    """The network in OpenVINO, in float32 on the CPU."""
    import openvino

    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: np.asarray(model([images])[0])


def operators(path: Path) -> "collections.Counter[str]":
    """How many nodes there are of each operator."""
    import onnx

    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def main() -> None:
    """Compares the networks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=NETWORKS, help="names of networks")
    parser.add_argument("--image-size", type=int, help="height and width in pixels; by default as published")
    options: Any = parser.parse_args()
    failed = []
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            if not compare(name, Path(folder), options.image_size):
                failed.append(name)
        gc.collect()
    print(f"{len(options.names) - len(failed)} of {len(options.names)} agree")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
