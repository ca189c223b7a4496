"""What a user sees: `repr`, `describe`, `dir`, warnings and errors of installation."""

from __future__ import annotations

import importlib.util
import types
import warnings
from typing import Any

import keras
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_effopt
from tf_effopt.optimizers import __all__ as OPTIMIZERS

schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)


@pytest.mark.parametrize(
    "make, expected",
    [
        (
            lambda: tf_effopt.AdamW(1e-3, weight_decay=0.05),
            "AdamW(learning_rate=0.001, weight_decay=0.05)",
        ),
        (lambda: tf_effopt.SGD(), "SGD(learning_rate=0.01)"),
        (
            lambda: tf_effopt.Adam(2.0, name="mine", clipnorm=1, use_ema=True),
            "Adam(learning_rate=2, clipnorm=1.0, use_ema=True, name='mine')",
        ),
        (
            lambda: tf_effopt.Lion(
                schedule,
                transforms=[tf_effopt.transforms.Cautious()],
                groups=[tf_effopt.Group("bias", frozen=True)],
            ),
            (
                "Lion(learning_rate=CosineDecay(initial_learning_rate=0.1, "
                "decay_steps=10, alpha=0.0, warmup_target=None, warmup_steps=0), "
                "transforms=[Cautious()], groups=[Group('bias', frozen=True)])"
            ),
        ),
        (
            lambda: tf_effopt.LossScaleOptimizer(tf_effopt.SGD(0.5), 8.0),
            (
                "LossScaleOptimizer(inner_optimizer=SGD(learning_rate=0.5), "
                "initial_scale=8.0)"
            ),
        ),
        (
            lambda: tf_effopt.transforms.ZClip(3.0),
            "ZClip(z_threshold=3.0, decay=0.97, warmup_steps=25)",
        ),
    ],
)
def test_repr_has_the_arguments(make, expected):
    assert repr(make()) == str(make()) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_repr_of_defaults_is_short(name):
    optimizer = getattr(tf_effopt, name)()
    assert repr(optimizer).startswith(f"{name}(learning_rate=")
    assert repr(optimizer).count("=") == 1
    optimizer.learning_rate = 0.5
    assert repr(optimizer) == f"{name}(learning_rate=0.5)"


def test_repr_never_fails_and_adds_nothing_to_a_graph():
    optimizer = tf_effopt.SGD(0.25, momentum=0.5)
    scheduled = tf_effopt.SGD(lambda: 1 / 0)
    half_made = tf_effopt.SGD.__new__(tf_effopt.SGD)
    texts = []

    @tf.function
    def step() -> None:
        before = len(tf.compat.v1.get_default_graph().get_operations())
        texts.extend([repr(optimizer), repr(scheduled), repr(half_made)])
        assert len(tf.compat.v1.get_default_graph().get_operations()) == before

    step()
    assert texts[0] == "SGD(learning_rate=0.25, momentum=0.5)"
    assert "lambda" in texts[1]
    assert texts[2].startswith("SGD(")
    assert "Transform" in repr(tf_effopt.transforms.ZClip.__new__(BadTransform))


class BadTransform(tf_effopt.transforms.Transform):
    def __init__(self, strength=1.0):
        self.force = strength


# ------------------------------------------------------------------- describe


def small_model(**settings: Any) -> keras.Model:
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="up"), layers.Dense(1, name="down")],
        name="small",
        **settings,
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_describe_before_the_first_step_as_after_it(name):
    model = small_model()
    settings = {}
    if name == "Muon":
        settings["roles"] = tf_effopt.roles(model)
    optimizer = getattr(tf_effopt, name)(
        weight_decay=0.1,
        groups=[
            tf_effopt.Group("up", learning_rate_multiplier=0.5, weight_decay=0.25),
            tf_effopt.Group("down/bias", frozen=True),
        ],
        **settings,
    )
    optimizer.exclude_from_weight_decay(var_names=["down/kernel"])
    unknown = optimizer.describe()
    assert unknown.startswith(repr(optimizer)) and "describe(model)" in unknown
    given = optimizer.describe(model)
    model.compile(optimizer)
    before = optimizer.describe()
    assert "up/kernel" in before and not optimizer.built
    optimizer.build(model.trainable_variables)
    assert given == before == optimizer.describe()


def test_describe_of_a_wrapped_one_and_of_several_models():
    optimizer = tf_effopt.Adam()
    one = small_model()
    one.compile(tf_effopt.LossScaleOptimizer(optimizer))
    assert "up/kernel" in one.optimizer.describe()
    other = small_model()
    other.compile(optimizer)
    assert "describe(model)" in optimizer.describe()
    assert "up/kernel" in optimizer.describe(other.trainable_variables)
    shapeless = keras.Sequential([layers.Dense(1)])
    shapeless.compile(tf_effopt.SGD())
    assert "has no variables yet" in shapeless.optimizer.describe()


@pytest.mark.parametrize(
    "module",
    [
        tf_effopt,
        tf_effopt.transforms,
        tf_effopt.callbacks,
        tf_effopt.distribute,
        tf_effopt.optimizers,
    ],
)
def test_dir_shows_public_names(module):
    names = {name for name in dir(module) if not name.startswith("_")}
    assert names == set(module.__all__)
    assert all(hasattr(module, name) for name in names)


# ---------------------------------------------------------------------- words


def test_muon_that_trains_nothing_says_so():
    model = small_model()
    for layer in model.layers:
        layer.enable_lora(2)
        layer.bias.trainable = False
    for settings in ({}, {"roles": tf_effopt.roles(model)}):
        optimizer = tf_effopt.Muon(**settings)
        with pytest.warns(UserWarning, match="no variable by Muon.*LoRA.*AdamW"):
            optimizer.build(model.trainable_variables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = small_model()
        tf_effopt.Muon(roles=tf_effopt.roles(whole)).build(whole.trainable_variables)


class MaskedLMHead(layers.Layer):
    """As KerasHub's: a dense layer, a norm, and the embedding, or a kernel by itself."""

    def __init__(self, size=None, embedding=None, **kwargs):
        super().__init__(**kwargs)
        self.size, self.embedding = size, embedding
        self.dense = layers.Dense(6, name="dense")
        self.norm = layers.LayerNormalization(name="norm")

    def build(self, shapes):
        shape, _ = shapes
        self.dense.build(shape)
        self.norm.build((*shape[:-1], 6))
        if self.embedding is None:
            self.kernel = self.add_weight(shape=(6, self.size), name="output_kernel")
        else:
            self.size = self.embedding.input_dim
        self.bias = self.add_weight(shape=(self.size,), name="output_bias")

    def compute_output_shape(self, shapes):
        return (*shapes[1], self.size)

    def call(self, inputs):
        x, positions = inputs
        x = ops.take_along_axis(x, ops.expand_dims(positions, -1), axis=1)
        kernel = ops.transpose(self.embedding.embeddings) if self.embedding else None
        kernel = self.kernel if kernel is None else kernel
        return ops.matmul(self.norm(self.dense(x)), kernel) + self.bias


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_masked_language_model_is_seen(tied):
    tokens, positions = (keras.Input((n,), dtype="int32") for n in (5, 2))
    embedding = layers.Embedding(11, 6, name="words")
    x = layers.Dense(6, name="inner")(embedding(tokens))
    head = MaskedLMHead(11, embedding if tied else None, name="mlm_head")
    outputs = layers.Softmax()(head([x, positions]))
    model = keras.Model([tokens, positions], outputs, name="bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roles = tf_effopt.roles(model)
    assert roles.paths("embedding") == ["words/embeddings"]
    heads = [path.rpartition("/")[2] for path in roles.paths("head")]
    assert heads == ([] if tied else ["output_kernel"])
    assert sorted(path.split("/")[-2] for path in roles.paths("hidden")) == [
        "dense",
        "inner",
    ]


def test_strategy_without_tensorflow_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("strategy", "prepare"):
        with pytest.raises(ImportError, match=r"pip install 'tf_effopt\[cpu\]'"):
            getattr(tf_effopt.distribute, name)


class Model:
    """What a model of tf_keras, which isn't installed here, is taken for by its name."""

    __module__ = "tf_keras.src.engine.sequential"


@pytest.mark.parametrize(
    "take",
    [
        tf_effopt.roles,
        tf_effopt.distribute.prepare,
        tf_effopt.Group,
        tf_effopt.SGD().describe,
    ],
)
def test_a_model_of_tf_keras_is_told_of_keras_3(take):
    with pytest.raises(ValueError, match="of tf_keras, the legacy Keras 2.*Keras 3"):
        take(Model())


def test_the_error_of_tf_keras_compile_names_keras_3():
    def get(identifier):  # as `tf_keras.optimizers.get` words it
        raise ValueError(f"Could not interpret optimizer identifier: {identifier}")

    names = {"__name__": "tf_keras.src.optimizers"}
    with pytest.raises(ValueError, match=r"SGD\(learning_rate=0.01\).*for Keras 3"):
        types.FunctionType(get.__code__, names)(tf_effopt.SGD())
    with pytest.raises(ValueError, match=r"SGD\(learning_rate=0.01\)$"):
        get(tf_effopt.SGD())
