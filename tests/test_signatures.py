"""The arguments of every constructor: those of version 0.1.0, and what was added."""

from __future__ import annotations

import inspect

import keras
import pytest

import tf_effopt
from tf_effopt import Optimizer, hyperparameters, transforms
from tf_effopt.averaging import Lookahead
from tf_effopt.base.configurable import fields
from tf_effopt.hyperparameters import DecayRate, LearningRate, NonNegative, Positive
from tf_effopt.rules import Slots

ADAM = "learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-07"
# By position; after the star by name.
OWN = {
    "Adafactor": (
        "learning_rate=0.001, beta_2_decay=-0.8, epsilon_1=1e-30, epsilon_2=0.001, "
        "clip_threshold=1.0, relative_step=True"
    ),
    "Adam": f"{ADAM}, amsgrad=False, *, bias_correction=True",
    "AdamW": (
        "learning_rate=0.001, weight_decay=0.004, beta_1=0.9, beta_2=0.999, "
        "epsilon=1e-07, amsgrad=False, *, bias_correction=True"
    ),
    "GradientDescent": "learning_rate=0.01",
    "Lamb": f"{ADAM}, exclude_from_adaptation=()",
    "Lars": (
        "learning_rate=0.1, momentum=0.9, trust_coefficient=0.001, nesterov=False, "
        "exclude_from_adaptation=()"
    ),
    "Lion": "learning_rate=0.001, beta_1=0.9, beta_2=0.99",
    "Muon": (
        "learning_rate=0.001, adam_beta_1=0.9, adam_beta_2=0.999, "
        "adam_weight_decay=0.004, epsilon=1e-07, weight_decay=0.004, "
        "exclude_layers=None, exclude_embeddings=True, muon_a=3.4445, muon_b=-4.775, "
        "muon_c=2.0315, adam_lr_ratio=1.0, momentum=0.95, ns_steps=5, nesterov=True, "
        "rms_rate=0.2, iteration='newton_schulz', scale='match_rms_adamw', "
        "split_heads=False, roles=None"
    ),
    "Nadam": ADAM,
    "Prodigy": (
        "learning_rate=1.0, beta_1=0.9, beta_2=0.999, epsilon=1e-08, "
        "bias_correction=False, safeguard_warmup=False, initial_estimate=1e-06, "
        "estimate_coefficient=1.0"
    ),
    "RAdam": "learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-08",
    "RMSprop": "learning_rate=0.001, rho=0.9, momentum=0.0, epsilon=1e-07, centered=False",
    "SGD": "learning_rate=0.01, momentum=0.0, nesterov=False",
    "SOAP": (
        "learning_rate=0.003, beta_1=0.95, beta_2=0.95, shampoo_beta=None, "
        "epsilon=1e-08, weight_decay=0.01, precondition_frequency=10, "
        "max_precondition_dim=10000"
    ),
    "ScheduleFreeAdamW": (
        "learning_rate=0.0025, beta_1=0.9, beta_2=0.999, epsilon=1e-08, warmup_steps=0"
    ),
    "Yogi": (
        "learning_rate=0.01, beta_1=0.9, beta_2=0.999, epsilon=0.001, "
        "initial_accumulator_value=1e-06, *, bias_correction=True"
    ),
}
STAGES = {
    transforms.AdaptiveClipping: "clipping=0.01, epsilon=0.001, exclude=()",
    transforms.Cautious: "",
    transforms.GradientCentralization: "exclude=('embeddings$',)",
    transforms.GradientNoise: "variance=0.3, gamma=0.55, seed=0",
    transforms.MARS: "gamma=0.025, beta_1=0.95, exclude=()",
    transforms.SkipSpikes: "factor=5.0, decay=0.98, warmup_steps=25",
    transforms.ZClip: "z_threshold=2.5, decay=0.97, warmup_steps=25",
    Lookahead: "period=6, step_size=0.5",
    tf_effopt.Group: (
        "members, learning_rate_multiplier=1.0, weight_decay=None, frozen=False, "
        "optional=False"
    ),
}
# By name, of every optimizer.
SHARED = (
    "weight_decay=None, clipnorm=None, clipvalue=None, global_clipnorm=None, "
    "use_ema=False, ema_momentum=0.99, ema_overwrite_frequency=None, "
    "loss_scale_factor=None, gradient_accumulation_steps=None, rounding='stochastic', "
    "lazy=False, transforms=(), averaging=(), groups=(), name=None"
)


def parameters(cls):
    found = inspect.signature(cls).parameters.values()
    return [x for x in found if x.kind is not x.VAR_KEYWORD]


def shown(found) -> str:
    return str(inspect.Signature([x.replace(annotation=x.empty) for x in found]))[1:-1]


def test_every_class_is_in_the_table():
    assert sorted(OWN) == sorted(tf_effopt.optimizers.__all__)


@pytest.mark.parametrize("name", OWN)
def test_optimizers(name):
    shared = [x.partition("=")[0] for x in SHARED.split(", ")]
    own = [
        x
        for x in parameters(getattr(tf_effopt, name))
        if x.name not in shared or x.kind is not x.KEYWORD_ONLY
    ]
    assert shown(own) == OWN[name]


@pytest.mark.parametrize("name", sorted({*OWN} - {"Muon", "SOAP"}))
def test_shared_arguments_are_shown(name):
    found = parameters(getattr(tf_effopt, name))
    by_name = [x for x in found if x.kind is x.KEYWORD_ONLY]
    by_name = [x for x in by_name if x.name != "bias_correction"]
    expected = SHARED.replace("weight_decay=None, ", "") if name == "AdamW" else SHARED
    assert shown(by_name) == f"*, {expected}"


def test_the_base_takes_them_by_position_too():
    """As Keras's does."""
    assert shown(parameters(Optimizer)) == f"learning_rate=0.001, {SHARED}"
    for name, kind in fields(Optimizer).items():
        assert inspect.signature(Optimizer).parameters[name].default == kind.default


@pytest.mark.parametrize("cls", STAGES, ids=lambda c: c.__name__)
def test_stages_and_groups(cls):
    assert shown(parameters(cls)) == STAGES[cls]


# --------------------------------------------------------- classes of a user's own


def rule(g, slots, *, learning_rate, beta):
    m = beta * slots["m"] + (1 - beta) * g
    return -learning_rate * keras.ops.sign(m), {"m": m}


class Sign(Optimizer):
    rule = staticmethod(rule)
    slots = Slots(m="momentum")
    beta: float = DecayRate(default=0.9)


class Decaying(Sign):
    weight_decay: float = NonNegative(default=0.1)
    learning_rate: float = LearningRate(default=0.5)
    scale: float = Positive(default=2.0, kw_only=True)


class ByHand(Sign):
    def __init__(self, learning_rate=0.1, beta=0.5, extra=3, **kwargs):
        super().__init__(learning_rate, beta=beta, **kwargs)
        self.extra = extra


def test_what_a_class_declares_is_its_constructor():
    assert shown(parameters(Sign)) == f"learning_rate=0.001, beta=0.9, *, {SHARED}"
    own = "learning_rate=0.5, weight_decay=0.1, beta=0.9, *, scale=2.0, "
    assert shown(parameters(Decaying)) == own + SHARED.partition(", ")[2]
    optimizer = Decaying(0.25, 0.0, 0.8, clipnorm=1.0, name="mine")
    found = [getattr(optimizer, x) for x in ("weight_decay", "beta", "scale", "name")]
    assert found == [0.0, 0.8, 2.0, "mine"]
    assert optimizer.current("learning_rate") == 0.25
    again = Decaying.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()


def test_a_constructor_by_hand_passes_on():
    optimizer = ByHand(beta=0.25, weight_decay=0.5)
    assert (optimizer.beta, optimizer.extra, optimizer.weight_decay) == (0.25, 3, 0.5)
    assert "extra" in optimizer.get_config()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Sign(bta=0.5), ValueError, "no argument `bta`. Did you mean `beta`"),
        (lambda: Sign(beta=2), ValueError, "`beta` must be in .* Received: beta=2"),
        (
            lambda: Sign(0.1, 0.9, 0.0),
            TypeError,
            r"Sign\(\): too many positional .* takes: learning_rate, beta; all else by name",
        ),
        (lambda: Sign(0.1, learning_rate=1), TypeError, "multiple values"),
        (
            lambda: tf_effopt.Adam(0.1, weight_decay="x"),
            ValueError,
            "Received: weight_",
        ),
        (
            lambda: tf_effopt.Adam(transforms=1),
            ValueError,
            "`transforms` must be a list",
        ),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["transforms", "averaging", "groups"])
def test_stages_and_groups_are_not_exchanged(name):
    with pytest.raises(
        AttributeError, match=f"`{name}` can't be set after .*carry_over"
    ):
        setattr(tf_effopt.Adam(), name, [])


def test_a_default_out_of_its_range_is_an_error_of_the_class():
    with pytest.raises(ValueError, match="`beta` must be in .*Received: beta=2.0"):
        type("Wrong", (Sign,), {"beta": DecayRate(default=2.0)})


def test_a_property_may_take_the_place_of_the_learning_rate():
    class Halved(Sign):
        @property
        def learning_rate(self):
            return super().learning_rate / 2

    assert float(Halved(0.5).learning_rate) == 0.25
    with pytest.raises(TypeError, match="learning_rate"):
        type("Wrong", (Sign,), {"learning_rate": 0.1})


def test_every_kind_takes_a_default():
    for name in dir(hyperparameters):
        kind = getattr(hyperparameters, name)
        base = hyperparameters.Hyperparameter
        if not isinstance(kind, type) or not issubclass(kind, base):
            continue
        needs = {"Count": (2,), "Integer": (2,), "Choice": ("a",)}.get(name, ())
        assert kind(*needs, default=None).default is None


def test_a_shared_argument_that_is_declared_again_comes_after_the_one_before_it():
    class First(tf_effopt.GradientDescent):
        weight_decay: float = hyperparameters.NonNegative(default=0.1)
        beta_3: float = hyperparameters.DecayRate(default=0.5)

    class Later(tf_effopt.GradientDescent):
        beta_3: float = hyperparameters.DecayRate(default=0.5)
        weight_decay: float = hyperparameters.NonNegative(default=0.1)
        beta_4: float = hyperparameters.DecayRate(default=0.5)

    inherited = list(inspect.signature(tf_effopt.GradientDescent).parameters)
    shared = inherited[inherited.index("weight_decay") + 1 :]
    own = inherited[1 : inherited.index("weight_decay")]
    first = list(inspect.signature(First).parameters)
    assert first == ["learning_rate", "weight_decay", *own, "beta_3", *shared]
    later = list(inspect.signature(Later).parameters)
    added = ["beta_3", "weight_decay", "beta_4"]
    assert later == ["learning_rate", *own, *added, *shared]
    assert Later(0.1, weight_decay=0.2, beta_4=0.3).weight_decay == 0.2
