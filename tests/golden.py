"""Reads the goldens; `nfnet_flax/claims/goldens.py` fills parameters the way they were filled for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nfnet_flax.claims.goldens import TINY as TINY
from nfnet_flax.claims.goldens import fill as fill
from nfnet_flax.claims.goldens import filled as filled
from nfnet_flax.claims.goldens import initial_statistics as initial_statistics
from nfnet_flax.claims.goldens import input_images

FOLDER = Path(__file__).parent / "goldens"


def load(name: str) -> dict[str, Any]:
    """Arrays of a golden, with `params` and `meta` parsed."""
    with np.load(FOLDER / f"{name}.npz") as file:
        golden = dict(file)
    return golden | {key: json.loads(str(golden[key])) for key in ("params", "meta", "metrics")}


def images(meta: dict[str, Any]) -> np.ndarray:
    """The golden's input."""
    return input_images(meta["batch"], meta["image_size"])
