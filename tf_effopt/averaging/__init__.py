"""Stages on the weights, after each update."""

from tf_effopt.averaging.lookahead import Lookahead

__all__ = ["Lookahead"]


def __dir__() -> list[str]:
    return sorted(__all__)
