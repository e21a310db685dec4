"""The ONNX nodes of each family of networks, made of the folded modules."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from nfnet_flax.config import ConfigError
from nfnet_flax.export import onnx_layers
from nfnet_flax.export.graph import Graph, Images
from nfnet_flax.export.onnx_layers import activated, add, convolution, gated
from nfnet_flax.models import Classifier, EfficientNet, NFNet, NFRegNet, NFResNet, ResNet, TimmNFNet
from nfnet_flax.models.efficientnet import EfficientNetBlock
from nfnet_flax.models.layers import ACTIVATIONS, SqueezeExcite, WSConv
from nfnet_flax.models.nf_block import NFBlock
from nfnet_flax.models.nf_regnet import NFRegNetBlock
from nfnet_flax.models.nf_resnet import NFResNetBlock
from nfnet_flax.models.nfnet import NFNetBlock
from nfnet_flax.models.resnet import ResNetBlock
from nfnet_flax.models.timm_nfnet import EfficientChannelAttention, TimmNFBlock

_FAMILIES = (NFNet, NFResNet, NFRegNet, TimmNFNet, ResNet, EfficientNet)


def check_exportable(model: Classifier) -> None:
    """Raises `ConfigError` unless the family of a network is known here. A class that derives from one of them may
    compute something else."""
    if type(model) not in _FAMILIES:
        raise ConfigError(
            f"to = 'onnx': {type(model).__name__} is a family of your own, for which no ONNX nodes are defined: export "
            "it to stablehlo, which every network can be"
        )


def logits(graph: Graph, x: Images, model: Classifier) -> str:
    """The nodes of a folded network from normalised images to logits, or to features if it has no head."""
    x = _stem(graph, x, model)
    for stage, blocks in enumerate(model.stages):
        for position, block in enumerate(blocks):
            x = _block(graph, x, block, f"stages.{stage}.{position}")
    x, gamma = _final(graph, x, model)
    pooled = onnx_layers.global_pool(graph, x, model.config.global_pool)
    if model.num_classes > 0:
        return onnx_layers.dense(graph, pooled, model.head, "head", factor=gamma)
    if gamma == 1.0:
        return pooled
    return graph.node("Mul", [pooled, graph.constant("pool.gamma", np.asarray(gamma))], "pool.scaled")


def _stem(graph: Graph, x: Images, model: Classifier) -> Images:
    match model:
        case NFNet() | TimmNFNet():
            for position, conv in enumerate(model.stem):
                if position > 0:
                    x = activated(graph, model.config.activation, x, f"stem.{position - 1}.activation")
                x = convolution(graph, x, conv, f"stem.{position}")
            pools = isinstance(model, TimmNFNet) and model.config.stem == "7x7_pool"
            return onnx_layers.max_pool_3x3(graph, x, "stem.pool", is_symmetric=True) if pools else x
        case NFRegNet():
            return convolution(graph, x, model.stem, "stem")
        case NFResNet():
            return onnx_layers.max_pool_3x3(graph, convolution(graph, x, model.stem, "stem"), "stem.pool")
        case ResNet():
            norms = [*model.stem_norms, None]
            for position, (plain, norm) in enumerate(zip(model.stem, norms, strict=True)):
                x = convolution(graph, x, plain, f"stem.{position}", norm=norm)
                if norm is not None:
                    x = graph.elementwise("Relu", x, f"stem.{position}.activation")
            return onnx_layers.max_pool_3x3(graph, x, "stem.pool")
        case EfficientNet():
            x = convolution(graph, x, model.stem, "stem", norm=model.stem_norm)
            return activated(graph, "silu", x, "stem.activation")
    raise AssertionError(f"{type(model).__name__} was not checked")


def _final(graph: Graph, x: Images, model: Classifier) -> tuple[Images, float]:
    """The last features, and a number by which they are to be multiplied; it is positive, so pools may come before."""
    match model:
        case NFNet() | NFRegNet() | NFResNet():
            if not isinstance(model, NFResNet):
                x = convolution(graph, x, model.final_conv, "final_conv")
            function = model.config.activation
            return activated(graph, function, x, "final.activation"), ACTIVATIONS[function][1]
        case TimmNFNet():
            if model.config.num_final is not None:
                x = convolution(graph, x, model.final_conv, "final_conv")
            return activated(graph, model.config.activation, x, "final.activation"), 1.0
        case ResNet():
            x = onnx_layers.batch_norm(graph, x, model.final_bn, "final_bn")
            return graph.elementwise("Relu", x, "final.activation"), 1.0
        case EfficientNet():
            x = convolution(graph, x, model.final_conv, "final_conv", norm=model.final_norm)
            return activated(graph, "silu", x, "final.activation"), 1.0
    raise AssertionError(f"{type(model).__name__} was not checked")


def _block(graph: Graph, x: Images, block: object, name: str) -> Images:
    match block:
        case NFBlock():
            return _nf_block(graph, x, block, name)
        case ResNetBlock():
            return _resnet_block(graph, x, block, name)
        case EfficientNetBlock():
            return _efficientnet_block(graph, x, block, name)
    raise AssertionError(f"{type(block).__name__} was not checked")


@dataclasses.dataclass(frozen=True)
class _Branch:
    """What a normalizer-free block computes: convolutions with an activation before all but the first one."""

    convolutions: Sequence[tuple[str, WSConv]]
    """Name and module."""
    attention: tuple[str, SqueezeExcite | EfficientChannelAttention] | None
    """Name and module of the channel attention, whose result is doubled."""
    attends_last: bool = True
    """Whether the attention comes after the last convolution, or after the one before it."""


def _branch(block: NFBlock) -> _Branch:
    match block:
        case NFNetBlock():
            convs = [("conv0", block.conv0), ("conv1", block.conv1), ("conv1b", block.conv1b), ("conv2", block.conv2)]
            return _Branch(convs, ("squeeze_excite", block.squeeze_excite))
        case NFResNetBlock():
            convs = [("conv0", block.conv0), ("conv1", block.conv1), ("conv2", block.conv2)]
            return _Branch(convs, ("squeeze_excite", block.squeeze_excite) if block.has_squeeze_excite else None)
        case NFRegNetBlock():
            convs = [("conv0", block.conv0), ("conv1", block.conv1), ("conv2", block.conv2)]
            return _Branch(convs, ("squeeze_excite", block.squeeze_excite), attends_last=False)
        case TimmNFBlock():
            second = [("conv1b", block.conv1b)] if block.has_second_3x3 else []
            convs = [("conv0", block.conv0), ("conv1", block.conv1), *second, ("conv2", block.conv2)]
            attends = block.attends_last or block.attends_before
            attention = ("attention", block.attention) if attends else None
            return _Branch(convs, attention, attends_last=block.attends_last)
    raise AssertionError(f"{type(block).__name__} was not checked")


def _nf_block(graph: Graph, x: Images, block: NFBlock, name: str) -> Images:
    h = activated(graph, block.activation, x, f"{name}.activation")
    shortcut = x
    if block.has_projection:
        shortcut = onnx_layers.avg_pool_2x2(graph, h, f"{name}.shortcut_pool") if block.pools else h
        shortcut = convolution(graph, shortcut, block.conv_shortcut, f"{name}.conv_shortcut")
    scale = block.alpha * (float(block.skip_gain[...]) if block.has_skip_gain else 1.0)
    branch = _branch(block)
    last = len(branch.convolutions) - 1
    place = None if branch.attention is None else last if branch.attends_last else last - 1
    for position, (part, conv) in enumerate(branch.convolutions):
        if position > 0:
            h = activated(graph, block.activation, h, f"{name}.{branch.convolutions[position - 1][0]}.activation")
        is_scaled = position == last and place != last
        h = convolution(graph, h, conv, f"{name}.{part}", factor=scale if is_scaled else 1.0)
        if branch.attention is not None and position == place:
            gate_name, gate = branch.attention
            h = gated(graph, h, gate, f"{name}.{gate_name}", factor=2 * scale if position == last else 2.0)
    return add(graph, h, shortcut, f"{name}.sum")


def _resnet_block(graph: Graph, x: Images, block: ResNetBlock, name: str) -> Images:
    h = graph.elementwise("Relu", onnx_layers.batch_norm(graph, x, block.bn0, f"{name}.bn0"), f"{name}.activation")
    shortcut = x
    if block.has_projection:
        shortcut = onnx_layers.avg_pool_2x2(graph, h, f"{name}.shortcut_pool") if block.pools else h
        shortcut = convolution(graph, shortcut, block.conv_shortcut, f"{name}.conv_shortcut")
    for part, conv, norm in (("conv0", block.conv0, block.bn1), ("conv1", block.conv1, block.bn2)):
        h = convolution(graph, h, conv, f"{name}.{part}", norm=norm)
        h = graph.elementwise("Relu", h, f"{name}.{part}.activation")
    h = convolution(graph, h, block.conv2, f"{name}.conv2")
    if block.has_squeeze_excite:
        h = gated(graph, h, block.squeeze_excite, f"{name}.squeeze_excite")
    return add(graph, h, shortcut, f"{name}.sum")


def _efficientnet_block(graph: Graph, x: Images, block: EfficientNetBlock, name: str) -> Images:
    h = x
    if block.expands:
        h = convolution(graph, h, block.expand, f"{name}.expand", norm=block.expand_norm)
        h = activated(graph, "silu", h, f"{name}.expand.activation")
    h = convolution(graph, h, block.depthwise, f"{name}.depthwise", norm=block.depthwise_norm)
    h = activated(graph, "silu", h, f"{name}.depthwise.activation")
    h = gated(graph, h, block.squeeze_excite, f"{name}.squeeze_excite")
    h = convolution(graph, h, block.project, f"{name}.project", norm=block.project_norm)
    return add(graph, h, x, f"{name}.sum") if block.has_shortcut else h
