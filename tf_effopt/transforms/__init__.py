"""What stands before or after a rule, whichever rule it is."""

from tf_effopt.transforms.adaptive_clipping import AdaptiveClipping
from tf_effopt.transforms.base import Transform
from tf_effopt.transforms.cautious import Cautious
from tf_effopt.transforms.gradient_centralization import GradientCentralization
from tf_effopt.transforms.gradient_noise import GradientNoise
from tf_effopt.transforms.mars import MARS
from tf_effopt.transforms.skip_spikes import SkipSpikes
from tf_effopt.transforms.zclip import ZClip

__all__ = [
    "MARS",
    "AdaptiveClipping",
    "Cautious",
    "GradientCentralization",
    "GradientNoise",
    "SkipSpikes",
    "Transform",
    "ZClip",
]


def __dir__() -> list[str]:
    return sorted(__all__)
