"""Weights for evaluation in `fit`, where training is at others."""

from __future__ import annotations

from typing import Any

import keras

from tf_effopt.base.optimizer import Optimizer
from tf_effopt.runtime import keras_hooks


class EvaluationWeights(keras.callbacks.Callback):
    """Evaluates, predicts and saves at the weights that are meant for it.

    For optimizers that train at other weights, such as `ScheduleFreeAdamW`; with
    the rest it does nothing. The weights for evaluation are in place from the
    end of an epoch's training, for validation and for callbacks that come *after*
    this one in the list, `ModelCheckpoint` and `BackupAndRestore` among them, until
    the next epoch begins; and after `fit`. (A callback that saves in the middle of
    an epoch saves the weights of training.) What is saved knows which weights it
    has: training goes on from it.

    Raises:
        ValueError: the model's optimizer isn't one of this package.

    Example:

    >>> import keras, numpy as np, tf_effopt
    >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=tf_effopt.ScheduleFreeAdamW(0.01), loss="mse")
    >>> at_x = tf_effopt.callbacks.EvaluationWeights()
    >>> history = model.fit(
    ...     x, x[:, :1], validation_split=0.5, verbose=0, callbacks=[at_x]
    ... )
    >>> model.optimizer.is_evaluating
    True
    """

    def _optimizer(self) -> Optimizer:
        optimizer = self.model.optimizer
        while not isinstance(optimizer, Optimizer):
            if not hasattr(optimizer, "inner_optimizer"):
                raise ValueError(
                    "EvaluationWeights needs an optimizer of tf_effopt. "
                    f"Received: a model with {type(optimizer).__name__}"
                )
            optimizer = optimizer.inner_optimizer
        return optimizer

    def _use(self, evaluation: bool) -> None:
        optimizer = self._optimizer()
        if optimizer.evaluation is None:
            return
        keras_hooks.sync_state(self.model)
        if self.model.built and not self.model.optimizer.built:
            # A state that was loaded waits for it, and tells which weights it has.
            self.model.optimizer.build(self.model.trainable_variables)
        if evaluation:
            optimizer.use_evaluation_weights()
        else:
            optimizer.use_training_weights()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._use(evaluation=False)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._use(evaluation=False)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._use(evaluation=True)

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._use(evaluation=True)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._use(evaluation=True)
