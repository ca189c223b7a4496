"""Ten kinds of public models: the losses are those under Keras's optimizer.

Each program is written as Keras's guides and examples write it and takes
the optimizers' module: Keras's or `tf_effopt`. It returns the losses that a user
would see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_effopt

TOLERANCE = 1e-5
SEED = 7

Losses = list[float]
Program = Callable[[Any], Losses]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def integers(high: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(high, size=shape).astype("int32")


class EachBatch(keras.callbacks.Callback):
    """Keeps every number that `fit` reports, batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: Losses = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.losses += [float(logs[name]) for name in sorted(logs)]


def fitted(model: keras.Model, *data: Any, batch_size: int = 8, epochs: int = 3):
    """The losses of `fit`, batch by batch."""
    kept = EachBatch()
    options = {"batch_size": batch_size, "epochs": epochs, "verbose": 0}
    model.fit(*data, shuffle=False, callbacks=[kept], **options)
    return kept.losses


# ------------------------------------------------------------ their own train_step


class GAN(keras.Model):
    """keras.io/examples/generative/dcgan_overriding_train_step, smaller."""

    def __init__(self, discriminator: Any, generator: Any, latent: int):
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        self.latent = latent
        self.seed_generator = keras.random.SeedGenerator(SEED)
        self.d_loss = keras.metrics.Mean(name="d_loss")
        self.g_loss = keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer: Any, g_optimizer: Any, loss_fn: Any) -> None:
        super().compile(jit_compile=False)
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer
        self.loss_fn = loss_fn

    @property
    def metrics(self) -> list[Any]:
        return [self.d_loss, self.g_loss]

    def noise(self, count: int) -> Any:
        return keras.random.normal((count, self.latent), seed=self.seed_generator)

    def train_step(self, real: Any) -> dict[str, Any]:
        count = ops.shape(real)[0]
        generated = self.generator(self.noise(count))
        combined = ops.concatenate([generated, real], axis=0)
        labels = ops.concatenate([ops.ones((count, 1)), ops.zeros((count, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(combined))
        trained = self.discriminator.trainable_weights
        self.d_optimizer.apply_gradients(
            zip(tape.gradient(d_loss, trained), trained, strict=True)
        )
        misleading = ops.zeros((count, 1))
        noise = self.noise(count)
        with tf.GradientTape() as tape:
            predictions = self.discriminator(self.generator(noise))
            g_loss = self.loss_fn(misleading, predictions)
        trained = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(
            zip(tape.gradient(g_loss, trained), trained, strict=True)
        )
        self.d_loss.update_state(d_loss)
        self.g_loss.update_state(g_loss)
        return {"d_loss": self.d_loss.result(), "g_loss": self.g_loss.result()}


def gan(optimizers: Any) -> Losses:
    discriminator = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Flatten(),
            layers.Dropout(0.2, seed=1),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    generator = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4 * 4 * 4),
            layers.Reshape((4, 4, 4)),
            layers.Conv2DTranspose(4, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )
    model = GAN(discriminator, generator, latent=4)
    model.compile(
        d_optimizer=optimizers.Adam(1e-3, beta_1=0.5),
        g_optimizer=optimizers.RMSprop(1e-3),
        loss_fn=keras.losses.BinaryCrossentropy(),
    )
    return fitted(model, numbers(24, 8, 8, 1))


class Sampling(layers.Layer):
    """A point of the latent space, from its mean and the log of its variance."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(SEED)

    def call(self, inputs: Any) -> Any:
        mean, log_variance = inputs
        epsilon = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * epsilon


class VAE(keras.Model):
    """keras.io/examples/generative/vae, smaller."""

    def __init__(self, encoder: Any, decoder: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder, self.decoder = encoder, decoder
        names = ("total_loss", "reconstruction_loss", "kl_loss")
        self.trackers = [keras.metrics.Mean(name=name) for name in names]

    @property
    def metrics(self) -> list[Any]:
        return self.trackers

    def train_step(self, data: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            mean, log_variance, z = self.encoder(data)
            losses = keras.losses.binary_crossentropy(data, self.decoder(z))
            reconstruction = ops.mean(ops.sum(losses, axis=1))
            kl = 1 + log_variance - ops.square(mean) - ops.exp(log_variance)
            kl = ops.mean(ops.sum(-0.5 * kl, axis=1))
            total = reconstruction + kl
        grads = tape.gradient(total, self.trainable_weights)
        self.optimizer.apply_gradients(zip(grads, self.trainable_weights, strict=True))
        values = (total, reconstruction, kl)
        for tracker, value in zip(self.trackers, values, strict=True):
            tracker.update_state(value)
        return {tracker.name: tracker.result() for tracker in self.trackers}


def vae(optimizers: Any) -> Losses:
    inputs = keras.Input((6, 6))
    x = layers.Dense(8, activation="relu")(layers.Flatten()(inputs))
    mean, log_variance = layers.Dense(2)(x), layers.Dense(2)(x)
    z = Sampling()([mean, log_variance])
    encoder = keras.Model(inputs, [mean, log_variance, z])
    decoder = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(36, activation="sigmoid"),
            layers.Reshape((6, 6)),
        ]
    )
    model = VAE(encoder, decoder)
    model.compile(optimizer=optimizers.Nadam(1e-2), jit_compile=False)
    return fitted(model, (numbers(24, 6, 6) > 0).astype("float32"))


class Distiller(keras.Model):
    """keras.io/examples/vision/knowledge_distillation, smaller."""

    def __init__(self, student: Any, teacher: Any):
        super().__init__()
        self.student, self.teacher = student, teacher

    def compile(self, student_loss_fn: Any, alpha: float, temperature: float, **kwargs):
        super().compile(**kwargs)
        self.student_loss_fn = student_loss_fn
        self.distillation_loss_fn = keras.losses.KLDivergence()
        self.alpha, self.temperature = alpha, temperature

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False
    ):
        teacher_pred = self.teacher(x, training=False)
        student_loss = self.student_loss_fn(y, y_pred)
        distillation_loss = self.distillation_loss_fn(
            ops.softmax(teacher_pred / self.temperature, axis=1),
            ops.softmax(y_pred / self.temperature, axis=1),
        ) * (self.temperature**2)
        return self.alpha * student_loss + (1 - self.alpha) * distillation_loss

    def call(self, x: Any) -> Any:
        return self.student(x)


def distillation(optimizers: Any) -> Losses:
    def network(units: int) -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(units, activation="relu"),
                layers.Dense(3),
            ]
        )

    x, y = numbers(24, 6), integers(3, 24)
    teacher = network(16)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    teacher.compile(optimizer=optimizers.Adam(1e-2), loss=loss, jit_compile=False)
    losses = fitted(teacher, x, y, epochs=2)
    teacher.trainable = False
    model = Distiller(network(4), teacher)
    model.compile(
        optimizer=optimizers.AdamW(1e-2),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        student_loss_fn=loss,
        alpha=0.1,
        temperature=10,
        jit_compile=False,
    )
    return losses + fitted(model, x, y)


class Siamese(keras.Model):
    """keras.io/examples/vision/siamese_network: one network, three times; smaller."""

    def __init__(self, embedding: Any, margin: float = 0.5):
        super().__init__()
        self.embedding, self.margin = embedding, margin
        self.loss_tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self) -> list[Any]:
        return [self.loss_tracker]

    def triplet_loss(self, data: Any) -> Any:
        anchor, positive, negative = (self.embedding(x) for x in data)
        near = ops.sum(ops.square(anchor - positive), -1)
        far = ops.sum(ops.square(anchor - negative), -1)
        return ops.mean(ops.maximum(near - far + self.margin, 0.0))

    def train_step(self, data: Any) -> dict[str, Any]:
        (triplet,) = data
        with tf.GradientTape() as tape:
            loss = self.triplet_loss(triplet)
        weights = self.embedding.trainable_weights
        gradients = tape.gradient(loss, weights)
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}


def siamese(optimizers: Any) -> Losses:
    embedding = keras.Sequential(
        [
            keras.Input((10,)),
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(4),
        ]
    )
    model = Siamese(embedding)
    sgd = optimizers.SGD(0.01, momentum=0.9, nesterov=True)
    model.compile(optimizer=sgd, jit_compile=False)
    triplets = tuple(numbers(24, 10, seed=seed) for seed in range(3))
    data = tf.data.Dataset.from_tensor_slices((triplets,)).batch(8)
    kept = EachBatch()
    model.fit(data, epochs=3, verbose=0, callbacks=[kept])
    return kept.losses


# ------------------------------------------------------------ their own loop


class Track:
    """A deterministic environment: stay near the middle of a line."""

    def reset(self) -> np.ndarray:
        self.state = np.array([0.3, -0.1, 0.0, 0.2], "float32")
        return self.state

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        place, speed, phase, push = self.state
        speed = 0.9 * speed + (0.1 if action else -0.1) + 0.05 * np.sin(phase)
        place, phase = place + speed, phase + 0.5
        self.state = np.array([place, speed, phase, push], "float32")
        return self.state, 1.0 - abs(float(place)), abs(place) > 1.0


def actor_critic(optimizers: Any) -> Losses:
    """keras.io/examples/rl/actor_critic_cartpole, with few, short episodes."""
    inputs = keras.Input((4,))
    common = layers.Dense(16, activation="relu")(inputs)
    action = layers.Dense(2, activation="softmax")(common)
    critic = layers.Dense(1)(common)
    model = keras.Model(inputs, [action, critic])
    optimizer = optimizers.Adam(learning_rate=0.01)
    huber = keras.losses.Huber()
    choices = np.random.default_rng(SEED)
    environment = Track()
    losses = []
    for _ in range(5):
        state = environment.reset()
        log_probs, values, rewards = [], [], []
        with tf.GradientTape() as tape:
            for _ in range(8):
                probs, value = model(ops.expand_dims(state, 0))
                values.append(value[0, 0])
                taken = choices.choice(2, p=_normalized(np.squeeze(probs)))
                log_probs.append(ops.log(probs[0, taken]))
                state, reward, done = environment.step(taken)
                rewards.append(reward)
                if done:
                    break
            returns, total = [], 0.0
            for reward in reversed(rewards):
                total = reward + 0.99 * total
                returns.insert(0, total)
            returns = np.array(returns)
            returns = (returns - returns.mean()) / (returns.std() + 1e-7)
            actor_losses, critic_losses = [], []
            for log_prob, value, ret in zip(log_probs, values, returns, strict=True):
                actor_losses.append(-log_prob * (ret - value))
                critic_losses.append(
                    huber(ops.expand_dims(value, 0), ops.expand_dims(ret, 0))
                )
            loss = sum(actor_losses) + sum(critic_losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        losses.append(float(loss))
    return losses


def _normalized(probs: np.ndarray) -> np.ndarray:
    probs = np.asarray(probs, "float64")
    return probs / probs.sum()


# ------------------------------------------------------------ sequences


def seq2seq(optimizers: Any) -> Losses:
    """keras.io/examples/nlp/lstm_seq2seq, with attention over the encoder."""
    encoder_inputs = keras.Input((None, 5))
    encoded, *states = layers.LSTM(6, return_sequences=True, return_state=True)(
        encoder_inputs
    )
    decoder_inputs = keras.Input((None, 4))
    decoded = layers.LSTM(6, return_sequences=True)(
        decoder_inputs, initial_state=states
    )
    attended = layers.Attention(use_scale=True)([decoded, encoded])
    outputs = layers.Dense(4, activation="softmax")(
        layers.Concatenate()([decoded, attended])
    )
    model = keras.Model([encoder_inputs, decoder_inputs], outputs)
    model.compile(
        optimizer=optimizers.RMSprop(1e-2, momentum=0.9, centered=True),
        loss="categorical_crossentropy",
        jit_compile=False,
    )
    source = np.eye(5, dtype="float32")[integers(5, 16, 4)]
    target = np.eye(4, dtype="float32")[integers(4, 16, 4, seed=1)]
    shifted = np.roll(target, 1, axis=1)
    return fitted(model, [source, shifted], target)


def stacked_lstm(optimizers: Any) -> Losses:
    """keras.io/examples/nlp/bidirectional_lstm_imdb, with padding; smaller."""
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(20, 6, mask_zero=True),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
            layers.Bidirectional(layers.LSTM(4)),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 6, warmup_steps=2)
    model.compile(
        optimizer=optimizers.Adam(schedule, global_clipnorm=0.1),
        loss="binary_crossentropy",
        jit_compile=False,
    )
    tokens = integers(20, 16, 5)
    tokens[:, 3:] *= integers(2, 16, 2, seed=1)
    return fitted(model, tokens, integers(2, 16, 1, seed=2))


# ------------------------------------------------------------ fine-tuning


def language_model() -> keras.Model:
    """An embedding, an einsum projection and two dense layers."""
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(12, 8, name="tokens"),
            layers.EinsumDense(
                "abc,cd->abd",
                output_shape=(None, 8),
                activation="relu",
                name="projection",
            ),
            layers.GlobalAveragePooling1D(),
            layers.Dense(8, activation="relu", name="hidden"),
            layers.Dense(3, name="output"),
        ]
    )


def fine_tuned(model: keras.Model, optimizer: Any) -> Losses:
    """Trains the ranks of `enable_lora` and what has none."""
    for layer in model.layers:
        if hasattr(layer, "enable_lora"):
            layer.enable_lora(rank=2)
    frozen = [v for v in model.variables if not v.trainable]
    before = [ops.convert_to_numpy(v) for v in frozen]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False)
    losses = fitted(model, integers(12, 16, 6), integers(3, 16, seed=1))
    assert any("lora" in v.path for v in model.trainable_variables)
    for variable, value in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    return losses


def lora(optimizers: Any) -> Losses:
    """keras.io/guides/parameter_efficient_finetuning: ranks beside the weights."""
    optimizer = optimizers.AdamW(1e-2, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    return fine_tuned(language_model(), optimizer)


def int8_lora(optimizers: Any) -> Losses:
    """As `lora`, over weights of 8 bits."""
    model = language_model()
    model.quantize("int8")
    assert "int8" in {v.dtype for v in model.variables}
    return fine_tuned(model, optimizers.Lion(1e-3))


def transferred() -> tuple[keras.Model, keras.Model]:
    """A frozen base, and a model of it with a head."""
    base = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(8, activation="relu"),
        ]
    )
    base.trainable = False
    inputs = keras.Input((6,))
    outputs = layers.Dense(1)(base(inputs, training=False))
    return base, keras.Model(inputs, outputs)


def frozen_then_unfrozen(optimizers: Any) -> Losses:
    """keras.io/guides/transfer_learning: the head first, then all, more slowly."""
    base, model = transferred()
    x, y = numbers(24, 6), numbers(24, 1, seed=1)
    model.compile(optimizer=optimizers.Adam(1e-2), loss="mse", jit_compile=False)
    losses = fitted(model, x, y, epochs=2)
    base.trainable = True
    model.compile(optimizer=optimizers.Adam(1e-3), loss="mse", jit_compile=False)
    return losses + fitted(model, x, y, epochs=2)


# ------------------------------------------------------------ the comparison

PROGRAMS: dict[str, Program] = {
    "gan": gan,
    "vae": vae,
    "distillation": distillation,
    "actor_critic": actor_critic,
    "siamese": siamese,
    "seq2seq": seq2seq,
    "stacked_lstm": stacked_lstm,
    "lora": lora,
    "int8_lora": int8_lora,
    "frozen_then_unfrozen": frozen_then_unfrozen,
}


class Reference:
    """Keras's optimizers, on the dense form of an embedding's gradient.

    Of a row that was looked up twice, they square the two parts, not their sum.
    """

    def __getattr__(self, name: str) -> Any:
        def apply(self: Any, grads: Any, trainable_variables: Any = None) -> None:
            dense = [tf.convert_to_tensor(gradient) for gradient in grads]
            super(cls, self).apply(dense, trainable_variables)

        cls = type(name, (getattr(keras.optimizers, name),), {"apply": apply})
        return cls


def seeded(program: Program, optimizers: Any) -> np.ndarray:
    keras.backend.clear_session()
    keras.utils.set_random_seed(SEED)
    return np.array(program(optimizers))


@pytest.mark.representatives("actor_critic", "gan", "lora")
@pytest.mark.parametrize("name", PROGRAMS)
def test_losses_are_those_under_keras(name):
    expected = seeded(PROGRAMS[name], Reference())
    losses = seeded(PROGRAMS[name], tf_effopt)
    assert len(expected) >= 5
    assert len(set(expected)) > len(expected) / 2  # it trains
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE, atol=TOLERANCE)


# Rules that don't correct by the count of updates, so that Keras's two
# optimizers below are one of ours.
CARRIED = {
    "sgd": ("SGD", {"learning_rate": 0.05, "momentum": 0.9}),
    "rmsprop": ("RMSprop", {"learning_rate": 0.01}),
    "lion": ("Lion", {"learning_rate": 0.003}),
}


@pytest.mark.parametrize("name", CARRIED)
def test_carry_over_is_the_old_optimizer_and_a_fresh_one(name):
    """The head's moments go on, the unfrozen base's start afresh.

    With Keras's classes that takes two optimizers in a custom training loop.
    """
    class_name, settings = CARRIED[name]
    x, y = numbers(24, 6), numbers(24, 1, seed=1)

    def losses(model: keras.Model, optimizers: list[tuple[Any, Any]]) -> Losses:
        found = []
        for _ in range(5):
            with tf.GradientTape() as tape:
                loss = ops.mean(ops.square(model(x) - y))
            groups = [variables for _, variables in optimizers]
            gradients = tape.gradient(loss, groups)
            for (optimizer, variables), group in zip(
                optimizers, gradients, strict=True
            ):
                optimizer.apply(group, variables)
            found.append(float(loss))
        return found

    def by_keras() -> np.ndarray:
        keras.utils.set_random_seed(SEED)
        base, model = transferred()
        head = model.layers[-1].trainable_variables
        old, new = (getattr(keras.optimizers, class_name)(**settings) for _ in range(2))
        found = losses(model, [(old, head)])
        base.trainable = True
        together = [(old, head), (new, base.trainable_variables)]
        return np.array(found + losses(model, together))

    def by_ours() -> np.ndarray:
        keras.utils.set_random_seed(SEED)
        base, model = transferred()
        optimizer = getattr(tf_effopt, class_name)(**settings)
        found = losses(model, [(optimizer, model.trainable_variables)])
        base.trainable = True
        optimizer = optimizer.carry_over(model.trainable_variables)
        trained = [(optimizer, model.trainable_variables)]
        return np.array(found + losses(model, trained))

    np.testing.assert_allclose(by_ours(), by_keras(), rtol=TOLERANCE)
