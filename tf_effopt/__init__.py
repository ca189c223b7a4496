"""Optimizers for Keras 3 that are correct, compiled and distributed.

>>> import keras, tf_effopt
>>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
>>> model.compile(optimizer=tf_effopt.AdamW(1e-3, weight_decay=0.05), loss="mse")
"""

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    raise ImportError(
        "Keras could not load its backend. Install TensorFlow by one of the extras "
        "`pip install 'tf_effopt[cpu]'`, `[gpu]` or `[tpu]`; or choose a backend "
        "that is installed, by the environment variable KERAS_BACKEND=jax or "
        "KERAS_BACKEND=torch."
    ) from error

from tf_effopt import (
    averaging,
    callbacks,
    distribute,
    hyperparameters,
    optimizers,
    rules,
    transforms,
)
from tf_effopt.base.groups import Group
from tf_effopt.base.loss_scale import LossScaleOptimizer
from tf_effopt.base.optimizer import Optimizer
from tf_effopt.base.roles import roles
from tf_effopt.base.stage import Stage
from tf_effopt.optimizers import (
    SGD,
    SOAP,
    Adafactor,
    Adam,
    AdamW,
    GradientDescent,
    Lamb,
    Lars,
    Lion,
    Muon,
    Nadam,
    Prodigy,
    RAdam,
    RMSprop,
    ScheduleFreeAdamW,
    Yogi,
)
from tf_effopt.runtime import keras_hooks as _keras_hooks

__version__ = "0.2.0.dev0"

__all__ = [
    "SGD",
    "SOAP",
    "Adafactor",
    "Adam",
    "AdamW",
    "GradientDescent",
    "Group",
    "Lamb",
    "Lars",
    "Lion",
    "LossScaleOptimizer",
    "Muon",
    "Nadam",
    "Optimizer",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "Stage",
    "Yogi",
    "averaging",
    "callbacks",
    "distribute",
    "hyperparameters",
    "roles",
    "rules",
    "transforms",
]

_keras_hooks.add_names(
    {f"{__name__}>{name}": getattr(optimizers, name) for name in optimizers.__all__}
)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
