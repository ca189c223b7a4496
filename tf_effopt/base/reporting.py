"""What an optimizer says of itself: its variables, what its stages report."""

from __future__ import annotations

import collections
from typing import Any

import keras

from tf_effopt.base import summary


class Reporting(keras.optimizers.Optimizer):
    """The part of `Optimizer` that people read."""

    def describe(self, of: Any = None) -> str:
        """A table of the variables: shape, rule, learning rate, weight decay.

        The learning rate is the multiplier of the variable's groups, as it is now.
        Works before the first step, too, for the model that was compiled with this
        optimizer.

        Args:
            of: a model, or a list of variables, to see what this optimizer would do
                with them. None: the variables that it was built on, or those of the
                model that was compiled with it. If there is none, or several, the
                text says so after the optimizer's settings.

        >>> import keras, tf_effopt
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), keras.layers.Dense(2, name="logits")], name="small")
        >>> print(tf_effopt.AdamW(groups=[
        ...     tf_effopt.Group("bias", weight_decay=0.0)]).describe(model))
        variable             shape   learning rate  weight decay
        small/logits/kernel  (8, 2)  x 1            0.004
        small/logits/bias    (2,)    x 1            0
        """
        return summary.described(self, of)

    def reports(self) -> dict[str, float]:
        """What its stages report, after the last step.

        Reading it waits for the device. Before the first step the numbers are 0.

        Returns:
            `"<stage>/<report>"` -> number. A second stage of one class is `<stage>_2`.

        >>> import keras, tf_effopt
        >>> w = keras.Variable([0.0])
        >>> skip = tf_effopt.transforms.SkipSpikes(factor=3.0, warmup_steps=2)
        >>> optimizer = tf_effopt.SGD(1.0, transforms=[skip])
        >>> for g in (1.0, 1.0, 1000.0):
        ...     optimizer.apply([keras.ops.convert_to_tensor([g])], [w])
        >>> {name: round(x, 2) for name, x in optimizer.reports().items()}
        {'SkipSpikes/mean': 1.04, 'SkipSpikes/skipped': 1.0}
        """
        found: dict[str, float] = {}
        seen: collections.Counter[str] = collections.Counter()
        for stage in self.stages():
            name = type(stage).__name__
            seen[name] += 1
            label = name if seen[name] == 1 else f"{name}_{seen[name]}"
            found |= {f"{label}/{x}": stage.slot(x) for x in stage.reports}
        return found
