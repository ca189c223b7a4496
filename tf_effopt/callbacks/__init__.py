"""Callbacks for `fit`."""

from tf_effopt.callbacks.evaluation_weights import EvaluationWeights
from tf_effopt.callbacks.range_test import LearningRateRangeTest

__all__ = ["EvaluationWeights", "LearningRateRangeTest"]


def __dir__() -> list[str]:
    return sorted(__all__)
