"""What a weight is to its layer: which weights are matrices inside a network.

A variable doesn't know its layer. `roles` reads a model; `role_by_path` makes do
with Keras's names for its variables.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras

from tf_effopt import legacy_keras
from tf_effopt.engine import private_names
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
# One filter for each channel: the last two axes are channels, filters of each.
DEPTHWISE_NAMES = "depthwise|dw_?conv|conv_?dw"
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
        """The role of a variable; see `of`."""
        (role,) = self.of([(path, shape)])
        return role

    def of(self, variables: Sequence[tuple[str, tuple[int, ...]]]) -> list[Role]:
        """The roles of variables, by their paths and shapes.

        `load_model` takes the names of a `Sequential` off its variables, and layers
        of two models may then have one path: these are told apart by their order.

        Raises:
            ValueError: the model had no such variable.
        """
        places = [self._places(path, tuple(shape)) for path, shape in variables]
        alike = collections.Counter(places)
        seen: collections.Counter = collections.Counter()
        found = []
        for candidates in places:
            known = [self._entries[i][2] for i in candidates]
            if alike[candidates] == len(candidates):
                found.append(known[seen[candidates]])
            else:  # Some aren't trained: none is taken for what it may not be.
                found.append(min(known, key=lambda role: role.kind == HIDDEN))
            seen[candidates] += 1
        return found

    def _places(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The entries that a variable may be."""
        of_shape = [(i, p) for i, (p, s, _) in enumerate(self._entries) if s == shape]
        found = [i for i, p in of_shape if p == path]
        found = found or [i for i, p in of_shape if p in ends(path) or path in ends(p)]
        if not found:
            near = nearest_paths(path, [p for p, _, _ in self._entries])
            raise ValueError(
                f"`roles` has no variable {path!r} of shape {shape}; the nearest paths "
                f"are {', '.join(near)}. It was read from another model, or before a "
                "layer was added or renamed: call `tf_effopt.roles(model)` again; an "
                "optimizer's `carry_over(variables, roles=...)` takes it."
            )
        return tuple(found)

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

    def __repr__(self) -> str:
        return f"<roles of {len(self._entries)} variables>"

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
    cells are; embeddings, even if an output layer shares them, and the
    kernels of output layers aren't, nor are biases and scales. A layer of your
    own is read by the names and shapes of its variables. The last layer of a model
    without an output layer, such as a backbone by itself, is taken for one: see
    `override`.

    Args:
        model: a Keras model that is built.
        override: regular expression on paths -> `"hidden"`, `"embedding"`, `"head"`
            or `"other"`, for what can't be read: the head of a subclassed
            model, the weights of a custom layer.

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
    legacy_keras.refuse(model)
    if not getattr(model, "built", False) or not model.weights:
        raise ValueError(
            "`tf_effopt.roles` needs a Keras model whose weights exist. Received: "
            f"{model!r}. If it isn't built, call it on a batch first."
        )
    try:
        override = dict(override or {})
    except (TypeError, ValueError):
        raise ValueError(
            "`override` must be a dict of patterns and roles, such as "
            f"{{'logits': 'head'}}. Received: override={override!r}"
        ) from None
    found: dict[int, Role] = {}
    for layer in sublayers(model):
        for variable, role in _roles_of(layer):
            # A weight that several layers share is what its strictest use is.
            found[id(variable)] = _stricter(found.get(id(variable)), role)
    heads = list(_heads(model))
    for _, variable in heads:
        if variable is None:
            continue
        if id(variable) not in found:  # a weight of a layer that isn't Keras's
            path, shape = path_of(variable), tuple(variable.shape)
            found[id(variable)] = role_by_path(path, shape)
        head = dataclasses.replace(found[id(variable)], kind=HEAD)
        found[id(variable)] = _stricter(found[id(variable)], head)
    entries = []
    for variable in model.weights:  # also frozen ones: they may be trained later
        path, shape = path_of(variable), tuple(variable.shape)
        entries.append(
            (path, shape, found.get(id(variable)) or role_by_path(path, shape))
        )
    entries, has_head = _overridden(entries, override)
    unseen = [name for name, variable in heads if variable is None]
    if (unseen or not heads) and not has_head:
        behind = f" behind {', '.join(unseen)}" if heads else ""
        warnings.warn(
            f"No output layer is seen{behind} in {model.name!r}. If it has one, name "
            'its kernel: `tf_effopt.roles(model, {"path/of/the/kernel": "head"})`.',
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
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise ValueError(
                f"A pattern must be a regular expression on paths. Received: "
                f"{pattern!r}: {error}"
            ) from None
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
    """The weights of a layer of Keras that are known by their role.

    A layer of the user's own may bear the name of one of Keras's, or lack its
    weights: what isn't there has no role here.
    """
    mine = {id(v) for v in layer.weights}
    for name, role_of in _known_weights(layer):
        variable = getattr(layer, name, None)
        if id(variable) in mine:
            yield variable, role_of(variable.shape)


def _known_weights(layer: Any) -> Iterator[tuple[str, Callable[[Any], Role]]]:
    """Attributes of a layer, each with the role of a weight of some shape there."""
    if isinstance(layer, keras.layers.Embedding):
        yield "_embeddings", lambda shape: Role(EMBEDDING, _last_axis_out(shape))
        yield "reverse_embeddings", lambda shape: Role(HEAD)
    elif isinstance(layer, keras.layers.EinsumDense):
        yield "_kernel", lambda shape: _einsum(layer.equation, layer.name)
    elif isinstance(layer, keras.layers.Dense):
        yield "_kernel", _last_axis_role
    elif isinstance(layer, TRANSPOSED):
        yield "kernel", _transposed
    elif isinstance(layer, DEPTHWISE):
        yield "kernel", lambda shape: Role(OTHER)
    elif isinstance(layer, SEPARABLE):
        yield "depthwise_kernel", lambda shape: Role(OTHER)
        yield "pointwise_kernel", _last_axis_role
    elif isinstance(layer, CONVOLUTIONS):
        yield "_kernel", lambda shape: _convolution(shape, layer.groups)
    elif isinstance(layer, keras.layers.PReLU):
        yield "alpha", lambda shape: Role(OTHER)
    elif (gates := _gates_of(type(layer))) is not None:
        for name in ("kernel", "recurrent_kernel"):
            yield name, lambda shape: _beside_each_other(shape, gates)


def _convolution(shape: Any, groups: int) -> Role:
    if groups > 1 and shape[-2] == 1:  # each filter sees one channel
        return Role(OTHER)
    return _beside_each_other(shape, groups)


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


def _einsum(equation: str, name: str = "") -> Role:
    """Of the kernel in an equation such as `abc,cde->abde`, in a layer of this name."""
    operands, output = equation.replace(" ", "").split("->")
    data, kernel = operands.split(",")
    inputs = tuple(i for i, x in enumerate(kernel) if x in data and x not in output)
    outputs = tuple(i for i, x in enumerate(kernel) if x in output and x not in data)
    if not inputs or not outputs:
        return Role(OTHER)
    pair = next((axes for axes in (inputs, outputs) if len(axes) == 2), None)
    # Attention keeps an axis of the sequence beside that of the batch.
    is_attention = pair is not None and len(data) - len(inputs) >= 2
    if len(kernel) > 3:
        is_attention = is_attention and name == "attention_output"
    return Role(HIDDEN, Matrices(inputs, outputs), pair[0] if is_attention else None)


# --------------------------------------------------------------- output layers


def _heads(model: Any) -> Iterator[tuple[str, Any]]:
    """Each output's name, and the kernel of its layer as far as the graph shows it."""
    for tensor in keras.tree.flatten(getattr(model, "outputs", None) or []):
        name = own_history(tensor)[0].name
        layer = _behind_weightless(tensor)
        while isinstance(layer, keras.layers.Wrapper):
            layer = layer.layer
        if isinstance(layer, keras.Model):
            yield from _heads(layer)
        elif isinstance(layer, keras.layers.Embedding):
            # Tied, and so not trained as an output layer.
            yield name, private_names.attribute(layer, "_embeddings")
        elif layer is None:
            yield name, None
        else:
            yield name, _kernel_of_head(layer, tensor.shape[-1])


def _kernel_of_head(layer: Any, size: int | None) -> Any:
    """The kernel of an output layer, or the embedding that it shares; None: unknown.

    Of a layer that holds others, such as the head of a masked language model, the one
    whose outputs are as many as the model's.
    """
    own = [v for v, role in _roles_of(layer) if role.kind == HIDDEN]
    if own:
        return own[0] if len(own) == 1 else None
    if not isinstance(layer, keras.layers.Layer) or size is None:
        return None
    within = {id(v): (v, role) for x in sublayers(layer) for v, role in _roles_of(x)}
    fits = []
    for variable in layer.weights:
        shape = tuple(variable.shape)
        role = within[id(variable)][1] if id(variable) in within else None
        role = role or role_by_path(path_of(variable), shape)
        is_tied = role.kind == EMBEDDING and shape[0] == size
        is_kernel = role.kind in (HIDDEN, HEAD) and shape[-1] == size
        if is_tied or is_kernel:
            fits.append(variable)
    return fits[0] if len(fits) == 1 else None


def _behind_weightless(tensor: Any) -> Any:
    """The operation with weights that a tensor comes from, through one path."""
    while True:
        operation, inputs = own_history(tensor)
        if getattr(operation, "weights", None):
            return operation
        if len(inputs) != 1:
            return None
        (tensor,) = inputs


# -------------------------------------------------------------------- by path


def role_by_path(path: str, shape: tuple[int, ...]) -> Role:
    """The role as far as Keras's names tell it; heads aren't known by name."""
    *layers, name = path.lower().split("/")
    layer = layers[-1] if layers else ""
    if "embedding" in f"{layer}/{name}":  # A model's name tells nothing.
        return Role(EMBEDDING, _last_axis_out(shape))
    known = "alpha|bias|gamma|beta|scale|lora"
    if len(shape) < 2 or re.search(known, name) or _is_depthwise(path):
        return Role(OTHER)
    if math.prod(shape) == max(shape):
        return Role(OTHER)
    gates = next((n for cell, n in GATES.items() if cell in layer), None)
    if gates is not None:
        return _beside_each_other(shape, gates)
    if len(shape) == 2:
        return _last_axis_role(shape)
    if "kernel" not in name:
        return Role(OTHER)
    if len(shape) == 3 and re.search(r"(^|_)(query|key|value)(_\d+)?$", layer):
        return _einsum("bcd,dhk->bchk")
    if len(shape) == 3 and "attention_output" in layer:
        return _einsum("bchk,hkd->bcd")
    if "transpose" in layer:
        return _transposed(shape)
    if len(shape) > 3 or "conv" in path.lower():
        return _last_axis_role(shape)
    return Role(OTHER)


def _is_depthwise(path: str) -> bool:
    *_, layer, name = ["", *path.lower().split("/")]
    return re.search(DEPTHWISE_NAMES, f"{layer}/{name}") is not None


def input_axes(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes along which the weights of an output unit lie, by Keras's names.

    Of a vector all, whatever axes of 1 it has; of a depthwise convolution those of
    space. What isn't known has its outputs last, or, of three axes, in the last two:
    `(inputs, heads, size)`.
    """
    axes = tuple(range(len(shape)))
    if math.prod(shape) == max(shape, default=1):
        return axes
    if len(shape) > 2 and _is_depthwise(path):
        return axes[:-2]
    matrices = role_by_path(path, shape).matrices
    if matrices is not None:
        return tuple(sorted(matrices.inputs))
    return axes[:1] if len(shape) == 3 else axes[:-1]
