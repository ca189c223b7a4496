"""Which tools of `tf.debugging` watch the operations that are made now.

`tf.debugging.enable_check_numerics` and `enable_dump_debug_info` add operations
after each operation of this thread, eager or in a function that is traced. XLA
can't compile them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tf_effopt.runtime import private_names


def watchers() -> tuple[Callable, ...]:
    """What TensorFlow calls for each operation of this thread."""
    return tuple(_context_function()().op_callbacks)


@functools.cache
def _context_function() -> Callable:
    function = private_names.EAGER_CONTEXT.get()
    private_names.attribute(function(), "op_callbacks")
    return function
