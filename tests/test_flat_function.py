"""Functions that are called with flat lists of tensors."""

from __future__ import annotations

import gc
import weakref

import pytest
import tensorflow as tf

from tf_effopt.runtime.flat_function import FlatFunction

ONE, TWO = tf.constant(1.0), tf.constant(2.0)


def description(leading, *nested):
    """Tensors added up in an order, and with weights, that tell where each was."""
    total = leading[0]

    def visit(x, weight):
        nonlocal total
        if isinstance(x, dict):
            for key in sorted(x):
                visit(x[key], weight * len(key))
        elif isinstance(x, list | tuple):
            for i, value in enumerate(x):
                visit(value, weight * (i + 2))
        elif isinstance(x, tf.IndexedSlices):
            total = total + weight * tf.reduce_sum(x.values) + len(x.indices.shape)
        elif x is not None and not isinstance(x, str):
            total = total + weight * tf.cast(x, "float32")

    visit(nested, 1.0)
    return {"total": total, "nested": (leading[0], [total])}


ARGUMENTS = {
    "a_list": ([ONE, TWO],),
    "one_is_missing": ([None, TWO],),
    "another_is_missing": ([TWO, None],),
    "a_tuple": ((ONE, TWO), TWO),
    "dicts": ({"b": ONE, "aa": {"c": TWO}}, {}),
    "other_keys": ({"bbb": ONE, "aa": {"c": TWO}}, {}),
    "a_phase": ("norms", [ONE]),
    "another_phase": ("sums", [ONE]),
    "rows": (tf.IndexedSlices(tf.ones((2, 3)), tf.constant([0, 1])), ONE),
    "another_dtype": ([tf.constant(1, "int32"), TWO],),
}


@pytest.mark.parametrize("way", ["eager", "graph", "run_eagerly"])
def test_it_returns_what_the_function_does(way, request):
    compiled = FlatFunction(description, jit_compile=True)
    if way == "run_eagerly":
        tf.config.run_functions_eagerly(True)
        request.addfinalizer(lambda: tf.config.run_functions_eagerly(False))
    call = tf.function(compiled) if way == "graph" else compiled
    for arguments in ARGUMENTS.values():
        expected = description([TWO], *arguments)
        found = call([TWO], *arguments)
        tf.nest.map_structure(tf.debugging.assert_near, found, expected)


def test_it_traces_once_for_each_kind():
    compiled = FlatFunction(description)
    for _ in range(2):
        for arguments in ARGUMENTS.values():
            compiled([TWO], *arguments)
    assert compiled.traces == len(ARGUMENTS)


def test_shapes_are_kinds():
    compiled = FlatFunction(lambda leading, x: tf.reduce_sum(x), jit_compile=True)
    for n in (2, 3, 2):
        assert float(compiled([], tf.ones(n))) == n
    assert compiled.traces == 2


def test_it_keeps_no_tensor():
    compiled = FlatFunction(description)
    passed = tf.constant(3.0)
    compiled([TWO], [passed])
    reference = weakref.ref(passed)
    del passed
    gc.collect()
    assert reference() is None
