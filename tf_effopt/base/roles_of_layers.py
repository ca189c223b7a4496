"""Layer by layer: the weights of Keras's layers that are known by their role."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import keras

from tf_effopt.base.role import (
    CONVOLUTIONS,
    DEPTHWISE,
    EMBEDDING,
    GATES,
    HEAD,
    HIDDEN,
    OTHER,
    SEPARABLE,
    TRANSPOSED,
    Role,
    beside_each_other,
    einsum,
    last_axis_out,
    last_axis_role,
    transposed,
)
from tf_effopt.base.roles_by_path import role_by_path
from tf_effopt.runtime import private_names
from tf_effopt.runtime.keras_hooks import own_history, sublayers
from tf_effopt.state.variables import path_of


def roles_of(layer: Any) -> Iterator[tuple[Any, Role]]:
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
        yield "_embeddings", lambda shape: Role(EMBEDDING, last_axis_out(shape))
        yield "reverse_embeddings", lambda shape: Role(HEAD)
    elif isinstance(layer, keras.layers.EinsumDense):
        yield "_kernel", lambda shape: einsum(layer.equation, layer.name)
    elif isinstance(layer, keras.layers.Dense):
        yield "_kernel", last_axis_role
    elif isinstance(layer, TRANSPOSED):
        yield "kernel", transposed
    elif isinstance(layer, DEPTHWISE):
        yield "kernel", lambda shape: Role(OTHER)
    elif isinstance(layer, SEPARABLE):
        yield "depthwise_kernel", lambda shape: Role(OTHER)
        yield "pointwise_kernel", last_axis_role
    elif isinstance(layer, CONVOLUTIONS):
        yield "_kernel", lambda shape: _convolution(shape, layer.groups)
    elif isinstance(layer, keras.layers.PReLU):
        yield "alpha", lambda shape: Role(OTHER)
    elif (gates := _gates_of(type(layer))) is not None:
        for name in ("kernel", "recurrent_kernel"):
            yield name, lambda shape: beside_each_other(shape, gates)


def _convolution(shape: Any, groups: int) -> Role:
    if groups > 1 and shape[-2] == 1:  # each filter sees one channel
        return Role(OTHER)
    return beside_each_other(shape, groups)


def _gates_of(cls: type) -> int | None:
    names = [_snake_case(base.__name__) for base in cls.__mro__]
    return next((GATES[name] for name in names if name in GATES), None)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


# --------------------------------------------------------------- output layers


def output_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Each output's name, and the kernel of its layer as far as the graph shows it."""
    for tensor in keras.tree.flatten(getattr(model, "outputs", None) or []):
        name = own_history(tensor)[0].name
        layer = _behind_weightless(tensor)
        while isinstance(layer, keras.layers.Wrapper):
            layer = layer.layer
        if isinstance(layer, keras.Model):
            yield from output_layers(layer)
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
    own = [v for v, role in roles_of(layer) if role.kind == HIDDEN]
    if own:
        return own[0] if len(own) == 1 else None
    if not isinstance(layer, keras.layers.Layer) or size is None:
        return None
    within = {id(v): (v, role) for x in sublayers(layer) for v, role in roles_of(x)}
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
