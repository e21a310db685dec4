"""Writes a network as an ONNX file.

The nodes are written from the folded modules, not from a traced program, so that there is one node for each layer, with
the name of its parameters: a traced program has lost which operations belong to a layer, and is NHWC.
"""

from pathlib import Path
from typing import Any

import numpy as np

from nfnet_flax.export.description import as_metadata
from nfnet_flax.export.graph import Graph, Images
from nfnet_flax.export.onnx_networks import check_exportable, logits
from nfnet_flax.export.options import ExportedNetwork, ExportOptions
from nfnet_flax.export.verify import Call

OPSET = 20
"""Version of ONNX's operators: the first with Gelu."""
_IR_VERSION = 9
"""Version of the file format that came with this opset; newer ones are refused by runtimes of its time."""
_MAX_BYTES = 1_900_000_000
"""Bytes of arrays above which they are stored in a file beside: a protocol buffer holds less than 2 GiB."""


def write_onnx(
    folder: Path,
    name: str,
    exported: ExportedNetwork,
    options: ExportOptions,
    facts: dict[str, Any],
    *,
    max_bytes: int = _MAX_BYTES,
) -> list[str]:
    """Writes `NAME.onnx`, and `NAME.onnx.data` if the arrays are larger than `max_bytes`; returns the names.

    Raises:
      ConfigError: the family of the network is not known to the exporter.
    """
    import onnx

    check_exportable(exported.network)
    model = make_onnx(exported, options, facts)
    beside = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > max_bytes
    path, data = folder / f"{name}.onnx", f"{name}.onnx.data"
    onnx.save_model(model, path, save_as_external_data=beside, location=data if beside else None)
    onnx.checker.check_model(path, full_check=True)
    return [path.name, data] if beside else [path.name]


def make_onnx(exported: ExportedNetwork, options: ExportOptions, facts: dict[str, Any]) -> Any:
    """The `onnx.ModelProto` of a network."""
    from onnx import TensorProto, helper

    graph = Graph(options.dtype)
    x = _input(graph, exported, options)
    result = logits(graph, x, exported.folded)
    output = facts["output"]["name"]
    if graph.dtype == "float16":
        graph.node("Cast", [result], output, to=TensorProto.FLOAT)
    else:
        graph.nodes[-1].output[0] = output
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
    made = helper.make_graph(
        graph.nodes,
        name=type(exported.network).__name__,
        inputs=[helper.make_tensor_value_info("images", kinds[facts["input"]["dtype"]], facts["input"]["shape"])],
        outputs=[helper.make_tensor_value_info(output, TensorProto.FLOAT, facts["output"]["shape"])],
        initializer=graph.constants,
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="nfnet_flax",
    )
    helper.set_model_props(model, as_metadata(facts))
    return model


def _input(graph: Graph, exported: ExportedNetwork, options: ExportOptions) -> Images:
    """From the images as the user gives them to normalised ones, (N, C, H, W) in the type of the graph."""
    from onnx import TensorProto, helper

    name, size = "images", exported.image_size
    if options.layout == "nhwc":
        name = graph.node("Transpose", [name], "images.nchw", perm=[0, 3, 1, 2])
    if options.input == "uint8":
        name = graph.node("Cast", [name], "images.grey", to=TensorProto.FLOAT)
        for operator, kind, value in zip(("Sub", "Div"), ("mean", "std"), exported.channel_statistics, strict=True):
            graph.constants.append(
                helper.make_tensor(f"images.{kind}", TensorProto.FLOAT, (len(value), 1, 1), value.tolist())
            )
            name = graph.node(operator, [name, f"images.{kind}"], f"images.{operator.lower()}")
    if graph.dtype == "float16":
        name = graph.node("Cast", [name], "images.float16", to=TensorProto.FLOAT16)
    return Images(name, exported.info.model.in_channels, size, size)


def call_onnx(path: Path) -> Call:
    """The exported network, computed by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()

    def call(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run([found.name], {given.name: images})[0])

    return call
