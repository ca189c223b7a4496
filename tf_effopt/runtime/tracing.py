"""Variables that are made while a `tf.function` is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from tf_effopt.runtime import private_names

# At which `tf.function` has its say in how variables are made; all others have 100.
PRIORITY_OF_FUNCTIONS = 50


@contextlib.contextmanager
def in_any_trace(optimizer: Any) -> Iterator[None]:
    """Variables are made as outside of each `tf.function` that is being traced.

    It refuses to make them in any but its first trace, also under `tf.init_scope`,
    where they outlive the trace; and traces once more if they were made in its first.
    What strategies and users have to say stays in force.
    """
    graph = tf.compat.v1.get_default_graph()
    creators = private_names.attribute(graph, "_variable_creator_stack")
    is_scaled = optimizer.__dict__.get("_scaled_in_a_graph", False)
    stack = []
    for priority, creator in creators:
        if priority != PRIORITY_OF_FUNCTIONS:
            stack.append((priority, creator))
        elif is_scaled:  # The trace has the scale of now, so another one is needed.
            stack.append((priority, _first_trace_only(creator, optimizer)))
    graph._variable_creator_stack = stack
    try:
        yield
    finally:
        graph._variable_creator_stack = creators


def _first_trace_only(creator: Callable, optimizer: Any) -> Callable:
    def create(next_creator: Callable, **kwargs: Any) -> Any:
        try:
            return creator(next_creator, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"{optimizer.name}: `scale_loss` was called in a `tf.function` "
                "before the optimizer was built, so that the function would keep the "
                "scale of now. TensorFlow traces it anew for what is built in its "
                "first trace, but not for what is built in a later one: call "
                "`optimizer.build(model.trainable_variables)` before the function."
            ) from error

    return create
