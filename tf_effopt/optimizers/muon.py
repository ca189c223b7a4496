"""Muon, from Jordan et al., "Muon: An optimizer for hidden layers in neural
networks", 2024.

https://kellerjordan.github.io/posts/muon
"""

import functools
import math

from tf_effopt.base import ModelRule, Part, Slots, hp
from tf_effopt.base.roles import Roles
from tf_effopt.base.routing import KnownRoles, RoutedByRole
from tf_effopt.conversion.muon import muon_slots
from tf_effopt.engine.linalg import orthogonalized
from tf_effopt.optimizers.adam import adam_correction, adam_rule

# Amsel et al., 2025, https://arxiv.org/abs/2505.16932: the best quintics, one
# after the other, for singular values down to 0.001 of the norm.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_MARGIN = 1.02


def muon_rule(
    g,
    slots,
    *,
    learning_rate,
    momentum,
    muon_a,
    muon_b,
    muon_c,
    rms_rate,
    ns_steps,
    nesterov,
    iteration,
    scale,
):
    """Returns Muon's change to matrices, and their next momentum.

    Args:
        g: gradient, of shape `(n, inputs, outputs)`: n matrices.
        slots: `m`, of that shape: the decayed sum of `g`.
        learning_rate: scalar, in units of the spectral norm, times the scale.
        momentum: share of `m` kept per update, in [0, 1).
        muon_a, muon_b, muon_c: the quintic of a step of Newton-Schulz.
        rms_rate: the root mean square of a step per learning rate, or None.
        ns_steps: steps of the iteration.
        nesterov: whether to look one step ahead.
        iteration: `"newton_schulz"` or `"polar_express"`.
        scale: `"match_rms_adamw"` or `"original"`.

    Returns:
        `(delta, slots)`: what to add to the weights, and the next slots.
    """
    m = momentum * slots["m"] + g
    u = g + momentum * m if nesterov else m
    if iteration == "polar_express":
        later = (POLAR_EXPRESS[-1],) * (ns_steps - len(POLAR_EXPRESS))
        o = orthogonalized(u, (POLAR_EXPRESS + later)[:ns_steps], POLAR_EXPRESS_MARGIN)
    else:
        o = orthogonalized(u, [(muon_a, muon_b, muon_c)] * ns_steps)
    inputs, outputs = g.shape[-2:]
    if scale == "original":
        o = math.sqrt(max(1, outputs / inputs)) * o
    elif rms_rate is not None:
        o = rms_rate * math.sqrt(max(inputs, outputs)) * o
    return -learning_rate * o, {"m": m}


def inner_adam_correction(sums, slots, *, t, adam_beta_1, adam_beta_2):
    """Returns `adam_correction` of the tensors that aren't hidden matrices."""
    return adam_correction(
        sums, slots, t=t, beta_1=adam_beta_1, beta_2=adam_beta_2, bias_correction=True
    )


def inner_adam_rule(
    g,
    slots,
    *,
    correction,
    learning_rate,
    adam_beta_1,
    adam_beta_2,
    epsilon,
    adam_lr_ratio,
):
    """Returns `adam_rule`'s step of the tensors that aren't hidden matrices."""
    return adam_rule(
        g,
        slots,
        correction=correction,
        learning_rate=adam_lr_ratio * learning_rate,
        beta_1=adam_beta_1,
        beta_2=adam_beta_2,
        epsilon=epsilon,
        amsgrad=False,
    )


class Muon(RoutedByRole):
    """Muon: the momentum of each hidden matrix, with all its singular values near 1.

    Hidden matrices are kernels of dense layers, attention's projections,
    recurrent gates, and convolutions as `(inputs, outputs)`. A built-in AdamW trains
    everything else: embeddings, output layers, biases, scales. A variable doesn't
    know its layer: pass `roles=tf_effopt.roles(model)`. Without it, routing goes by
    the paths and shapes of Keras's variables; then output layers aren't known, a
    warning shows the table, and `exclude_layers` names them.
    (`keras.optimizers.Muon` takes each variable of two axes: biases of
    attention, but neither its kernels nor convolutions.)

    The momentum is the authors' sum, `m <- momentum * m + g`, whose scale
    doesn't matter; the decay is times the learning rate. The norm that a matrix is
    divided by is at least 1e-7, as in PyTorch. The iteration runs in float32,
    many matrices of a shape at once (the authors' runs in bfloat16, as a TPU's
    float32 products do).

    Keeps 1 value per parameter of hidden matrices, 2 of the others. Takes
    `keras.optimizers.Muon`'s arguments and converts its state.

    When not to use it: for small or shallow models, where `AdamW` is as good
    without 5 to 15 products of matrices per step.

    Reference: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon;
    `rms_rate`: Liu et al., 2025, https://arxiv.org/abs/2502.16982;
    `polar_express`: Amsel et al., 2025, https://arxiv.org/abs/2505.16932

    Args:
        learning_rate: float of at least 0, schedule or callable. With the
            default `scale` it is AdamW's; with `"original"`, about 0.02.
        adam_beta_1, adam_beta_2: floats in [0, 1), of the AdamW inside.
        adam_weight_decay: None, or float of at least 0, of what AdamW trains.
        epsilon: float above 0, of the AdamW inside.
        weight_decay: None, or float of at least 0, of hidden matrices.
        exclude_layers: list of regular expressions: what matches is trained by
            AdamW, whatever its role.
        exclude_embeddings: bool, whether AdamW trains embeddings.
        muon_a, muon_b, muon_c: floats, the iteration's quintic.
        adam_lr_ratio: float of at least 0, AdamW's learning rate per Muon's.
        momentum: float in [0, 1).
        ns_steps: int of at least 1, the iteration's steps.
        nesterov: bool, whether the momentum looks one step ahead.
        rms_rate: None, or float above 0: the root mean square of a step per
            learning rate; None is no scale.
        iteration: `"newton_schulz"`, or `"polar_express"`: other coefficients at
            each step, nearer to 1 in the same 5 steps.
        scale: `"match_rms_adamw"`, `rms_rate * sqrt(max(inputs, outputs))`; or
            `"original"`, `sqrt(max(1, outputs / inputs))`.
        split_heads: bool, whether each of attention's heads is a matrix of its
            own, not each projection.
        roles: None, or what `tf_effopt.roles(model)` returned.

    Raises:
        ValueError: an argument is out of its range; a variable isn't in `roles`.

    Example:

    >>> import keras, tf_effopt
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    >>> optimizer = tf_effopt.Muon(1e-3, roles=tf_effopt.roles(model))
    >>> model.compile(optimizer=optimizer, loss="mse")
    """

    elementwise = False
    model_rule = ModelRule(inner_adam_correction, each_count=True)
    adam_beta_1: hp.FloatOrSchedule = hp.DecayRate(default=0.9)
    adam_beta_2: hp.FloatOrSchedule = hp.DecayRate(default=0.999)
    adam_weight_decay: hp.FloatOrSchedule | None = hp.NonNegative(True, default=0.004)
    epsilon: hp.FloatOrSchedule = hp.Positive(default=1e-7)
    weight_decay: hp.FloatOrSchedule | None = hp.NonNegative(True, default=0.004)
    exclude_layers: list[str] | None = hp.Patterns(optional=True, default=None)
    exclude_embeddings: bool = hp.Switch(default=True)
    muon_a: hp.FloatOrSchedule = hp.Real(default=3.4445)
    muon_b: hp.FloatOrSchedule = hp.Real(default=-4.7750)
    muon_c: hp.FloatOrSchedule = hp.Real(default=2.0315)
    adam_lr_ratio: hp.FloatOrSchedule = hp.NonNegative(default=1.0)
    momentum: hp.FloatOrSchedule = hp.DecayRate(default=0.95)
    ns_steps: int = hp.Integer(low=1, default=5)
    nesterov: bool = hp.Switch(default=True)
    rms_rate: hp.FloatOrSchedule | None = hp.Positive(optional=True, default=0.2)
    iteration: str = hp.Choice(
        "newton_schulz", "polar_express", default="newton_schulz"
    )
    scale: str = hp.Choice("match_rms_adamw", "original", default="match_rms_adamw")
    split_heads: bool = hp.Switch(default=False)
    roles: Roles | None = KnownRoles(default=None)
    convert_keras_slots = muon_slots
    other_part = Part(
        inner_adam_rule,
        Slots(m="momentum", v="velocity"),
        weight_decay="adam_weight_decay",
        name="adamw",
    )

    def matrix_part(self, view):
        return muon_part(view)


@functools.cache
def muon_part(view):
    """The part of all matrices that are looked at in this way."""
    return Part(muon_rule, Slots(m="momentum"), matrices=view, name="muon")
