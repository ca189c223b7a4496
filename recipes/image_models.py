"""Three small networks for small images."""

from __future__ import annotations

import math
from typing import Any

import keras

from recipes.image_data import ImageData


def make(kind: str, data: ImageData, synchronized: bool) -> keras.Model:
    """Returns a model from uint8 images to logits.

    Args:
        kind: `"mlp"`, `"cnn"` or `"resnet"`.
        data: the set that gives the image's shape and the number of classes.
        synchronized: whether batch statistics are those of all replicas, so that
            they train as one device does.
    """
    body = {"mlp": mlp, "cnn": cnn, "resnet": resnet}[kind]
    inputs = keras.Input(data.image_shape, dtype="uint8")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = body(x, Norm(synchronized))
    # The loss needs float32, whatever the precision of the layers before.
    outputs = keras.layers.Dense(data.classes, dtype="float32")(x)
    return keras.Model(inputs, outputs, name=kind)


class Norm:
    """Batch normalization, after a layer that needs no bias then."""

    def __init__(self, synchronized: bool):
        self.settings = {"momentum": 0.9, "synchronized": synchronized}

    def __call__(self, x: Any) -> Any:
        return keras.layers.BatchNormalization(**self.settings)(x)

    def dense(self, x: Any, units: int) -> Any:
        return self(keras.layers.Dense(units, use_bias=False)(x))

    def conv(self, x: Any, filters: int, strides: int = 1, size: int = 3) -> Any:
        layer = keras.layers.Conv2D(
            filters, size, strides, padding="same", use_bias=False
        )
        return self(layer(x))


def mlp(x: Any, norm: Norm) -> Any:
    x = keras.layers.Flatten()(x)
    for units in (256, 128):
        x = keras.layers.ReLU()(norm.dense(x, units))
        x = keras.layers.Dropout(0.2)(x)
    return x


def cnn(x: Any, norm: Norm) -> Any:
    """Convolutions that each halve the image's sides, down to about 8 pixels."""
    # The first one pools, before its norm, which then has a quarter of the work;
    # the others stride, since bfloat16 convolutions are slow on a CPU.
    x = keras.layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
    x = keras.layers.MaxPooling2D(2, padding="same")(x)
    x = keras.layers.ReLU()(norm(x))
    halvings = max(2, math.ceil(math.log2(min(x.shape[1:3]) / 4)))
    for i in range(1, halvings):
        x = keras.layers.ReLU()(norm.conv(x, min(32 * 2**i, 128), strides=2))
    x = keras.layers.Dropout(0.25)(keras.layers.Flatten()(x))
    x = keras.layers.ReLU()(norm.dense(x, 128))
    return keras.layers.Dropout(0.25)(x)


def resnet(x: Any, norm: Norm) -> Any:
    """A stem and three stages of one residual block (He et al., 2016, section 4.2)."""
    x = keras.layers.ReLU()(norm.conv(x, 16))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        shortcut = x
        x = keras.layers.ReLU()(norm.conv(x, filters, strides))
        x = norm.conv(x, filters)
        if strides > 1:
            shortcut = norm.conv(shortcut, filters, strides, size=1)
        x = keras.layers.ReLU()(keras.layers.Add()([x, shortcut]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.layers.Dropout(0.1)(x)
