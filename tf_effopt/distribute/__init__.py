"""Training on several devices and hosts, by TensorFlow's `tf.distribute`.

`strategy` makes a strategy by name, `prepare` makes Keras's `fit` right under it,
`divide_matrix_work` and `compress_gradients` choose how replicas work together;
`python -m tf_effopt.distribute.launch` starts several workers on this machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from tf_effopt.communication.compression import compress_gradients
from tf_effopt.communication.matrix_work import divide_matrix_work

__all__ = ["compress_gradients", "divide_matrix_work", "prepare", "strategy"]

_HOMES = {
    "prepare": "tf_effopt.training.fit",
    "strategy": "tf_effopt.distribute.strategies",
}


def __getattr__(name: str) -> Any:
    # On demand: these modules import TensorFlow, which other backends don't need.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"`tf_effopt.distribute.{name}` needs TensorFlow, which isn't installed. "
            "Install it by one of the extras `pip install 'tf_effopt[cpu]'`, "
            "`'tf_effopt[gpu]'` or `'tf_effopt[tpu]'`."
        )
    home = importlib.import_module(_HOMES[name])
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
