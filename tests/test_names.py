"""What was chosen by name is found again when `load_model` names layers anew."""

from __future__ import annotations

import re
import warnings

import keras
import numpy as np
import pytest
from cases import arrays

import tf_effopt
from tf_effopt.state.variables import resolve_renamed

X = np.random.default_rng(0).normal(size=(16, 3, 8)).astype("float32")


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """Layers within it have automatic names, counted in a process."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 4)
        self.up = keras.layers.Dense(8, activation="relu")
        self.down = keras.layers.Dense(8)

    def build(self, shape):
        self.attention.build(shape, shape)
        self.up.build(shape)
        self.down.build(shape)

    def call(self, x):
        return x + self.attention(x, x) + self.down(self.up(x))


def model_and_block() -> tuple[keras.Model, Block]:
    keras.utils.set_random_seed(3)
    inputs, block = keras.Input((3, 8)), Block(name="block")
    outputs = keras.layers.Dense(8, name="head")(block(inputs))
    return keras.Model(inputs, outputs), block


def by_layer(model, block):
    frozen = tf_effopt.Group(block.up, frozen=True)
    slow = tf_effopt.Group(block.down.kernel, learning_rate_multiplier=0.1)
    pattern = tf_effopt.Group(f"{block.up.name}/bias", weight_decay=0.2)
    optimizer = tf_effopt.AdamW(0.01, groups=[frozen, slow, pattern])
    optimizer.exclude_from_weight_decay(var_list=[block.down.kernel])
    return optimizer


def by_role(model, block):
    return tf_effopt.Muon(0.01, roles=tf_effopt.roles(model))


def by_path(model, block):
    return tf_effopt.Muon(0.01, exclude_layers=["head", block.up.name])


def by_pattern(model, block):
    centralization = tf_effopt.transforms.GradientCentralization
    exclude = [f"{block.down.name}/kernel"]
    return tf_effopt.Lamb(
        0.01,
        exclude_from_adaptation=[f"{block.up.name}/kernel"],
        transforms=[centralization(exclude=exclude)],
    )


def chosen(optimizer) -> list:
    """What each variable's update is made of, by its place."""
    return [
        (
            i in optimizer._frozen,
            i in optimizer._decay_exempt,
            v.part,
            v.matrices,
            sorted(v.stages),
            len(v.learning_rate_multipliers),
            v.decay,
        )
        for i, v in enumerate(optimizer._engine.variables)
    ]


@pytest.mark.representatives("by_layer")
@pytest.mark.parametrize("make", [by_layer, by_role, by_path, by_pattern])
def test_training_goes_on_under_new_names(make, tmp_path):
    keras.layers.Dense(1)  # shifts the numbers in names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Muon's, about heads
        model, block = model_and_block()
        model.compile(make(model, block), "mse")
        model.fit(X, X, shuffle=False, verbose=0)
        model.save(tmp_path / "once.keras")
        loaded = keras.models.load_model(tmp_path / "once.keras")
        loaded.save(tmp_path / "twice.keras")
        again = keras.models.load_model(tmp_path / "twice.keras")
    paths = [[v.path for v in m.trainable_variables] for m in (model, loaded)]
    assert paths[0] != paths[1]
    for other in (loaded, again):
        assert chosen(other.optimizer) == chosen(model.optimizer)
    for m in (model, loaded, again):
        m.fit(X, X, shuffle=False, verbose=0)
    for other in (loaded, again):
        for ours, theirs in zip(
            arrays(other.variables), arrays(model.variables), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_the_models_own_name_may_be_in_a_pattern(tmp_path):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(2, name="inner")], name="small"
    )
    group = tf_effopt.Group(re.compile("^small/inner/bias$"), frozen=True)
    model.compile(tf_effopt.SGD(groups=[group]), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    # Keras 3.15 loads the model with paths that lack its name, 3.16 with it.
    assert loaded.optimizer._frozen == {1}


def variables(*names, shape=(2,)):
    return [keras.Variable(np.zeros(shape), name=name) for name in names]


def test_the_same_paths_in_another_order_are_themselves():
    saved = [("dense", (2,)), ("dense_1", (2,))]
    assert resolve_renamed(variables("dense_1", "dense"), saved) == saved[::-1]
    assert resolve_renamed(variables("dense_1", "dense_2"), saved) == saved


def blocks(*names: str) -> keras.Sequential:
    layers = [keras.layers.Dense(4, name=name) for name in names]
    return keras.Sequential([keras.Input((4,)), *layers], name="blocks")


def test_only_automatic_names_are_made_anew():
    """A layer that the user named is no other one because its shape is the same."""
    model = blocks("backbone", "adapter", "out")
    optimizer = tf_effopt.SGD(
        groups=[tf_effopt.Group(re.compile("backbone"), frozen=True)]
    )
    optimizer.build(model.trainable_variables)
    for names, frozen in (
        (("adapter", "backbone", "out"), {2, 3}),
        (("first", "backbone_2", "out"), {2, 3}),
    ):
        other = tf_effopt.SGD.from_config(optimizer.get_config())
        other.build(blocks(*names).trainable_variables)
        assert other._frozen == frozen


def test_carry_over_knows_the_variables_themselves():
    """Blocks of the same shapes, trained in turn."""
    model = blocks("block1", "block2")
    first, second = model.layers
    slow = tf_effopt.Group("block1", learning_rate_multiplier=0.1, optional=True)
    optimizer = tf_effopt.SGD(0.1, momentum=0.9, groups=[slow])
    optimizer.build(first.trainable_variables)
    optimizer = optimizer.carry_over(second.trainable_variables)
    assert "block2/kernel" in optimizer.describe()
    assert all(not v.learning_rate_multipliers for v in optimizer._engine.variables)
    optimizer = optimizer.carry_over(model.trainable_variables)
    counts = [len(v.learning_rate_multipliers) for v in optimizer._engine.variables]
    assert counts == [1, 1, 0, 0]


def test_variables_of_other_shapes_are_known_by_their_own_paths():
    saved = [("dense", (2,)), ("dense_1", (2,))]
    assert resolve_renamed(variables("dense_3", "dense_4", shape=(3,)), saved) == [
        ("dense_3", (3,)),
        ("dense_4", (3,)),
    ]
    assert resolve_renamed(variables("dense_3"), saved) == [("dense_3", (2,))]
