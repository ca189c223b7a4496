"""What a weight is to its layer: which weights are matrices inside a network.

A variable doesn't know its layer. `roles` reads a model; `role_by_path` makes do
with Keras's names for its variables.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from tf_effopt.engine.keras_hooks import own_history, sublayers
from tf_effopt.paths import ends, nearest_paths, path_of
from tf_effopt.rules import Matrices

HIDDEN, EMBEDDING, HEAD, OTHER = KINDS = ("hidden", "embedding", "head", "other")

# Gates that a recurrent cell keeps side by side in the last axis.
GATES = {"lstm_cell": 4, "gru_cell": 3, "simple_rnn_cell": 1, "conv_lstm_cell": 4}
TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


@dataclasses.dataclass(frozen=True)
class Role:
    """What one weight is to its layer.

    Attributes:
        kind: `"hidden"` for matrices inside of the network, `"embedding"`,
            `"head"` for the kernel of an output layer, or `"other"`: biases,
            scales, filters of single channels, what isn't known.
        matrices: how it is looked at as matrices; None if it has none.
        heads: the axis of attention's heads, or None.
    """

    kind: str
    matrices: Matrices | None = None
    heads: int | None = None

    def per_head(self) -> Role:
        """This role with one matrix for each of attention's heads."""
        if self.heads is None:
            return self

        def others(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis for axis in axes if axis != self.heads)

        views = self.matrices
        return Role(
            self.kind,
            Matrices(others(views.inputs), others(views.outputs), views.split),
        )


class Roles:
    """The role of each weight of a model, by path. Print it to see the table.

    Made by `tf_effopt.roles(model)`; saved with the optimizer that has it.
    """

    def __init__(self, entries: list[Any]):
        self._entries = [_from_config(entry) for entry in entries]

    def role(self, path: str, shape: tuple[int, ...]) -> Role:
        """The role of a variable.

        Raises:
            ValueError: the model had no such variable.
        """
        of_shape = [(p, role) for p, s, role in self._entries if s == tuple(shape)]
        found = [role for p, role in of_shape if p == path]
        # `load_model` takes the names of a `Sequential` off its variables.
        found = found or [
            role for p, role in of_shape if p in ends(path) or path in ends(p)
        ]
        if not found:
            near = nearest_paths(path, [p for p, _, _ in self._entries])
            raise ValueError(
                f"`roles` has no variable {path!r} of shape {tuple(shape)}; the "
                f"nearest paths are {', '.join(near)}. It was read from another model, or before a layer was "
                "added or renamed: call `tf_effopt.roles(model)` again."
            )
        # Of two with the same path, neither is taken for what it may not be.
        return min(found, key=lambda role: role.kind == HIDDEN)

    def paths(self, kind: str) -> list[str]:
        """The paths of the variables of one kind."""
        return [path for path, _, role in self._entries if role.kind == kind]

    def get_config(self) -> dict[str, Any]:
        return {
            "entries": [
                [path, list(shape), dataclasses.asdict(role)]
                for path, shape, role in self._entries
            ]
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Roles:
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Roles) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash(tuple(self._entries))

    def __str__(self) -> str:
        width = max((len(path) for path, _, _ in self._entries), default=0)
        return "\n".join(
            f"{path:{width}}  {role.kind:9}  {tuple(shape)}"
            for path, shape, role in self._entries
        )


keras.saving.register_keras_serializable("tf_effopt")(Roles)


def _from_config(entry: Any) -> tuple[str, tuple[int, ...], Role]:
    path, shape, role = entry
    if not isinstance(role, Role):
        matrices = role["matrices"]
        if matrices is not None:
            matrices = Matrices(
                tuple(matrices["inputs"]),
                tuple(matrices["outputs"]),
                matrices["split"] and tuple(matrices["split"]),
            )
        role = Role(role["kind"], matrices, role["heads"])
    return path, tuple(shape), role


def roles(model: keras.Model, override: Mapping[str, str] | None = None) -> Roles:
    """Reads off a model which of its weights are matrices inside the network.

    Kernels of dense layers, convolutions, attention's projections and recurrent
    cells are; embeddings, also where an output layer shares them, and the
    kernels of output layers aren't, nor are biases and scales. A layer of your
    own is read by the names and shapes of its variables.

    Args:
        model: a Keras model that is built.
        override: regular expression on paths -> `"hidden"`, `"embedding"`, `"head"`
            or `"other"`, for what can't be read: the head of a subclassed
            model, the weights of a layer of your own.

    Returns:
        The `Roles`, to be printed, and passed to an optimizer: `Muon(roles=...)`.

    Raises:
        ValueError: the model isn't built; a pattern matches nothing.

    Example:

    >>> import keras, tf_effopt
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(4, name="inner"),
    ...      keras.layers.Dense(2, name="logits")], name="small")
    >>> print(tf_effopt.roles(model))
    small/inner/kernel   hidden     (8, 4)
    small/inner/bias     other      (4,)
    small/logits/kernel  head       (4, 2)
    small/logits/bias    other      (2,)
    """
    if not model.built or not model.weights:
        raise ValueError(
            "`tf_effopt.roles` needs a model whose weights exist. Received: "
            f"{model.name!r}, which isn't built. Call it on a batch first, or "
            "`model.build(input_shape)`."
        )
    found: dict[int, Role] = {}
    for layer in sublayers(model):
        for variable, role in _roles_of(layer):
            # A weight that several layers share is what its strictest use is.
            found[id(variable)] = _stricter(found.get(id(variable)), role)
    heads = list(_heads(model))
    for variable in heads:
        head = dataclasses.replace(found[id(variable)], kind=HEAD)
        found[id(variable)] = _stricter(found[id(variable)], head)
    entries = []
    for variable in model.weights:  # also frozen ones: they may be trained later
        path, shape = path_of(variable), tuple(variable.shape)
        entries.append(
            (path, shape, found.get(id(variable)) or role_by_path(path, shape))
        )
    entries, has_head = _overridden(entries, override or {})
    if not heads and not has_head:
        warnings.warn(
            f"No output layer is seen in {model.name!r}. If it has one, name its "
            'kernel: `tf_effopt.roles(model, {"path/of/the/kernel": "head"})`.',
            stacklevel=2,
        )
    return Roles(entries)


def _stricter(one: Role | None, other: Role) -> Role:
    order = (EMBEDDING, HEAD, OTHER, HIDDEN)
    if one is None or order.index(other.kind) < order.index(one.kind):
        return other
    return one


def _overridden(entries: list, override: Mapping[str, str]) -> tuple[list, bool]:
    """The entries with the roles that the user names; whether one is a head."""
    for pattern, kind in override.items():
        if kind not in KINDS:
            raise ValueError(
                f"A role must be one of {', '.join(map(repr, KINDS))}. Received: "
                f"{pattern!r}: {kind!r}"
            )
        places = [
            i for i, (path, _, _) in enumerate(entries) if re.search(pattern, path)
        ]
        if not places:
            near = nearest_paths(pattern, [path for path, _, _ in entries])
            raise ValueError(
                f"The pattern {pattern!r} matches no weight; the nearest "
                f"paths are {', '.join(near)}."
            )
        for i in places:
            path, shape, role = entries[i]
            if kind == HIDDEN and len(shape) < 2:
                raise ValueError(
                    f"{path!r} of shape {shape} is no matrix: it can't be 'hidden'. "
                    f"Received: {pattern!r}: 'hidden'. Make the pattern narrower, "
                    f"such as {pattern + '.*kernel'!r}."
                )
            matrices = role.matrices or _last_axis_out(shape)
            entries[i] = path, shape, Role(kind, matrices, role.heads)
    return entries, HEAD in override.values()


# ------------------------------------------------------------- layer by layer


def _roles_of(layer: Any) -> Iterator[tuple[Any, Role]]:
    """The weights of a layer of Keras that are known by their role."""
    if isinstance(layer, keras.layers.Embedding):
        yield layer.embeddings, Role(EMBEDDING, _last_axis_out(layer.embeddings.shape))
        if getattr(layer, "reverse_embeddings", None) is not None:
            yield layer.reverse_embeddings, Role(HEAD)
    elif isinstance(layer, keras.layers.EinsumDense):
        yield layer._kernel, _einsum(layer.equation)
    elif isinstance(layer, keras.layers.Dense):
        yield layer._kernel, _last_axis_role(layer._kernel.shape)
    elif isinstance(layer, TRANSPOSED):
        yield layer.kernel, _transposed(layer.kernel.shape)
    elif isinstance(layer, DEPTHWISE):
        yield layer.kernel, Role(OTHER)
    elif isinstance(layer, SEPARABLE):
        yield layer.depthwise_kernel, Role(OTHER)
        yield layer.pointwise_kernel, _last_axis_role(layer.pointwise_kernel.shape)
    elif isinstance(layer, CONVOLUTIONS):
        is_depthwise = layer.groups > 1 and layer._kernel.shape[-2] == 1
        of_groups = _beside_each_other(layer._kernel.shape, layer.groups)
        yield layer._kernel, Role(OTHER) if is_depthwise else of_groups
    elif (gates := _gates_of(type(layer))) is not None:
        for kernel in (layer.kernel, layer.recurrent_kernel):
            yield kernel, _beside_each_other(kernel.shape, gates)


def _gates_of(cls: type) -> int | None:
    names = [_snake_case(base.__name__) for base in cls.__mro__]
    return next((GATES[name] for name in names if name in GATES), None)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _last_axis_out(shape: Any) -> Matrices | None:
    last = len(shape) - 1
    return Matrices(tuple(range(last)), (last,)) if last > 0 else None


def _last_axis_role(shape: Any) -> Role:
    return Role(HIDDEN, _last_axis_out(shape))


def _beside_each_other(shape: Any, count: int) -> Role:
    """Of `count` matrices side by side in the last axis: gates, groups."""
    if count == 1:
        return _last_axis_role(shape)
    *first, last = shape
    split = (*first, count, last // count)
    return Role(HIDDEN, Matrices(tuple(range(len(first))), (len(first) + 1,), split))


def _transposed(shape: Any) -> Role:
    """Of a transposed convolution, whose last two axes are outputs, inputs."""
    *space, outputs, inputs = range(len(shape))
    return Role(HIDDEN, Matrices((*space, inputs), (outputs,)))


def _einsum(equation: str) -> Role:
    """Of the kernel in an equation such as `abc,cde->abde`."""
    operands, output = equation.replace(" ", "").split("->")
    data, kernel = operands.split(",")
    inputs = tuple(i for i, x in enumerate(kernel) if x in data and x not in output)
    outputs = tuple(i for i, x in enumerate(kernel) if x in output and x not in data)
    if not inputs or not outputs:
        return Role(OTHER)
    pair = next((axes for axes in (inputs, outputs) if len(axes) == 2), None)
    is_attention = len(kernel) == 3 and pair is not None
    return Role(HIDDEN, Matrices(inputs, outputs), pair[0] if is_attention else None)


# --------------------------------------------------------------- output layers


def _heads(model: Any) -> Iterator[Any]:
    """The kernels of output layers, as far as the graph of layers shows them."""
    for tensor in keras.tree.flatten(getattr(model, "outputs", None) or []):
        layer = _behind_weightless(tensor)
        while isinstance(layer, keras.layers.Wrapper):
            layer = layer.layer
        if isinstance(layer, keras.Model):
            yield from _heads(layer)
        elif isinstance(layer, keras.layers.Embedding):
            yield layer.embeddings  # tied, and so not trained as a head
        elif layer is not None:
            kernels = [v for v, role in _roles_of(layer) if role.kind == HIDDEN]
            if len(kernels) == 1:
                yield kernels[0]


def _behind_weightless(tensor: Any) -> Any:
    """The operation with weights that a tensor comes from, through one path."""
    while True:
        operation, inputs = own_history(tensor)
        if getattr(operation, "weights", None) or isinstance(operation, keras.Model):
            return operation
        if len(inputs) != 1:
            return None
        (tensor,) = inputs


# -------------------------------------------------------------------- by path


def role_by_path(path: str, shape: tuple[int, ...]) -> Role:
    """The role as far as Keras's names tell it; heads aren't known by name."""
    *layers, name = path.lower().split("/")
    layer = layers[-1] if layers else ""
    if "embedding" in path.lower():
        return Role(EMBEDDING, _last_axis_out(shape))
    if len(shape) < 2 or re.search("bias|gamma|beta|scale|lora|depthwise", name):
        return Role(OTHER)
    if "depthwise" in layer or math.prod(shape) == max(shape):
        return Role(OTHER)
    gates = next((n for cell, n in GATES.items() if cell in layer), None)
    if gates is not None:
        return _beside_each_other(shape, gates)
    if len(shape) == 2:
        return _last_axis_role(shape)
    if "kernel" not in name:
        return Role(OTHER)
    if len(shape) == 3 and re.search(r"query|key|value$", layer):
        return _einsum("bcd,dhk->bchk")
    if len(shape) == 3 and "attention_output" in layer:
        return _einsum("bchk,hkd->bcd")
    if "transpose" in layer:
        return _transposed(shape)
    if len(shape) > 3 or "conv" in path.lower():
        return _last_axis_role(shape)
    return Role(OTHER)
