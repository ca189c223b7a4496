"""The rules by class name."""

from __future__ import annotations

from .adafactor import adafactor
from .adam import adam, nadam, radam, yogi
from .first_order import gradient_descent, lion, rmsprop, sgd
from .layerwise import lamb, lars
from .muon import muon
from .prodigy import prodigy
from .schedule_free import schedule_free_adamw
from .soap import soap

# Of the package's optimizers.
RULES = {
    "Adafactor": adafactor,
    "Adam": adam,
    "AdamW": adam,
    "GradientDescent": gradient_descent,
    "Lamb": lamb,
    "Lars": lars,
    "Lion": lion,
    "Muon": muon,
    "Nadam": nadam,
    "Prodigy": prodigy,
    "RAdam": radam,
    "RMSprop": rmsprop,
    "SGD": sgd,
    "SOAP": soap,
    "ScheduleFreeAdamW": schedule_free_adamw,
    "Yogi": yogi,
}
# Their rules take lists over the tensors.
OF_ALL_TENSORS = {"Prodigy", "ScheduleFreeAdamW"}
# Their rules do their own weight decay.
DECAY_INSIDE = {"Lamb", "Lars", "Muon", "Prodigy", "SOAP", "ScheduleFreeAdamW"}
# Where the settings don't say, and it isn't 0.
DEFAULT_DECAY = {"AdamW": 0.004}
