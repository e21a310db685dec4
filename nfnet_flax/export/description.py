"""What a user of an exported file has to know: preprocessing, names of the classes, input and output, as JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from nfnet_flax.config_json import to_json
from nfnet_flax.export.options import ExportedNetwork, ExportOptions

_FORMAT = "nfnet_flax export 1"


def description(exported: ExportedNetwork, options: ExportOptions) -> dict[str, Any]:
    """The facts in the order in which they are read."""
    info, size, channels = exported.info, exported.image_size, exported.info.model.in_channels
    is_first = options.layout == "nchw"
    facts: dict[str, Any] = {
        "format": _FORMAT,
        "to": options.to,
        "source": info.source,
        "parameters": info.parameters,
        "dtype": options.dtype,
        "input": {
            "name": "images",
            "shape": ["batch", channels, size, size] if is_first else ["batch", size, size, channels],
            "dtype": "uint8" if options.input == "uint8" else "float32",
            "values": "grey levels from 0 to 255, channels in the order red, green, blue"
            if options.input == "uint8"
            else "(grey level - mean) / std, see preprocessing",
        },
        "output": {
            "name": "logits" if info.num_classes > 0 else "features",
            "shape": ["batch", info.num_classes or exported.network.num_features],
            "dtype": "float32",
            **({"activation": info.activation} if info.num_classes > 0 else {}),
        },
        "preprocessing": None if info.preprocessing is None else dataclasses.asdict(info.preprocessing),
        "class_names": None if info.class_names is None else list(info.class_names),
        "model": to_json(info.model),
        "num_classes": info.num_classes,
    }
    return facts


def as_metadata(facts: dict[str, Any]) -> dict[str, str]:
    """The same facts as texts, for formats whose metadata are texts; what is not a text is JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def write_description(path: Path, facts: dict[str, Any]) -> None:
    """Writes the facts as a file of JSON."""
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
