"""What is updated in the benchmarks: lists of tensors, and their gradients."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tensors to update.

    Attributes:
        name: as on the command line.
        title: as in the report.
        shapes: of the trained tensors.
        rows: None, or of how many rows, repeated ones included, the gradient
            consists: that of an embedding.
        replicas: of a `MirroredStrategy`.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    rows: int | None = None
    replicas: int = 1

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def weights(self) -> list[np.ndarray]:
        return [0.02 * x for x in _noise(self.shapes, seed=0)]

    def gradients(self, replica: int = 0) -> list[np.ndarray]:
        """Dense gradients, or for an embedding those of its `rows` rows."""
        shapes = self.shapes
        if self.rows is not None:
            shapes = tuple((self.rows, *shape[1:]) for shape in shapes)
        return _noise(shapes, seed=1 + replica)

    def ids(self) -> np.ndarray:
        """The rows of an embedding that were looked up, a quarter of them again."""
        rng = np.random.default_rng(0)
        distinct = rng.choice(self.shapes[0][0], self.rows * 3 // 4, replace=False)
        again = rng.choice(distinct, self.rows - len(distinct))
        return rng.permutation(np.concatenate([distinct, again])).astype("int32")

    def tiny(self) -> Workload:
        """A few small tensors in the place of these: runs in no time."""
        shapes = tuple(tuple(min(n, 8) for n in shape) for shape in self.shapes[:5])
        rows = None if self.rows is None else 6
        return dataclasses.replace(self, shapes=shapes, rows=rows)


def _noise(shapes: tuple[Shape, ...], seed: int) -> list[np.ndarray]:
    # Drawn once and repeated: hundreds of millions of draws take a minute.
    block = np.random.default_rng(seed).standard_normal(1 << 16, dtype="float32")
    return [np.resize(block, shape) for shape in shapes]


def resnet50() -> list[Shape]:
    """The 214 trainable tensors of `keras.applications.ResNet50`, in its order."""

    def convolution(size: int, inputs: int, outputs: int) -> tuple[list, list]:
        vector = (outputs,)
        return [(size, size, inputs, outputs), vector], [vector, vector]

    def block(inputs: int, width: int, shortcut: bool) -> list[Shape]:
        first = convolution(1, inputs, width)
        second = convolution(3, width, width)
        third = convolution(1, width, 4 * width)
        # Layers run in the order of their depth: the shortcut's beside the third.
        beside = convolution(1, inputs, 4 * width) if shortcut else ([], [])
        shapes = [*first[0], *first[1], *second[0], *second[1]]
        return [*shapes, *beside[0], *third[0], *beside[1], *third[1]]

    kernel, scale = convolution(7, 3, 64)
    shapes = [*kernel, *scale]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for number in range(blocks):
            shapes += block(channels, width, shortcut=number == 0)
            channels = 4 * width
    return [*shapes, (channels, 1000), (1000,)]


def transformer(
    layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024
) -> list[Shape]:
    """The 148 tensors of GPT-2 small: 124.4 M with its tied embedding."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    layer = [*norm, *attention, *norm, *feed_forward]
    return [(vocabulary, width), (context, width), *(layer * layers), *norm]


def hidden_matrices(layers: int = 12, width: int = 768) -> list[Shape]:
    """A Transformer's, each of attention's projections by itself: 72, 84.9 M."""
    wide = (width, 4 * width)
    return [*[(width, width)] * 4, wide, wide[::-1]] * layers


def digits() -> list[Shape]:
    """The 11 tensors of the recipe's CNN for handwritten digits: 53,226."""
    shapes: list[Shape] = []
    for kernel in ((3, 3, 1, 32), (3, 3, 32, 64), (256, 128)):
        scale = kernel[-1:]
        shapes += [kernel, scale, scale]
    return [*shapes, (128, 10), (10,)]


def all_workloads() -> dict[str, Workload]:
    """Name -> workload."""
    workloads = [
        Workload("resnet50", "ResNet-50", tuple(resnet50())),
        Workload("transformer", "GPT-2 small", tuple(transformer())),
        Workload("digits", "The recipe's CNN for digits", tuple(digits())),
        Workload(
            "small_transformer",
            "A Transformer of 6 layers of 128",
            tuple(transformer(layers=6, width=128, vocabulary=512, context=128)),
        ),
        Workload(
            "matrices", "Hidden matrices of GPT-2 small", tuple(hidden_matrices())
        ),
        Workload(
            "layer", "Those of one of its 12 layers", tuple(hidden_matrices(layers=1))
        ),
        Workload("one_tensor", "One tensor of 100 M", ((10_000, 10_000),)),
        Workload(
            "embedding",
            "Embedding 200,000 x 64, 256 ids",
            ((200_000, 64),),
            rows=256,
        ),
        Workload(
            "mirrored",
            "ResNet-50 on 2 mirrored replicas",
            tuple(resnet50()),
            replicas=2,
        ),
    ]
    return {workload.name: workload for workload in workloads}
