"""The optimizers, the stages, and one small model, that several test files go over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import tf_effopt
from tf_effopt.averaging import Lookahead
from tf_effopt.transforms import (
    MARS,
    AdaptiveClipping,
    Cautious,
    GradientCentralization,
    GradientNoise,
    SkipSpikes,
    ZClip,
)


@dataclass(frozen=True)
class Case:
    """One optimizer with its settings.

    Attributes:
        name: names the test.
        make: makes ours; takes further arguments, and other values of its own.
        keras: makes Keras's counterpart, or None where it has none.
        same_decay: whether its weight decay, too, is that of the counterpart.
    """

    name: str
    make: Callable[..., tf_effopt.Optimizer]
    keras: Callable[..., keras.optimizers.Optimizer] | None
    same_decay: bool = True


def _case(
    name: str,
    class_name: str,
    same: bool = True,
    same_decay: bool = True,
    **settings: Any,
) -> Case:
    """`same` tells whether Keras's class of this name has the same rule."""
    theirs = getattr(keras.optimizers, class_name, None) if same else None
    return Case(
        name,
        make=functools.partial(getattr(tf_effopt, class_name), **settings),
        keras=theirs and functools.partial(theirs, **settings),
        same_decay=same_decay,
    )


CASES = [
    _case("gradient_descent", "GradientDescent", learning_rate=0.01),
    _case("sgd", "SGD", learning_rate=0.01),
    _case("nesterov", "SGD", learning_rate=0.01, momentum=0.9, nesterov=True),
    _case("adam", "Adam", learning_rate=0.01),
    _case("amsgrad", "Adam", learning_rate=0.01, amsgrad=True),
    _case("adamw", "AdamW", learning_rate=0.01, weight_decay=0.1),
    _case("rmsprop", "RMSprop", learning_rate=0.01, momentum=0.9, centered=True),
    _case("lion", "Lion", learning_rate=0.01),
    _case("radam", "RAdam", learning_rate=0.01),
    _case("nadam", "Nadam", learning_rate=0.01),
    # Keras's decays outside the trust ratio.
    _case("lamb", "Lamb", same_decay=False, learning_rate=0.01),
    _case("lamb_decay", "Lamb", same=False, learning_rate=0.01, weight_decay=0.1),
    _case(
        "lars",
        "Lars",
        learning_rate=0.01,
        trust_coefficient=0.1,
        weight_decay=0.1,
        exclude_from_adaptation=["bias"],
    ),
    # Keras's keeps the whole second moment, and is always relative.
    _case("adafactor", "Adafactor", same=False, learning_rate=0.01),
    _case(
        "adafactor_absolute",
        "Adafactor",
        same=False,
        learning_rate=0.01,
        relative_step=False,
    ),
    _case("muon", "Muon", learning_rate=0.01),
    # Its rate is a factor of the estimate, which makes them those of the others.
    _case("prodigy", "Prodigy", learning_rate=1.0, initial_estimate=0.1),
    _case("yogi", "Yogi", learning_rate=0.01),
    # Keras's keeps other tensors, and loses the weights in `fit`.
    _case("schedule_free_adamw", "ScheduleFreeAdamW", same=False, learning_rate=0.01),
    _case("soap", "SOAP", learning_rate=0.01, precondition_frequency=3),
]
BY_NAME = {case.name: case for case in CASES}
# One of each kind, of those with matrices, model-wide numbers, state of another shape or
# from the weights: what the test command runs where `-m slow` runs all.
KINDS = ("sgd", "adam", "adafactor", "muon", "prodigy", "schedule_free_adamw")
WITH_COUNTERPART = [case for case in CASES if case.keras]

# With settings such that a few steps show them.
TRANSFORMS = {
    "adaptive_clipping": lambda: AdaptiveClipping(0.05, exclude=["second"]),
    "zclip": lambda: ZClip(z_threshold=0.5, decay=0.9, warmup_steps=3),
    "gradient_noise": lambda: GradientNoise(0.01, seed=3),
    "gradient_centralization": GradientCentralization,
    "cautious": Cautious,
    "mars": lambda: MARS(0.2, beta_1=0.8),
    "skip_spikes": lambda: SkipSpikes(factor=1.01, decay=0.5, warmup_steps=2),
}


class SentMomentum(tf_effopt.Stage):
    """Linear, so that the sum over replicas is that of one."""

    where = "sent"
    slots = tf_effopt.rules.Slots(m="sent_momentum")

    @staticmethod
    def function(g, slots):
        m = 0.5 * slots["m"] + g
        return m, {"m": m}


AVERAGES = {"lookahead": lambda: Lookahead(period=3, step_size=0.6)}

# Name -> arguments of an optimizer with one stage.
STAGES = {
    name: lambda make=make: {"transforms": [make()]}
    for name, make in TRANSFORMS.items()
}
STAGES |= {
    name: lambda make=make: {"averaging": make()} for name, make in AVERAGES.items()
}

rng = np.random.default_rng(0)
X = rng.normal(size=(16, 4)).astype("float32")
Y = (X @ rng.normal(size=(4, 2)) + 0.1).astype("float32")


def small_model(dtype: str | None = None) -> keras.Sequential:
    """Two dense layers, the same weights and paths at each call."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            _dense(3, seed=1, name="first", activation="tanh", dtype=dtype),
            _dense(2, seed=2, name="second", dtype=dtype),
        ],
        name="small",
    )


def _dense(units: int, seed: int, **kwargs: Any) -> keras.layers.Dense:
    initializer = keras.initializers.GlorotUniform(seed=seed)
    return keras.layers.Dense(units, kernel_initializer=initializer, **kwargs)


def compiled_model(
    optimizer: Any, model: keras.Model | None = None, loss: Any = "mse"
) -> keras.Model:
    """Compiles the model for `optimizer`; the update alone goes through XLA."""
    model = model or small_model()
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False)
    return model


def train(model: keras.Model, steps: int) -> keras.Model:
    """Trains on the same batch, `steps` times."""
    for _ in range(steps):
        model.train_on_batch(X, Y)
    return model


def falling(start: float, end: float = 0.0, steps: int = 8) -> Any:
    """A schedule that falls from `start` to `end` in so many steps."""
    return keras.optimizers.schedules.PolynomialDecay(start, steps, end)


def arrays(variables: Any) -> list[np.ndarray]:
    """The values now, of a model's or an optimizer's variables."""
    return [keras.ops.convert_to_numpy(v).copy() for v in variables]


def weights_after(
    optimizer: Any, gradients: Any, start: float = 0.0, dtype: str = "float32"
) -> list[np.ndarray]:
    """A weight after each update by one of the gradients, on TensorFlow."""
    w = keras.Variable(np.full(np.shape(gradients[0]), start), dtype=dtype)
    weights = []
    for g in gradients:
        g = keras.ops.convert_to_tensor(np.array(g), "float32")
        optimizer.apply([g], [w])
        weights.append(keras.ops.convert_to_numpy(w).astype("float64"))
    return weights


def programs_of(optimizer: tf_effopt.Optimizer) -> list[Any]:
    """The compiled updates that it has, one for each replica and device."""
    return [p for ps in optimizer._engine.programs.by_set.values() for p in ps]


def traces(optimizer: tf_effopt.Optimizer) -> list[int]:
    """How often each of them was traced, for all optimizers that share it."""
    programs = programs_of(optimizer)
    return [p.update.run.traces for p in programs]


def by_name(case: Case) -> str:
    """For `pytest.mark.parametrize(ids=...)`."""
    return case.name
