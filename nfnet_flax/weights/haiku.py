"""Parameter names of the published Haiku code."""

import re

_LEAVES = {"kernel": "w", "gain": "gain", "bias": "bias", "skip_gain": "skip_gain"}


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def haiku_name(name: str, depths: tuple[int, ...]) -> str:
    """`module/name` in the published NFNet for one of our parameter names.

    Args:
      name: such as `stages.1.0.conv1b.kernel`.
      depths: blocks of each stage; the published code numbers blocks through all stages.

    Raises:
      ValueError: no parameter of an NFNet has this name.
    """
    *modules, leaf = name.split(".")
    dense = modules[-1] in ("head", "reduce", "expand")
    leaf = {"kernel": "w", "bias": "b"}[leaf] if dense else _LEAVES[leaf]
    path = ".".join(modules)
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)(?:\.(.+))?", path):
        block = sum(depths[: int(match[1])]) + int(match[2])
        prefix = f"NFNet/~/{_numbered('nf_block', block)}"
        inner = {
            None: "",
            "squeeze_excite.reduce": "/~/squeeze_excite/~/linear",
            "squeeze_excite.expand": "/~/squeeze_excite/~/linear_1",
        }
        return f"{prefix}{inner.get(match[3], f'/~/{match[3]}')}/{leaf}"
    if match := re.fullmatch(r"stem\.(\d)", path):
        return f"NFNet/~/stem_conv{match[1]}/{leaf}"
    if path in ("head", "final_conv"):
        return f"NFNet/~/{'linear' if path == 'head' else path}/{leaf}"
    raise ValueError(f"no parameter of an NFNet is called {name!r}")
