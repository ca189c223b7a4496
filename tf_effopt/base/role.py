"""What a weight is to its layer, and how its shape is looked at as matrices."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

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


def last_axis_out(shape: Any) -> Matrices | None:
    last = len(shape) - 1
    return Matrices(tuple(range(last)), (last,)) if last > 0 else None


def last_axis_role(shape: Any) -> Role:
    return Role(HIDDEN, last_axis_out(shape))


def beside_each_other(shape: Any, count: int) -> Role:
    """Of `count` matrices side by side in the last axis: gates, groups."""
    if count == 1:
        return last_axis_role(shape)
    *first, last = shape
    split = (*first, count, last // count)
    return Role(HIDDEN, Matrices(tuple(range(len(first))), (len(first) + 1,), split))


def transposed(shape: Any) -> Role:
    """Of a transposed convolution, whose last two axes are outputs, inputs."""
    *space, outputs, inputs = range(len(shape))
    return Role(HIDDEN, Matrices((*space, inputs), (outputs,)))


def einsum(equation: str, name: str = "") -> Role:
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
