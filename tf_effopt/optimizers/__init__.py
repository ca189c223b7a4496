"""The optimizers, one file each: the rule as a pure function, then its class."""

from tf_effopt.optimizers.adafactor import Adafactor
from tf_effopt.optimizers.adam import Adam
from tf_effopt.optimizers.adamw import AdamW
from tf_effopt.optimizers.gradient_descent import GradientDescent
from tf_effopt.optimizers.lamb import Lamb
from tf_effopt.optimizers.lars import Lars
from tf_effopt.optimizers.lion import Lion
from tf_effopt.optimizers.muon import Muon
from tf_effopt.optimizers.nadam import Nadam
from tf_effopt.optimizers.prodigy import Prodigy
from tf_effopt.optimizers.radam import RAdam
from tf_effopt.optimizers.rmsprop import RMSprop
from tf_effopt.optimizers.schedule_free_adamw import ScheduleFreeAdamW
from tf_effopt.optimizers.sgd import SGD
from tf_effopt.optimizers.soap import SOAP
from tf_effopt.optimizers.yogi import Yogi

__all__ = [
    "SGD",
    "SOAP",
    "Adafactor",
    "Adam",
    "AdamW",
    "GradientDescent",
    "Lamb",
    "Lars",
    "Lion",
    "Muon",
    "Nadam",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "ScheduleFreeAdamW",
    "Yogi",
]


def __dir__() -> list[str]:
    return sorted(__all__)
