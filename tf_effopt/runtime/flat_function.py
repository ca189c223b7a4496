"""Compiled functions that are called with flat lists of tensors.

`tf.function` examines each argument in Python at each call. For the hundreds of
variables of a model that takes longer than the update of small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from tf_effopt.runtime import private_names
from tf_effopt.runtime.sparse_input import is_sparse

TENSOR = object()  # stands for one in the skeleton of nested arguments


class FlatFunction:
    """A function of `leading` tensors and of nested ones, traced once for each kind.

    Args:
        python_function: `python_function(leading, *arguments)`; the arguments are nested
            dicts, lists and tuples of tensors, sparse gradients, None and strings.
        **options: of `tf.function`.
    """

    def __init__(self, python_function: Callable, **options: Any):
        self._python_function = python_function
        self._options = options
        self._compiled: dict[Hashable, tuple[Callable, list[Any]]] = {}

    @property
    def traces(self) -> int:
        """How often it was traced."""
        return len(self._compiled)

    def __call__(self, leading: list[Any], *arguments: Any) -> Any:
        if tf.config.functions_run_eagerly():
            return self._python_function(leading, *arguments)
        tensors, kinds = flattened(arguments)
        key = tuple(kinds)
        tensors = [*leading, *tensors]
        if key not in self._compiled:
            function = self.of_flat_tensors(len(leading), arguments)
            compiled = function.get_concrete_function(*tensors)
            call = private_names.attribute(compiled, "_call_flat")
            self._compiled[key] = call, compiled.captured_inputs
        call, captured = self._compiled[key]
        return call(tensors, captured)

    def of_flat_tensors(self, leading: int, arguments: tuple) -> Any:
        """The `tf.function` of so many leading tensors, and of those in `arguments`."""
        skeleton = _mapped(lambda _: TENSOR, arguments)

        def function(*tensors: Any) -> Any:
            others = iter(tensors[leading:])
            nested = _mapped(lambda _: next(others), skeleton)
            return self._python_function(list(tensors[:leading]), *nested)

        function.__name__ = self._python_function.__name__  # seen in what XLA dumps
        return function_of(function, **self._options)


def function_of(python_function: Callable, **options: Any) -> Any:
    """A `tf.function` without autograph, and without a warning of many traces."""
    function = tf.function(python_function, autograph=False, **options)
    # Every optimizer traces this code once: that isn't retracing.
    function._omit_frequent_tracing_warning = True
    return function


def flattened(nested: Any) -> tuple[list[Any], list[Hashable]]:
    """The tensors in nested arguments, and what kind of arguments these are."""
    tensors: list[Any] = []
    kinds: list[Hashable] = []

    def visit(x: Any) -> None:
        if isinstance(x, tf.Tensor):
            tensors.append(x)
            kinds.append((x.dtype, x.shape))
        elif isinstance(x, dict):
            kinds.append(tuple(x))
            for value in x.values():
                visit(value)
        elif isinstance(x, list | tuple):
            kinds.append(len(x))
            for value in x:
                visit(value)
        elif is_sparse(x):
            kinds.append("sparse")
            visit((x.values, x.indices, x.dense_shape))
        else:
            kinds.append(x)

    visit(nested)
    return tensors, kinds


def _mapped(function: Callable, nested: Any) -> Any:
    """The same with other tensors, in the order of `flattened`."""
    if isinstance(nested, tf.Tensor) or nested is TENSOR:
        return function(nested)
    if isinstance(nested, dict):
        return {key: _mapped(function, x) for key, x in nested.items()}
    if is_sparse(nested):
        parts = nested.values, nested.indices, nested.dense_shape
        return tf.IndexedSlices(*_mapped(function, parts))
    if isinstance(nested, list | tuple):
        return type(nested)([_mapped(function, x) for x in nested])
    return nested
