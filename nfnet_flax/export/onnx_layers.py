"""The ONNX nodes of each layer. Values are (N, C, H, W); kernels are OIHW; heights and widths are known numbers."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.export.graph import Attribute, Graph, Images
from nfnet_flax.models.config import GlobalPool
from nfnet_flax.models.convolution import same_padding
from nfnet_flax.models.layers import ActivationName, BatchNorm, Conv, Dense, SqueezeExcite, WSConv
from nfnet_flax.models.timm_nfnet import EfficientChannelAttention

_OPERATORS: dict[ActivationName, tuple[str, dict[str, Attribute]]] = {
    "gelu": ("Gelu", {"approximate": "tanh"}),
    "gelu_erf": ("Gelu", {"approximate": "none"}),
    "relu": ("Relu", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
    "elu": ("Elu", {"alpha": 1.0}),
    "celu": ("Elu", {"alpha": 1.0}),  # the same for this alpha, and also defined for float16
    "selu": ("Selu", {}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "softplus": ("Softplus", {}),
    "soft_sign": ("Softsign", {}),
}
"""Activations that are one operator."""


def activation(graph: Graph, function: ActivationName, x: str, name: str) -> str:
    """The activation of a value of any shape, without its gamma."""
    if function in _OPERATORS:
        operator, attributes = _OPERATORS[function]
        return graph.node(operator, [x], name, **attributes)
    if function == "silu":  # Swish, of opset 24, is not known to many runtimes; they join these two nodes themselves
        return graph.node("Mul", [x, graph.node("Sigmoid", [x], f"{name}.sigmoid")], name)
    if function == "relu6":
        limits = [graph.constant(f"{name}.{end}", np.asarray(value)) for end, value in (("low", 0.0), ("high", 6.0))]
        return graph.node("Clip", [x, *limits], name)
    if function == "log_sigmoid":
        negative = graph.node("Softplus", [graph.node("Neg", [x], f"{name}.minus")], f"{name}.softplus")
        return graph.node("Neg", [negative], name)
    assert function == "identity", function
    return x


def activated(graph: Graph, function: ActivationName, x: Images, name: str) -> Images:
    """`activation` of images."""
    return dataclasses.replace(x, name=activation(graph, function, x.name, name))


def convolution(
    graph: Graph, x: Images, conv: WSConv | Conv, name: str, *, norm: BatchNorm | None = None, factor: float = 1.0
) -> Images:
    """One Conv node for a folded convolution, with its bias.

    Args:
      graph: the graph.
      x: the input.
      conv: a folded convolution.
      name: name of the node.
      norm: the folded BatchNorm that follows, whose factors are already part of the kernel.
      factor: number by which the result is multiplied.
    """
    kernel = np.asarray(conv.kernel[...], np.float64) * factor
    rows, columns, _, out = kernel.shape
    is_symmetric = isinstance(conv, WSConv) and conv.has_symmetric_padding
    pads = [_pads(size, window, conv.stride, is_symmetric) for size, window in ((x.height, rows), (x.width, columns))]
    inputs = [x.name, graph.constant(f"{name}.kernel", kernel.transpose(3, 2, 0, 1))]
    bias = conv.bias if isinstance(conv, WSConv) else None if norm is None else norm.bias
    if bias is not None:
        inputs.append(graph.constant(f"{name}.bias", np.asarray(bias[...], np.float64) * factor))
    output = graph.node("Conv", inputs, name, **_window((rows, columns), conv.stride, pads), group=conv.groups)
    sizes = _sizes(x, (rows, columns), conv.stride, pads)
    return Images(output, out, *sizes)


def batch_norm(graph: Graph, x: Images, norm: BatchNorm, name: str) -> Images:
    """A folded BatchNorm that no convolution precedes: a factor and an addend for each channel."""
    scale, shift = (
        graph.constant(f"{name}.{kind}", np.asarray(value[...]).reshape(-1, 1, 1))
        for kind, value in (("scale", norm.gain), ("shift", norm.bias))
    )
    scaled = graph.node("Mul", [x.name, scale], f"{name}.scaled")
    return dataclasses.replace(x, name=graph.node("Add", [scaled, shift], name))


def avg_pool_2x2(graph: Graph, x: Images, name: str) -> Images:
    """`models.convolution.avg_pool_2x2`: a window over the border averages only the pixels inside."""
    pads = [(0, x.height % 2), (0, x.width % 2)]
    output = graph.node("AveragePool", [x.name], name, **_window((2, 2), 2, pads), count_include_pad=0)
    return Images(output, x.channels, *_sizes(x, (2, 2), 2, pads))


def max_pool_3x3(graph: Graph, x: Images, name: str, *, is_symmetric: bool = False) -> Images:
    """`models.layers.max_pool_3x3`."""
    pads = [_pads(size, 3, 2, is_symmetric) for size in (x.height, x.width)]
    output = graph.node("MaxPool", [x.name], name, **_window((3, 3), 2, pads))
    return Images(output, x.channels, *_sizes(x, (3, 3), 2, pads))


def _pads(size: int, window: int, stride: int, is_symmetric: bool) -> tuple[int, int]:
    return (window // 2, window // 2) if is_symmetric else same_padding(size, window, stride)


def _window(window: tuple[int, int], stride: int, pads: Sequence[tuple[int, int]]) -> dict[str, Attribute]:
    ends = [pad[end] for end in (0, 1) for pad in pads]
    return {"kernel_shape": list(window), "strides": [stride, stride], "pads": ends}


def _sizes(x: Images, window: tuple[int, int], stride: int, pads: Sequence[tuple[int, int]]) -> tuple[int, int]:
    height, width = (
        (size + sum(pad) - extent) // stride + 1
        for size, extent, pad in zip((x.height, x.width), window, pads, strict=True)
    )
    return height, width


def add(graph: Graph, x: Images, y: Images, name: str) -> Images:
    """The sum of two values of the same shape."""
    return dataclasses.replace(x, name=graph.node("Add", [x.name, y.name], name))


_HIDDEN: dict[Callable[[jax.Array], jax.Array], ActivationName] = {jax.nn.relu: "relu", jax.nn.silu: "silu"}
"""Function of a squeeze-excite -> its name."""


def gated(
    graph: Graph, x: Images, gate: SqueezeExcite | EfficientChannelAttention, name: str, *, factor: float = 1.0
) -> Images:
    """Images times the gate of each of their channels, times a number."""
    pooled = graph.node("GlobalAveragePool", [x.name], f"{name}.pool")
    if isinstance(gate, SqueezeExcite):
        weights = _squeeze_excite(graph, pooled, gate, name)
    else:
        weights = _channel_attention(graph, pooled, gate, name)
    if factor != 1.0:  # here, as these are few numbers
        weights = graph.node("Mul", [weights, graph.constant(f"{name}.factor", np.asarray(factor))], f"{name}.scaled")
    shape = graph.constant(f"{name}.shape", np.asarray([0, x.channels, 1, 1]))  # 0: as it is, which is the batch
    weights = graph.node("Reshape", [weights, shape], f"{name}.gate")
    return dataclasses.replace(x, name=graph.node("Mul", [x.name, weights], name))


def _squeeze_excite(graph: Graph, pooled: str, gate: SqueezeExcite, name: str) -> str:
    """(N, C, 1, 1) -> (N, C)."""
    if gate.activation not in _HIDDEN:
        raise ConfigError(f"{name}: its activation has no ONNX form here: export to stablehlo")
    h = dense(graph, graph.node("Flatten", [pooled], f"{name}.flat"), gate.reduce, f"{name}.reduce")
    h = activation(graph, _HIDDEN[gate.activation], h, f"{name}.activation")
    return graph.node("Sigmoid", [dense(graph, h, gate.expand, f"{name}.expand")], f"{name}.sigmoid")


def _channel_attention(graph: Graph, pooled: str, gate: EfficientChannelAttention, name: str) -> str:
    """(N, C, 1, 1) -> (N, 1, C): a convolution over the channels."""
    shape = graph.constant(f"{name}.row", np.asarray([0, 1, -1]))
    row = graph.node("Reshape", [pooled, shape], f"{name}.channels")
    kernel = graph.constant(f"{name}.kernel", np.asarray(gate.kernel[...]).reshape(1, 1, -1))
    margin = gate.size // 2
    mixed = graph.node("Conv", [row, kernel], f"{name}.conv", kernel_shape=[gate.size], pads=[margin, margin])
    return graph.node("Sigmoid", [mixed], f"{name}.sigmoid")


def dense(graph: Graph, x: str, layer: Dense, name: str, *, factor: float = 1.0) -> str:
    """One Gemm node for a dense layer of `factor` times (N, I)."""
    kernel = graph.constant(f"{name}.kernel", np.asarray(layer.kernel[...], np.float64) * factor)
    bias = graph.constant(f"{name}.bias", np.asarray(layer.bias[...]))
    return graph.node("Gemm", [x, kernel, bias], name)


def global_pool(graph: Graph, x: Images, pool: GlobalPool) -> str:
    """(N, C, H, W) -> (N, C), or (N, 2 C) for `catavgmax`."""
    operators = {"avg": ["GlobalAveragePool"], "max": ["GlobalMaxPool"]}.get(pool, _BOTH)
    parts = [graph.node(operator, [x.name], f"pool.{operator[6:].lower()}") for operator in operators]
    pooled = parts[0]
    if pool == "catavgmax":
        pooled = graph.node("Concat", parts, "pool.both", axis=1)
    elif pool == "avgmax":
        half = graph.constant("pool.half", np.asarray(0.5))
        pooled = graph.node("Mul", [graph.node("Add", parts, "pool.sum"), half], "pool.mean")
    return graph.node("Flatten", [pooled], "pool")


_BOTH = ["GlobalAveragePool", "GlobalMaxPool"]
