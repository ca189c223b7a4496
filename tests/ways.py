"""Trains one model in every way to run, and saves what came out.

    python tests/ways.py eager,graph,fit few OUTPUT.npz

`few` are the runs of the test command, `others` the rest.

Run in a separate process: the backend (KERAS_BACKEND), the devices and, with
`--without-tensorflow`, what can be imported are chosen at its start.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "--without-tensorflow" in sys.argv:
    sys.modules["tensorflow"] = None  # `import tensorflow` now fails.

import keras
import numpy as np
from cases import CASES, SentMomentum, falling

import tf_effopt

BATCH, STEPS = 8, 20
# Where variables are placed is nothing to a rule: one of each kind will do, of those
# with matrices, model-wide numbers, state of another shape or from the weights.
PLACED = ("elsewhere", "one_device")
KINDS = ("adam", "adafactor", "muon", "prodigy", "schedule_free_adamw", "soap")
FEW = ("adam-accumulation", "adam-slots", "muon-all_at_once", "prodigy-all_at_once")
# Several options at once.
OPTIONS = {
    "all_at_once": {
        "global_clipnorm": 0.5,
        "weight_decay": 0.02,
        "use_ema": True,
        "ema_momentum": 0.8,
        "ema_overwrite_frequency": 7,
    },
    "accumulation": {
        "clipnorm": 0.2,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "loss_scale_factor": 4.0,
    },
    "clipvalue": {"clipvalue": 0.05},
    # Gradients whose squares overflow in float32.
    "large": {"loss_factor": 1e25, "global_clipnorm": 0.5},
    "large_accumulated": {
        "loss_factor": 1e25,
        "clipnorm": 0.2,
        "gradient_accumulation_steps": 2,
    },
    "large_units": {
        "loss_factor": 1e25,
        "transforms": lambda: [tf_effopt.transforms.AdaptiveClipping(0.05)],
    },
    "groups": {"global_clipnorm": 0.5, "use_ema": True, "groups": lambda: groups()},
    # Stages with slots, before the sum over replicas, before the rule and after it;
    # numbers by a schedule.
    "slots": {
        "global_clipnorm": 0.5,
        "weight_decay": lambda: falling(0.02, 0.005, steps=15),
        "transforms": lambda: [
            tf_effopt.transforms.MARS(0.2, beta_1=0.8),
            SentMomentum(),
        ],
        "averaging": lambda: tf_effopt.averaging.Lookahead(
            3, falling(0.8, 0.4, steps=15)
        ),
    },
}
# Each case runs with these, "adam" with all.
OF_EACH = ("all_at_once", "slots")


def groups() -> list[tf_effopt.Group]:
    """New ones for each optimizer."""
    return [
        tf_effopt.Group("matrix", learning_rate_multiplier=0.5),
        tf_effopt.Group(["long", "matrix", "unused"], weight_decay=0.05),
        tf_effopt.Group("row", frozen=True),
    ]


def runs(chosen: str) -> list[tuple]:
    """(name, case, options) of each training; cases that it makes equal, once."""
    made, seen = [], []
    for case in CASES:
        # Its rate is a schedule, which Adafactor takes as it is.
        same = {"learning_rate": None, "relative_step": None}
        key = case.make.func, case.make.keywords | same | OPTIONS["all_at_once"]
        for name, options in OPTIONS.items():
            is_new = name in OF_EACH and key not in seen
            if is_new or (case.name == "adam" and name not in OF_EACH):
                made.append((f"{case.name}-{name}", case, options))
        seen.append(key)
    assert set(FEW) <= {name for name, _, _ in made}
    return [run for run in made if (run[0] in FEW) == (chosen == "few")]


@keras.saving.register_keras_serializable("tests")
class OddShapes(keras.layers.Layer):
    """Weights of odd shapes, one of them frozen, one without a gradient."""

    def __init__(self, elsewhere: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.elsewhere = elsewhere

    def build(self, shape):
        def add(name, shape, seed, trainable=True):
            # NumPy's numbers are the same on all backends.
            start = np.random.default_rng(seed).normal(scale=0.5, size=shape)
            return self.add_weight(
                shape=shape,
                initializer=lambda shape, dtype: keras.ops.cast(start, dtype),
                name=name,
                trainable=trainable,
            )

        self.matrix = add("matrix", (5, 3), 1)
        with self.device():
            self.long = add("long", (4097,), 2)
        self.scale = add("scale", (), 3)
        self.frozen = add("frozen", (3,), 4, trainable=False)
        self.unused = add("unused", (2,), 5)
        self.row = add("row", (1, 3), 6)

    def device(self):
        if self.elsewhere is None:
            return keras.name_scope("here")
        import tensorflow as tf

        return tf.device(self.elsewhere)

    def call(self, x):
        ops = keras.ops
        # One long gradient that differs by element, without a large matmul.
        waves = ops.sin(ops.arange(4097, dtype="float32") * 0.01)
        level = ops.sum(self.long * waves) * 0.02
        y = ops.matmul(x, self.matrix) * (1.0 + self.scale) + self.row
        return y + self.frozen + level


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * STEPS, 5)).astype("float32")
    return x, (x @ rng.normal(size=(5, 3)) + 3.0).astype("float32")


def make_model(case, options, elsewhere=None, jit_compile="auto"):
    layers = [keras.Input((5,)), OddShapes(elsewhere, name="odd")]
    model = keras.Sequential(layers, name="model")
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 5, 0.8)
    options = {k: x() if callable(x) else x for k, x in options.items()}
    factor = options.pop("loss_factor", None)
    optimizer = case.make(**{**options, "learning_rate": rate})
    # JAX has no missing gradient: there it is 0, and decay would act.
    optimizer.exclude_from_weight_decay(var_names=["unused"])
    model.compile(
        optimizer=optimizer, loss="mse", loss_weights=factor, jit_compile=jit_compile
    )
    model.loss_factor = factor or 1.0
    return model


def fit(model):
    x, y = data()
    model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return model


def way_fit(case, options):
    return fit(make_model(case, options))


def way_fit_jit(case, options):
    return fit(make_model(case, options, jit_compile=True))


def way_elsewhere(case, options):
    return fit(make_model(case, options, elsewhere="CPU:1"))


def way_one_device(case, options):
    import tensorflow as tf

    with tf.distribute.OneDeviceStrategy("CPU:1").scope():
        model = make_model(case, options)
    return fit(model)


def way_mirrored(case, options):
    import tensorflow as tf

    with tf.distribute.MirroredStrategy().scope():
        model = make_model(case, options)
    return fit(model)


def way_eager(case, options, function=lambda f: f):
    import tensorflow as tf

    model = make_model(case, options)
    optimizer, variables = model.optimizer, model.trainable_variables

    @function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = keras.losses.MeanSquaredError()(y, model(x))
            loss = optimizer.scale_loss(loss) * model.loss_factor
        optimizer.apply(tape.gradient(loss, variables), variables)

    for x, y in batches():
        step(tf.constant(x), tf.constant(y))
    optimizer.finalize_variable_values(variables)
    return model


def way_graph(case, options):
    import tensorflow as tf

    return way_eager(case, options, tf.function)


def way_stateless(case, options):
    import jax

    model = make_model(case, options)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)

    def loss_of(weights, others, state, x, y):
        predicted, _ = model.stateless_call(weights, others, x)
        loss = keras.losses.MeanSquaredError()(y, predicted)
        return loss * (optimizer.loss_scale_factor or 1.0) * model.loss_factor

    @jax.jit
    def step(weights, others, state, x, y):
        gradients = jax.grad(loss_of)(weights, others, state, x, y)
        return optimizer.stateless_apply(state, gradients, weights)

    weights = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]
    state = [v.value for v in optimizer.variables]
    for x, y in batches():
        weights, state = step(weights, others, state, x, y)
    for v, value in zip(model.trainable_variables, weights, strict=True):
        v.assign(value)
    for v, value in zip(optimizer.variables, state, strict=True):
        v.assign(value)
    optimizer.finalize_variable_values(model.trainable_variables)
    return model


def batches():
    x, y = data()
    for i in range(STEPS):
        part = slice(i * BATCH, (i + 1) * BATCH)
        yield x[part], y[part]


def outcome(model) -> dict[str, np.ndarray]:
    """The weights, and the state under Keras's names."""
    found = {f"weight/{v.name}": v for v in model.weights}
    found |= {
        f"state/{i}/{v.name}": v
        for i, v in enumerate(model.optimizer.variables)
        if v.name != "learning_rate"
    }
    return {k: keras.ops.convert_to_numpy(v) for k, v in found.items()}


def main() -> None:
    ways, chosen, output = sys.argv[1].split(","), *sys.argv[2:4]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
    saved = {}
    for way in ways:
        for name, case, options in runs(chosen):
            if way in PLACED and case.name not in KINDS:
                continue
            model = globals()[f"way_{way}"](case, options)
            for key, value in outcome(model).items():
                saved[f"{way}|{name}|{key}"] = value
    assert ("tensorflow" in sys.modules and sys.modules["tensorflow"] is None) or (
        "--without-tensorflow" not in sys.argv
    )
    np.savez(output, **saved)


if __name__ == "__main__":
    main()
