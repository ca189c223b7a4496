"""The optimizers, one file each: the rule as a pure function, then its class."""

from tf_effopt.optimizers.adam import Adam
from tf_effopt.optimizers.adamw import AdamW
from tf_effopt.optimizers.gradient_descent import GradientDescent
from tf_effopt.optimizers.rmsprop import RMSprop
from tf_effopt.optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "GradientDescent", "RMSprop"]
