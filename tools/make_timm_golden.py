"""Writes `tests/goldens/timm_*.npz`: outputs of timm's networks (PyTorch, float64) for given parameters.

`pip install torch timm`, then `python tools/make_timm_golden.py [--out FOLDER]`. The parameters are computed from the
CRC of timm's names, also by the tests that read the files, so only names, shapes and outputs are stored.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np

IMAGE_SIZE, BATCH, SEED = 64, 2, 0
MODELS = {
    "timm_nfnet_f0": "dm_nfnet_f0",
    "timm_efficientnet_b0": "tf_efficientnet_b0",
    "timm_test_nfnet": "test_nfnet",
    "timm_eca_nfnet_l0": "eca_nfnet_l0",
    "timm_nf_regnet_b1": "nf_regnet_b1",
    "timm_nf_resnet26": "nf_resnet26",
    "timm_nf_seresnet26": "nf_seresnet26",
}
"""Name of the file -> timm's name of the network."""


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a parameter, which is different for every name and not constant."""
    n = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "weight" and len(shape) > 1:
        return np.asarray(n / np.sqrt(np.prod(shape[1:])), np.float32)
    if leaf == "running_var":
        return np.asarray(1 + 0.1 * np.abs(n), np.float32)
    if leaf in ("gain", "weight"):
        return np.asarray(1 + 0.1 * n, np.float32)
    return np.asarray(0.5 + 0.1 * n if leaf == "skipinit_gain" else 0.1 * n, np.float32)


def images() -> np.ndarray:
    """The input images, (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3) float32."""
    shape = (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3)
    return np.random.Generator(np.random.PCG64(SEED)).standard_normal(shape, dtype=np.float32)


def make(timm_name: str, out: Path) -> None:
    """Computes and writes one file."""
    import timm
    import torch

    model = timm.create_model(timm_name, pretrained=False).double().eval()
    shapes = {
        name: tuple(value.shape) for name, value in model.state_dict().items() if not name.endswith("batches_tracked")
    }
    filled = {name: torch.from_numpy(fill(name, shape)) for name, shape in shapes.items()}
    model.load_state_dict(filled, strict=False)
    with torch.no_grad():
        final = model.forward_features(torch.from_numpy(images()).double().permute(0, 3, 1, 2))
        logits, features = model.forward_head(final).numpy(), model.forward_head(final, pre_logits=True).numpy()
    np.savez_compressed(
        out,
        logits=logits,
        features=features,
        params=json.dumps([[name, list(shape)] for name, shape in shapes.items()]),
        meta=json.dumps({"model": timm_name, "timm": timm.__version__, "torch": torch.__version__.split("+")[0]}),
    )
    print(
        f"{out.name}: {timm_name}, {len(shapes)} arrays, timm {timm.__version__}, max |logit| {abs(logits).max():.4f}"
    )


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "goldens")
    folder = parser.parse_args().out
    for name, timm_name in MODELS.items():
        make(timm_name, folder / f"{name}.npz")


if __name__ == "__main__":
    main()
