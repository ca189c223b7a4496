"""Hyperparameters: checked when they are set, changeable while training.

A class declares its hyperparameters, with their defaults:

    class Clip(Stage):
        factor: float = Positive(default=0.01)
        exclude: list = Patterns(default=())

They become the arguments of its constructor. Each assignment, then and later, is
checked here, and reaches the compiled update without compiling it again. A kind's
`default=` may be left out in a class that defines a custom `__init__`.
"""

from tf_effopt.hyperparameters.base import (
    REQUIRED,
    FloatOrSchedule,
    Hyperparameter,
    RateOrSchedule,
    Schedule,
)
from tf_effopt.hyperparameters.decay import Decay, EachCount
from tf_effopt.hyperparameters.learning_rate import LearningRate
from tf_effopt.hyperparameters.numbers import (
    Count,
    DecayRate,
    Fraction,
    Negative,
    NonNegative,
    Number,
    Positive,
    Real,
)
from tf_effopt.hyperparameters.settings import (
    Choice,
    Integer,
    Objects,
    Patterns,
    Switch,
)

__all__ = [
    "REQUIRED",
    "Choice",
    "Count",
    "Decay",
    "DecayRate",
    "EachCount",
    "FloatOrSchedule",
    "Fraction",
    "Hyperparameter",
    "Integer",
    "LearningRate",
    "Negative",
    "NonNegative",
    "Number",
    "Objects",
    "Patterns",
    "Positive",
    "RateOrSchedule",
    "Real",
    "Schedule",
    "Switch",
]
