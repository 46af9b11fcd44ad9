"""Trace a model with `torch.export` and label the graph's tensors with axes."""

from __future__ import annotations

import contextlib
import io
import traceback
import warnings
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx import Graph, Node
from torch.utils import _pytree

from permprune.coupling import arithmetic, constants, layout  # noqa: F401 - some for the rules that they register
from permprune.coupling.axes import Label, freeze
from permprune.coupling.walk import VIEWS, ParameterView, Walk, fresh, op_name, place, writes
from permprune.errors import PermpruneError, first_line
from permprune.models.experts import BATCHED, implementation
from permprune.models.forward import forward_arguments, inference, main_outputs, side_outputs, without_hub_kernels
from permprune.models.layers import canonical_names


class Untraceable(PermpruneError):
    """Raised if `torch.export` fails; `what` describes the error and its location."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: use gather mode (--mode gather), which needs no coupling; "
            "if it takes other inputs, try them with permprune.inspect(model, example={...})"
        )
        self.what = what


def trace(model: nn.Module, example: Mapping[str, Tensor]) -> tuple[Walk, Graph]:
    """Export the model on an example batch (keyword arguments of its forward) and label its graph.

    The model is traced in evaluation mode without a key/value cache, and experts in their `BATCHED` implementation.
    The graph contains what depends on parameters; the inputs, and what depends only on them, are its constants. Raises
    `Untraceable` if the export fails.
    """
    program = _export(model, example)
    walk, canonical = Walk(), canonical_names(model)
    rebuilt = {canonical.get(name, name) for name in getattr(model, "_keys_to_ignore_on_save", None) or ()}
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    _compose_views(program.graph)
    live = _live(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = inputs[node.name]
            _label_input(walk, node, spec, canonical, rebuilt)
            if isinstance(constant := program.constants.get(str(spec.target)), Tensor):
                walk.constants[node] = constant
        elif node.op == "get_attr":
            value = node.meta.get("val")
            walk.keep(node, fresh(value.shape, f"constant {node.target}") if isinstance(value, Tensor) else None)
        elif node in live:
            walk.step(node)
    _freeze_overlaps(walk, model, canonical)
    output = _output(program)
    for node in main_outputs(output):
        freeze(*(walk.label(node) or ()), reason=f"the model returns it ({place(node)})")
    walk.outputs += [(name, label) for name, node in side_outputs(output) if (label := walk.label(node))]
    return walk, program.graph


def _export(model: nn.Module, example: Mapping[str, Tensor]) -> ExportedProgram:
    batched = implementation(BATCHED, model.modules())
    copies = {name: tensor.clone() for name, tensor in example.items()}  # the model may write into its inputs
    closed = constants.constant_inputs(model, forward_arguments(model, copies))
    quiet = contextlib.redirect_stderr(io.StringIO())  # where a failed export prints the graph
    with inference(model), without_hub_kernels(model), batched, closed, quiet, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attribute.* assigned during export")  # it restores them
        try:
            return torch.export.export(model, (), strict=False)
        except PermpruneError:
            raise
        except Exception as error:
            frames = [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if "/torch/" not in frame.filename and frame.filename != constants.__file__  # those of the model's code
            ]
            line = f"{frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else "an unknown line"
            raise Untraceable(
                f"cannot trace the model on {', '.join(example)} ({first_line(error)} at {line})"
            ) from error


def _compose_views(graph: Graph) -> None:
    """Let views of views read the first tensor: the shapes between do not tie its indices to each other."""
    for node in graph.nodes:
        while op_name(node) in VIEWS and op_name(source := node.args[0]) in VIEWS:
            node.replace_input_with(source, source.args[0])


def _live(graph: Graph) -> set[Node]:
    """The calls that contribute to the outputs or that write into a tensor."""
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        used = any(user.op == "output" or user in live for user in node.users)
        if node.op == "call_function" and (used or writes(node)):
            live.add(node)
    return live


def _label_input(
    walk: Walk, node: Node, spec: InputSpec, canonical: Mapping[str, str], rebuilt: Container[str]
) -> None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        walk.keep(node, None)
    elif spec.kind is InputKind.PARAMETER:
        name = canonical[str(spec.target)]
        reason = f"checkpoints do not store {name}" if name in rebuilt else ""
        label = walk.parameters.setdefault(name, fresh(value.shape, reason))
        walk.origins[node] = ParameterView(name, tuple(range(value.dim())))
        walk.keep(node, label)
    elif spec.kind is InputKind.BUFFER:
        walk.keep(node, fresh(value.shape, f"index of buffer {spec.target}"))
    else:
        walk.keep(node, _constant(value, node))


def _constant(value: Tensor, node: Node) -> Label:
    """New axes for a constant, frozen except along the dimensions in which it is expanded (see the rule of expand)."""
    readers = " and ".join(place(user) for user in [*node.users][:1])
    axes = zip(
        fresh(value.shape), fresh(value.shape, f"input or constant read by {readers}"), value.stride(), strict=True
    )
    return tuple(free if stride == 0 else frozen for free, frozen, stride in axes)


def _freeze_overlaps(walk: Walk, model: nn.Module, canonical: Mapping[str, str]) -> None:
    """Freeze parameters that share memory without being the same tensor."""
    ranges = []
    for name in dict.fromkeys(canonical.values()):
        parameter = model.get_parameter(name)
        if parameter.numel() and parameter.device.type != "meta":
            steps = zip(parameter.shape, parameter.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in steps)
            start = parameter.data_ptr()
            ranges.append((str(parameter.device), start, start + extent * parameter.element_size(), name))
    before, end, furthest = "", 0, ""  # of the ranges so far, the one that ends last
    for device, start, stop, name in sorted(ranges):
        if device == before and start < end:
            axes = (*walk.parameters.get(furthest, ()), *walk.parameters.get(name, ()))
            freeze(*axes, reason=f"{furthest} and {name} share memory")
        if device != before or stop > end:
            before, end, furthest = device, stop, name


def _output(program: ExportedProgram) -> Any:
    """What the model returns, with nodes in the places of tensors."""
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    spec = program.call_spec.out_spec
    count = spec.num_leaves if spec is not None else 0
    return _pytree.tree_unflatten(results[len(results) - count :], spec) if spec is not None else results
