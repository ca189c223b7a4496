"""Which tools of `tf.debugging` watch the operations that are made now.

`tf.debugging.enable_check_numerics` and `enable_dump_debug_info` add operations
after each operation of this thread, eager or in a function that is traced. XLA
can't compile them.
"""

from __future__ import annotations

from collections.abc import Callable

from tensorflow.python.eager import context  # There is no public name for it.


def watchers() -> tuple[Callable, ...]:
    """What TensorFlow calls for each operation of this thread."""
    return tuple(getattr(context.context(), "op_callbacks", ()))
