"""What is lost to rounding: nothing in float64, almost nothing in bfloat16."""

from __future__ import annotations

from typing import Any

import cases
import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf
from cases import BY_NAME, CASES, KINDS, arrays
from golden_certificates import with_signs_of
from keras import ops

from tf_effopt.hyperparameters import Decay
from tf_effopt.state import precision, random

every_case = pytest.mark.parametrize("case", CASES, ids=cases.by_name)

# ------------------------------------------------------------------ training

RATES = [1e-2, 1e-3]
TRAINING_STEPS = 300
rng = np.random.default_rng(7)
INPUTS = rng.normal(size=(32, 6)).astype("float32")
SLOPES = rng.uniform(1.0, 2.0, (6, 3)).astype("float32")
TARGETS = INPUTS @ SLOPES + 1.0
START = [
    SLOPES + rng.choice([-0.5, 0.5], (6, 3)),
    rng.uniform(1.0, 2.0, 3),
]


def gradients_of_regression(w: Any, b: Any) -> list[Any]:
    """Of half the mean squared error, in the dtype of the weights."""
    error = INPUTS @ tf.cast(w, "float32") + tf.cast(b, "float32") - TARGETS
    slopes = tf.transpose(INPUTS) @ error / len(INPUTS)
    return [tf.cast(slopes, w.dtype), tf.cast(tf.reduce_mean(error, 0), b.dtype)]


class Regressions:
    """The same regression, side by side in float32 and a narrow dtype."""

    def __init__(self, optimizer: Any, narrow: str = "bfloat16"):
        self.optimizer = optimizer
        self.weights = {
            dtype: [keras.Variable(w, dtype=dtype) for w in START]
            for dtype in ("float32", narrow)
        }
        self.variables = [w for pair in self.weights.values() for w in pair]
        optimizer.build(self.variables)
        self.initial = arrays(self.variables + optimizer.variables)

    @tf.function
    def _train(self) -> None:
        for _ in tf.range(TRAINING_STEPS):
            gradients = []
            for pair in self.weights.values():
                gradients += gradients_of_regression(*pair)
            self.optimizer.apply(gradients, self.variables)

    def loss(self, dtype: str) -> float:
        w, b = (np.array(w.numpy(), "float64") for w in self.weights[dtype])
        return float(np.mean((INPUTS @ w + b - TARGETS) ** 2))

    def share_of_loss_drop(self, learning_rate: float) -> float:
        """What the narrow weights' loss falls, per what the wide ones' falls."""
        variables = self.variables + self.optimizer.variables
        for variable, value in zip(variables, self.initial, strict=True):
            variable.assign(value)
        self.optimizer.learning_rate = learning_rate
        wide, narrow = self.weights
        before = {dtype: self.loss(dtype) for dtype in (wide, narrow)}
        self._train()
        drop = before[wide] - self.loss(wide)
        assert drop > 0.05
        return (before[narrow] - self.loss(narrow)) / drop


@pytest.mark.representatives(
    "*-sgd", "*-adam", "*-muon", "compensated-adafactor", "compensated-prodigy"
)
@every_case
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_bfloat16_loses_at_least_80_percent_of_what_float32_loses(case, rounding):
    regressions = Regressions(case.make(rounding=rounding))
    for rate in RATES:
        assert regressions.share_of_loss_drop(rate) >= 0.8


def test_float16_trains_as_well():
    regressions = Regressions(BY_NAME["adam"].make(), "float16")
    assert regressions.share_of_loss_drop(1e-3) >= 0.8


def test_nearest_rounding_loses_small_steps():
    regressions = Regressions(BY_NAME["adam"].make(rounding="nearest"))
    regressions.share_of_loss_drop(1e-3)
    values = arrays(regressions.weights["bfloat16"])
    starts = [tf.cast(w, "bfloat16").numpy() for w in START]
    for value, start in zip(values, starts, strict=True):
        # Numbers from 1 on have steps of 1/128; Adam's are of about 1/1000.
        above_one = start > 1
        assert above_one.any()
        np.testing.assert_array_equal(value[above_one], start[above_one])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_of_keras_does_not_train_bfloat16(name):
    regressions = Regressions(getattr(keras.optimizers, name)())
    for rate in RATES:
        assert not regressions.share_of_loss_drop(rate) >= 0.8


def test_model_of_bfloat16_trains_in_fit():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = cases.small_model(dtype=dtype)
        cases.compiled_model(BY_NAME["adam"].make(learning_rate=1e-3), model)
        inputs = tf.data.Dataset.from_tensors((cases.X, cases.Y)).repeat(200)
        history = model.fit(inputs, epochs=2, steps_per_epoch=100, verbose=0).history
        losses[dtype] = history["loss"][0] - history["loss"][1]
        assert {w.dtype for w in model.weights} == {dtype}
    assert losses["float32"] > 0.1
    assert losses["bfloat16"] >= 0.8 * losses["float32"]


# ------------------------------------------------------- stochastic rounding

DRAWS = 4096


def stored(values: Any, dtype: str, update: int = 1) -> np.ndarray:
    """`DRAWS` writes of each of `values`, as float64."""
    many = np.repeat(np.array(values, "float32")[:, None], DRAWS, axis=1)
    bits = random.bits(many.shape, ops.convert_to_tensor(update), 0)
    stored = precision.store(ops.convert_to_tensor(many), dtype, bits)
    assert stored.dtype == dtype
    return np.array(stored, "float64")


def neighbours(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of `dtype` next to each value, below and above, or itself."""
    bits = {"bfloat16": 7, "float16": 10}[dtype]
    lowest = {"bfloat16": -126, "float16": -14}[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-200)))
    spacing = 2.0 ** (np.maximum(exponent, lowest) - bits)
    return np.floor(values / spacing) * spacing, np.ceil(values / spacing) * spacing


ranges = np.random.default_rng(3)
SIGNS = ranges.choice([-1.0, 1.0], 64)
VALUES = {
    "bfloat16": SIGNS * ranges.uniform(1, 2, 64) * 2.0 ** ranges.integers(-60, 60, 64),
    "float16": SIGNS * ranges.uniform(1, 2, 64) * 2.0 ** ranges.integers(-14, 15, 64),
    "float16 subnormal": SIGNS * ranges.uniform(0, 1, 64) * 2.0**-14,
}


@pytest.mark.parametrize("kind", VALUES)
def test_stochastic_rounding_goes_to_a_neighbour_and_is_unbiased(kind):
    dtype = kind.partition(" ")[0]
    values = VALUES[kind].astype("float32").astype("float64")
    low, high = neighbours(values, dtype)
    written = stored(values, dtype)
    at_low, at_high = written == low[:, None], written == high[:, None]
    assert np.all(at_low | at_high)
    inexact = low < high
    assert inexact.sum() > 50
    # Each write is p (1 - p) spread; 5 standard deviations of the mean, and
    # the 2**-16 in steps of which the chance comes.
    chance = (values - low) / np.where(inexact, high - low, 1)
    bound = 5 * np.sqrt(chance * (1 - chance) / DRAWS) + 2.0**-13
    error = np.abs(np.mean(at_high & inexact[:, None], axis=1) - chance)
    assert np.all(error <= bound)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_representable_numbers_are_never_moved(dtype):
    values = np.array(tf.cast(VALUES[dtype], dtype), "float64")
    values = np.append(values, [0.0, 1.0, -1.0, 0.5])
    for update in range(1, 20):
        written = stored(values, dtype, update)
        np.testing.assert_array_equal(written, np.repeat(values[:, None], DRAWS, 1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_infinities_and_nan_pass_through(dtype, compiled):
    values = tf.constant([np.inf, -np.inf, np.nan], "float32")
    bits = tf.constant([0, 65535, 30000])

    @tf.function(jit_compile=compiled)
    def write() -> Any:
        return precision.store(values, dtype, bits)

    written = np.array(write(), "float64")
    np.testing.assert_array_equal(written, [np.inf, -np.inf, np.nan])


@pytest.mark.parametrize("value", [65504.0, 65510.0, 65519.0, -65519.0])
def test_nothing_is_rounded_up_to_infinity(value):
    bits = tf.constant([0, 1000, 40000, 65535])
    written = np.array(precision.store(tf.fill([4], value), "float16", bits))
    np.testing.assert_array_equal(written, np.sign(value) * 65504.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_weights_are_written_exactly(dtype):
    values = tf.constant([1 / 3, 1e-30, 3e30], dtype)
    np.testing.assert_array_equal(precision.store(values, dtype), values)


def test_compensation_keeps_what_was_lost():
    w = keras.Variable([1.0], dtype="bfloat16")
    optimizer = BY_NAME["sgd"].make(learning_rate=2.0**-12, rounding="compensated")
    for _ in range(64):
        optimizer.apply([tf.ones(1, "bfloat16")], [w])
    compensation = optimizer._engine.state[0]["compensation"]["lost"]
    total = float(w.numpy()[0]) + float(compensation.numpy()[0])
    assert total == 1.0 - 64 * 2.0**-12
    assert abs(float(w.numpy()[0]) - total) <= 2.0**-9


# --------------------------------------------------------------- random bits


def mix(x: np.ndarray) -> np.ndarray:
    """lowbias32, Wellons, "Prospecting for Hash Functions", 2018."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def reference_bits(size: int, update: int, variable: int) -> np.ndarray:
    stream = (update + 0x9E3779B9 * (variable + 1)) % 2**32
    key = mix(np.array([stream], "uint32"))
    return mix(mix(np.arange(size, dtype="uint32")) ^ key) & np.uint32(0xFFFF)


def random_bits(size: int, update: int, variable: int) -> np.ndarray:
    update = ops.convert_to_tensor(update, "int32")
    return ops.convert_to_numpy(random.bits((size,), update, variable))


@pytest.mark.parametrize("update", [1, 2, 1000, 2**31 - 1])
@pytest.mark.parametrize("variable", [0, 1, 2, 399])
def test_random_bits_are_the_same_everywhere(update, variable):
    expected = reference_bits(5000, update, variable)
    np.testing.assert_array_equal(random_bits(5000, update, variable), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_random_bits_are_the_same_in_a_graph(compiled):
    @tf.function(jit_compile=compiled)
    def bits(update: Any) -> Any:
        return random.bits((50, 100), update, 17)

    for update in (1, 2, 77777):
        expected = reference_bits(5000, update, 17).reshape(50, 100)
        np.testing.assert_array_equal(bits(tf.constant(update)), expected)


def test_random_bits_of_rows_are_those_of_their_table():
    table = reference_bits(7 * 3, 5, 2).reshape(7, 3)
    elements = ops.convert_to_tensor([[12, 13, 14], [0, 1, 2]], "int32")
    rows = random.bits_of(elements, ops.convert_to_tensor(5), 2)
    np.testing.assert_array_equal(rows, table[[4, 0]])


def test_random_bits_are_uniform():
    bits = random_bits(2**16, 3, 0)
    assert bits.min() >= 0 and bits.max() < 2**16
    counts = np.bincount(bits >> 8, minlength=256)
    chi_squared = np.sum((counts - 256) ** 2 / 256)
    assert abs(chi_squared - 255) < 5 * np.sqrt(2 * 255)
    ones = np.mean((bits[:, None] >> np.arange(16)) & 1, axis=0)
    assert np.all(np.abs(ones - 0.5) < 5 * 0.5 / 2**8)


@pytest.mark.parametrize(
    "one, other",
    [((1, 0), (2, 0)), ((1, 0), (1, 1)), ((1, 1), (2, 0)), ((5, 3), (3, 5))],
)
def test_random_bits_differ_between_updates_and_variables(one, other):
    size = 2**14
    a, b = random_bits(size, *one), random_bits(size, *other)
    # Two uniform numbers of 16 bits agree once in 65536, and don't correlate.
    assert np.sum(a == b) <= 5
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(size)


def test_random_bits_differ_between_elements():
    bits = random_bits(2**14, 1, 0)
    for distance in (1, 2, 16, 256):
        correlation = np.corrcoef(bits[:-distance], bits[distance:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(len(bits))


def test_stochastic_rounding_of_a_step_is_the_same_eagerly_and_compiled():
    values = []
    for eager in (True, False):
        w = keras.Variable(START[0], dtype="bfloat16")
        optimizer = BY_NAME["sgd"].make(learning_rate=2.0**-10)
        tf.config.run_functions_eagerly(eager)
        try:
            for _ in range(10):
                optimizer.apply([tf.ones((6, 3), "bfloat16")], [w])
        finally:
            tf.config.run_functions_eagerly(False)
        values.append(w.numpy())
    np.testing.assert_array_equal(*values)
    assert np.any(values[0] != np.array(tf.cast(START[0], "bfloat16")))


# -------------------------------------------------------- float64 and scalars


@pytest.mark.representatives(*KINDS)
@every_case
def test_float64_weights_train_in_float64(case):
    rng = np.random.default_rng(11)
    weights = [rng.normal(size=shape) for shape in [(5, 3), ()]]
    gradients = [[rng.normal(size=w.shape) for w in weights] for _ in range(10)]
    rate = 2.0**-7  # The learning rate is kept in float32.
    settings = dict(case.make.keywords) | {"learning_rate": rate}
    settings |= {"weight_decay": 0.1, "global_clipnorm": 1.0}
    expected, states, _ = oracles.train(
        case.make.func.__name__, settings, weights, gradients, [rate] * 10
    )
    variables = [keras.Variable(w, dtype="float64") for w in weights]
    optimizer = case.make.func(**settings)
    for step in gradients:
        optimizer.apply([ops.convert_to_tensor(g) for g in step], variables)
    for tensors, value, state in zip(
        optimizer._engine.state, expected, states, strict=True
    ):
        assert_near(tensors["weight"].numpy(), value, 1e-12)
        for slot in tensors["rule"].values():
            assert slot.dtype == "float64"
            name = next(name for name in state if slot.name.endswith(f"_{name}"))
            value = with_signs_of(state[name], slot.numpy(), name)
            assert_near(value, state[name], 1e-12)


def assert_near(value: np.ndarray, expected: np.ndarray, bound: float) -> None:
    error = np.linalg.norm(np.ravel(value - expected))
    assert error <= bound * np.linalg.norm(np.ravel(expected))


BETAS = [0.0, 0.5, 0.9, 0.999, 0.99999]
TIMES = [1, 2, 3, 10, 100, 1000, 10_000, 123_457, 1_000_000]
FOUR_UNITS = 4 * 2.0**-23


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("compiled", [False, True])
def test_decay_is_right_to_float32_rounding(beta, compiled):
    value, complement = np.float32(beta), np.float32(1.0 - beta)

    @tf.function(jit_compile=compiled)
    def terms(value: Any, complement: Any, t: Any) -> tuple:
        decay = Decay(value, complement)
        return 1 - decay, 1 - decay**t

    for t in TIMES:
        one, power = terms(value, complement, tf.constant(t, "float32"))
        assert float(one) == pytest.approx(1.0 - beta, rel=2.0**-24)
        expected = -np.expm1(t * np.log(beta)) if beta else 1.0
        assert float(power) == pytest.approx(expected, rel=FOUR_UNITS)


def test_decay_from_a_rounded_number_would_be_wrong():
    """What keeping `1 - beta` beside `beta` is for."""
    naive = 1.0 - float(np.float32(0.999))
    assert abs(naive / 0.001 - 1) > 1e-5


# -------------------------------------------------------------- slots' dtypes

DTYPES = [
    # weight, slots and accumulator, average, compensation
    ("float32", "float32", "float32", None),
    ("bfloat16", "float32", "bfloat16", "bfloat16"),
    ("float16", "float32", "float16", "float16"),
    ("float64", "float64", "float64", None),
]


@every_case
@pytest.mark.parametrize("weight, slots, average, compensation", DTYPES)
def test_state_has_the_promised_dtypes(case, weight, slots, average, compensation):
    optimizer = case.make(
        use_ema=True, gradient_accumulation_steps=2, rounding="compensated"
    )
    optimizer.build([keras.Variable([1.0], dtype=weight)])
    (tensors,) = optimizer._engine.state
    assert {v.dtype for v in tensors["rule"].values()} <= {slots}
    assert tensors["accumulation"]["sum"].dtype == slots
    assert tensors["ema"]["average"].dtype == average
    if compensation is None:
        assert "compensation" not in tensors
    else:
        assert tensors["compensation"]["lost"].dtype == compensation


def test_weights_of_several_dtypes_train_together():
    dtypes = ["float32", "bfloat16", "float64", "float16"]
    variables = [keras.Variable([1.0], dtype=dtype) for dtype in dtypes]
    optimizer = BY_NAME["adam"].make(learning_rate=0.25, global_clipnorm=1.0)
    optimizer.apply([tf.ones(1, v.dtype) for v in variables], variables)
    assert [v.dtype for v in variables] == dtypes
    for v in variables:
        assert float(v.numpy()[0]) == pytest.approx(0.75, rel=2.0**-7)
