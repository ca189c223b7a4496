"""The roles of weights as far as the names of Keras's variables tell them."""

from __future__ import annotations

import math
import re

from tf_effopt.base.role import (
    DEPTHWISE_NAMES,
    EMBEDDING,
    GATES,
    OTHER,
    Role,
    beside_each_other,
    einsum,
    last_axis_out,
    last_axis_role,
    transposed,
)


def role_by_path(path: str, shape: tuple[int, ...]) -> Role:
    """The role as far as Keras's names tell it; heads aren't known by name."""
    *layers, name = path.lower().split("/")
    layer = layers[-1] if layers else ""
    if "embedding" in f"{layer}/{name}":  # A model's name tells nothing.
        return Role(EMBEDDING, last_axis_out(shape))
    known = "alpha|bias|gamma|beta|scale|lora"
    if len(shape) < 2 or re.search(known, name) or _is_depthwise(path):
        return Role(OTHER)
    if math.prod(shape) == max(shape):
        return Role(OTHER)
    gates = next((n for cell, n in GATES.items() if cell in layer), None)
    if gates is not None:
        return beside_each_other(shape, gates)
    if len(shape) == 2:
        return last_axis_role(shape)
    if "kernel" not in name:
        return Role(OTHER)
    if len(shape) == 3 and re.search(r"(^|_)(query|key|value)(_\d+)?$", layer):
        return einsum("bcd,dhk->bchk")
    if len(shape) == 3 and "attention_output" in layer:
        return einsum("bchk,hkd->bcd")
    if "transpose" in layer:
        return transposed(shape)
    if len(shape) > 3 or "conv" in path.lower():
        return last_axis_role(shape)
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
