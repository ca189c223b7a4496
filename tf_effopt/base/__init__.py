"""What an optimizer's class is made of."""

from tf_effopt import hyperparameters as hp
from tf_effopt.base.optimizer import Optimizer
from tf_effopt.rules import Evaluation, Matrices, ModelRule, Part, Slot, Slots

__all__ = [
    "Evaluation",
    "Matrices",
    "ModelRule",
    "Optimizer",
    "Part",
    "Slot",
    "Slots",
    "hp",
]
