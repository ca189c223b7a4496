"""The table of golden traces: what makes each, and what it is in our words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEPS = 24
# The last one starts at 0, as a bias does. The vector's first element has no
# gradient in the first three steps, as a row of an embedding.
ANY_SHAPES = ((4, 3), (7,), (), (2, 3, 4), (3,))
MATRICES = ((6, 4), (4, 6), (5, 5))
# Nothing but full-rank statistics at the first gradient, with axes longer
# than 5 left alone: eigenvectors for an eigenvalue 0 would be arbitrary.
SOAP_SHAPES = ((5, 5), (2, 3, 4), (6, 4), (4, 6), (7,), ())


@dataclass(frozen=True)
class Trace:
    """One trace to be made.

    Attributes:
        name: of the file.
        make: the function of `make_traces.py`.
        package: the distribution on the package index.
        reference: what is called in it, by its full name.
        arguments: of the reference, but for the learning rate.
        class_name: of our optimizer.
        settings: its equivalent arguments, in Keras's spelling; of stages a list of
            `[class name, arguments]`.
        notes: what to know: the variant, and traps that were avoided.
        shapes: of the tensors.
        rate: the largest learning rate.
        constant: whether the learning rate doesn't change.
    """

    name: str
    make: str
    package: str
    reference: str
    arguments: dict[str, Any]
    class_name: str
    settings: dict[str, Any]
    notes: str = ""
    shapes: tuple = ANY_SHAPES
    rate: float = 0.1
    constant: bool = False


BETAS = {"betas": (0.85, 0.97)}
OUR_BETAS = {"beta_1": 0.85, "beta_2": 0.97}
EPSILON_HAT = (
    "PyTorch adds epsilon after the bias correction: it was given epsilon / "
    "sqrt(1 - beta_2**t) at each step, which is the epsilon-hat of `config`."
)
TRACES = [
    Trace(
        "gradient_descent",
        "gradient_descent",
        "torch",
        "torch.optim.SGD",
        {"weight_decay": 0.1},
        "GradientDescent",
        {"weight_decay": 0.1},
        "PyTorch's decay is in the gradient: without momentum the same.",
    ),
    Trace(
        "gradient_descent_no_decay",
        "gradient_descent",
        "torch",
        "torch.optim.SGD",
        {},
        "GradientDescent",
        {},
    ),
    Trace(
        "sgd_momentum",
        "sgd",
        "optax",
        "optax.chain(scale_by_learning_rate, trace, add_decayed_weights)",
        {"decay": 0.9},
        "SGD",
        {"momentum": 0.9, "weight_decay": 0.1},
        "The learning rate is inside the velocity, as in Keras; `optax.sgd` and "
        "PyTorch have it outside, which differs once it changes. The decay is "
        "decoupled, times the learning rate.",
        rate=0.02,
    ),
    Trace(
        "sgd_nesterov",
        "sgd",
        "optax",
        "optax.chain(scale_by_learning_rate, trace, add_decayed_weights)",
        {"decay": 0.9, "nesterov": True},
        "SGD",
        {"momentum": 0.9, "nesterov": True},
        "As `sgd_momentum`.",
        rate=0.02,
    ),
    Trace(
        "adam",
        "adam",
        "torch",
        "torch.optim.Adam",
        BETAS,
        "Adam",
        {**OUR_BETAS, "epsilon": 1e-2},
        EPSILON_HAT,
    ),
    Trace(
        "adam_amsgrad",
        "adam",
        "torch",
        "torch.optim.AdamW",
        {**BETAS, "amsgrad": True, "weight_decay": 0.1},
        "Adam",
        {**OUR_BETAS, "epsilon": 1e-2, "amsgrad": True, "weight_decay": 0.1},
        "The largest v before its correction, as in Keras (Optax: after it). "
        + EPSILON_HAT,
    ),
    Trace(
        "adamw",
        "adam",
        "torch",
        "torch.optim.AdamW",
        {**BETAS, "weight_decay": 0.1},
        "AdamW",
        {**OUR_BETAS, "epsilon": 1e-2, "weight_decay": 0.1},
        "The decay is times the learning rate, of the weight before the step. "
        + EPSILON_HAT,
    ),
    Trace(
        "adamw_no_decay",
        "adam",
        "torch",
        "torch.optim.AdamW",
        {"betas": (0.9, 0.999), "weight_decay": 0.0},
        "AdamW",
        {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-3, "weight_decay": 0.0},
        EPSILON_HAT,
    ),
    Trace(
        "rmsprop",
        "rmsprop",
        "optax",
        "optax.rmsprop",
        {"decay": 0.9, "eps": 1e-2, "eps_in_sqrt": True},
        "RMSprop",
        {"rho": 0.9, "epsilon": 1e-2, "weight_decay": 0.1},
        "Epsilon is inside the root, as in Keras (PyTorch: outside). With "
        "add_decayed_weights: decoupled, times the learning rate.",
        rate=0.05,
    ),
    Trace(
        "rmsprop_centered_momentum",
        "rmsprop",
        "optax",
        "optax.rmsprop",
        {
            "decay": 0.9,
            "eps": 1e-2,
            "eps_in_sqrt": True,
            "centered": True,
            "momentum": 0.8,
        },
        "RMSprop",
        {"rho": 0.9, "epsilon": 1e-2, "centered": True, "momentum": 0.8},
        "As `rmsprop`; the learning rate is inside the momentum, as in Keras.",
        rate=0.02,
    ),
    Trace(
        "lion",
        "lion",
        "lion-pytorch",
        "lion_pytorch.Lion",
        {"betas": (0.9, 0.98), "weight_decay": 0.1},
        "Lion",
        {"beta_1": 0.9, "beta_2": 0.98, "weight_decay": 0.1},
        "The decay is times the learning rate. Where no gradient has come yet, "
        "sign(0) = 0.",
    ),
    Trace(
        "lion_no_decay",
        "lion",
        "lion-pytorch",
        "lion_pytorch.Lion",
        {"betas": (0.9, 0.99)},
        "Lion",
        {"beta_1": 0.9, "beta_2": 0.99},
    ),
    Trace(
        "radam",
        "radam",
        "torch",
        "torch.optim.RAdam",
        {
            "betas": (0.9, 0.999),
            "eps": 1e-2,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
        },
        "RAdam",
        {
            "beta_1": 0.9,
            "beta_2": 0.999,
            "epsilon": 1e-2,
            "weight_decay": 0.1,
        },
        "Rectified where rho_t > 5 (the authors' code: >= 5; the paper: > 4), "
        "from step 6 on; before, a step along the corrected momentum. Epsilon-hat.",
    ),
    Trace(
        "radam_no_decay",
        "radam",
        "torch",
        "torch.optim.RAdam",
        {**BETAS, "eps": 1e-2},
        "RAdam",
        {**OUR_BETAS, "epsilon": 1e-2},
        "As `radam`.",
    ),
    Trace(
        "nadam",
        "nadam",
        "torch",
        "torch.optim.NAdam",
        {
            **BETAS,
            "eps": 1e-2,
            "momentum_decay": 1.0,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
        },
        "Nadam",
        {**OUR_BETAS, "epsilon": 1e-2, "weight_decay": 0.1},
        "momentum_decay=1 is Keras's 0.96**t (PyTorch's default, and the paper's: "
        "0.96**(t / 250)). Epsilon is after the bias correction, as in Keras. "
        "PyTorch's default dtype was float64, in which it keeps the product.",
    ),
    Trace(
        "nadam_no_decay",
        "nadam",
        "torch",
        "torch.optim.NAdam",
        {"betas": (0.9, 0.999), "eps": 1e-3, "momentum_decay": 1.0},
        "Nadam",
        {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-3},
        "As `nadam`.",
    ),
    Trace(
        "lamb",
        "lamb",
        "timm",
        "timm.optim.lamb.Lamb",
        {**BETAS, "eps": 1e-2, "weight_decay": 0.1, "max_grad_norm": None},
        "Lamb",
        {**OUR_BETAS, "epsilon": 1e-2, "weight_decay": 0.1},
        "The decay is inside the trust ratio, as in the paper (Keras: outside). "
        "Clipping of the global norm, on by default, is off.",
    ),
    Trace(
        "lamb_no_decay",
        "lamb",
        "timm",
        "timm.optim.lamb.Lamb",
        {
            **BETAS,
            "eps": 1e-2,
            "weight_decay": 0.0,
            "max_grad_norm": None,
            "always_adapt": True,
        },
        "Lamb",
        {**OUR_BETAS, "epsilon": 1e-2},
        "As `lamb`; always_adapt, for without decay timm leaves the ratio out.",
    ),
    Trace(
        "lars",
        "lars",
        "optax",
        "optax.lars",
        {"weight_decay": 0.1, "trust_coefficient": 0.01, "momentum": 0.9},
        "Lars",
        {"weight_decay": 0.1, "trust_coefficient": 0.01, "momentum": 0.9},
        "The ratio divides by |g + decay * w|, as TensorFlow's code (the paper: "
        "|g| + decay * |w|). The learning rate is inside the velocity.",
        rate=0.3,
    ),
    Trace(
        "lars_nesterov",
        "lars",
        "optax",
        "optax.lars",
        {"trust_coefficient": 0.01, "momentum": 0.9, "nesterov": True},
        "Lars",
        {"trust_coefficient": 0.01, "momentum": 0.9, "nesterov": True},
        "As `lars`.",
        rate=0.3,
    ),
    Trace(
        "adafactor",
        "adafactor",
        "torch",
        "torch.optim.Adafactor",
        {"eps": (1e-30, 1e-3), "d": 1.0, "beta2_decay": -0.8, "weight_decay": 0.02},
        "Adafactor",
        {
            "epsilon_1": 1e-30,
            "epsilon_2": 1e-3,
            "clip_threshold": 1.0,
            "beta_2_decay": -0.8,
            "weight_decay": 0.02,
        },
        "The decay is times the learning rate (not times alpha), and alpha is of "
        "the weight before it (Keras: after it). rho = min(rate, 1 / sqrt(t)). "
        "Theirs takes epsilon_1 as a bound where the paper adds it: too small to "
        "see. Factored over the last two axes, here also the longest two.",
        rate=0.8,
    ),
    Trace(
        "adafactor_no_decay",
        "adafactor",
        "torch",
        "torch.optim.Adafactor",
        {"eps": (1e-30, 1e-3), "d": 1.25, "beta2_decay": -0.7},
        "Adafactor",
        {
            "epsilon_1": 1e-30,
            "epsilon_2": 1e-3,
            "clip_threshold": 1.25,
            "beta_2_decay": -0.7,
        },
        "As `adafactor`.",
        rate=0.1,
    ),
    Trace(
        "adafactor_relative_step",
        "adafactor",
        "pytorch-optimizer",
        "pytorch_optimizer.AdaFactor",
        {"betas": (None, 0.999), "relative_step": True, "eps1": 1e-30, "eps2": 1e-3},
        "Adafactor",
        {"epsilon_1": 1e-30, "epsilon_2": 1e-3, "clip_threshold": 1.0},
        "The paper's min(1e-2, 1 / sqrt(t)). No momentum; their cap of 0.999 on "
        "beta_2 isn't reached. No decay: theirs is times alpha.",
        constant=True,
        rate=0.01,
    ),
    Trace(
        "muon",
        "muon_torch",
        "torch",
        "torch.optim.Muon",
        {"weight_decay": 0.1, "momentum": 0.95, "eps": 1e-30},
        "Muon",
        {
            "weight_decay": 0.1,
            "momentum": 0.95,
            "nesterov": True,
            "scale": "original",
            "iteration": "newton_schulz",
        },
        "float64, the cast to bfloat16 lifted. Theirs have outputs as rows, and the "
        "momentum is a mean: here transposed, and as a sum. The decay is times the "
        "learning rate alone.",
        shapes=MATRICES,
    ),
    Trace(
        "muon_match_rms_adamw",
        "muon_torch",
        "torch",
        "torch.optim.Muon",
        {
            "weight_decay": 0.0,
            "momentum": 0.9,
            "eps": 1e-30,
            "adjust_lr_fn": "match_rms_adamw",
            "nesterov": False,
        },
        "Muon",
        {
            "weight_decay": 0.0,
            "momentum": 0.9,
            "nesterov": False,
            "scale": "match_rms_adamw",
            "iteration": "newton_schulz",
        },
        "As `muon`; 0.2 * sqrt(max(rows, columns)).",
        shapes=MATRICES,
        rate=0.3,
    ),
    Trace(
        "muon_polar_express",
        "muon_pytorch_optimizer",
        "pytorch-optimizer",
        "pytorch_optimizer.Muon",
        {
            "use_muon": True,
            "weight_decay": 0.1,
            "momentum": 0.95,
            "nesterov": True,
            "ns_coeffs": [
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ],
        },
        "Muon",
        {
            "weight_decay": 0.1,
            "momentum": 0.95,
            "nesterov": True,
            "scale": "original",
            "iteration": "polar_express",
        },
        "As `muon`; with the table for five steps and the divisor 1.02 * norm. "
        "(Their own table of that name is for eight steps: cut at five it ends "
        "otherwise.)",
        shapes=MATRICES,
    ),
    Trace(
        "soap",
        "soap",
        "pytorch-optimizer",
        "pytorch_optimizer.SOAP",
        {
            "betas": (0.9, 0.95),
            "shampoo_beta": 0.8,
            "weight_decay": 0.1,
            "precondition_frequency": 3,
            "max_precondition_dim": 5,
            "eps": 1e-2,
        },
        "SOAP",
        {
            "beta_1": 0.9,
            "beta_2": 0.95,
            "shampoo_beta": 0.8,
            "weight_decay": 0.1,
            "precondition_frequency": 3,
            "max_precondition_dim": 5,
            "epsilon": 1e-2,
        },
        "float64, QR's cast to float32 lifted. The first step leaves the weights; "
        "the decay is of the weight after the step; axes over 5 and vectors keep "
        "the identity, so that all statistics have full rank. Bases are right up "
        "to the sign of a column.",
        shapes=SOAP_SHAPES,
    ),
    Trace(
        "soap_no_decay",
        "soap",
        "pytorch-optimizer",
        "pytorch_optimizer.SOAP",
        {
            "betas": (0.95, 0.95),
            "weight_decay": 0.0,
            "precondition_frequency": 3,
            "max_precondition_dim": 5,
            "eps": 1e-4,
        },
        "SOAP",
        {
            "beta_1": 0.95,
            "beta_2": 0.95,
            "weight_decay": 0.0,
            "precondition_frequency": 3,
            "max_precondition_dim": 5,
            "epsilon": 1e-4,
        },
        "As `soap`; shampoo_beta is beta_2.",
        shapes=SOAP_SHAPES,
    ),
    *(
        Trace(
            name,
            "prodigy",
            "prodigyopt",
            "prodigyopt.Prodigy",
            {**BETAS, "eps": 1e-2, "d0": 8e-3, **theirs},
            "Prodigy",
            {**OUR_BETAS, "epsilon": 1e-2, "initial_estimate": 8e-3, **ours},
            notes,
            rate=1.0,
        )
        for name, theirs, ours, notes in [
            (
                "prodigy",
                {"weight_decay": 0.1},
                {"weight_decay": 0.1},
                (
                    "The decay is times d and the learning rate. The sums carry "
                    "d / d0, and lack the paper's 1 - sqrt(beta_2): the same "
                    "quotient. Epsilon is times the new d (the paper: the old one)."
                ),
            ),
            (
                "prodigy_bias_correction",
                {"use_bias_correction": True, "d_coef": 2.0},
                {"bias_correction": True, "estimate_coefficient": 2.0},
                "As `prodigy`.",
            ),
            (
                "prodigy_safeguard",
                {
                    "use_bias_correction": True,
                    "safeguard_warmup": True,
                    "weight_decay": 0.1,
                },
                {
                    "bias_correction": True,
                    "safeguard_warmup": True,
                    "weight_decay": 0.1,
                },
                "As `prodigy`.",
            ),
        ]
    ),
    Trace(
        "schedule_free_adamw",
        "schedule_free",
        "schedulefree",
        "schedulefree.AdamWScheduleFree",
        {**BETAS, "eps": 1e-2, "weight_decay": 0.1, "warmup_steps": 5},
        "ScheduleFreeAdamW",
        {**OUR_BETAS, "epsilon": 1e-2, "weight_decay": 0.1, "warmup_steps": 5},
        "`after` is y, to train at, and `evaluated` is x. The decay is of y. A step "
        "of the average weighs the square of the largest rate so far, not of the "
        "rate. v is bias-corrected (the paper corrects gamma, as their "
        "AdamWScheduleFreePaper does). Gradients are copies: theirs writes into "
        "them. The slot `momentum` is z, as in Keras.",
    ),
    Trace(
        "schedule_free_adamw_no_decay",
        "schedule_free",
        "schedulefree",
        "schedulefree.AdamWScheduleFree",
        {**BETAS, "eps": 1e-2},
        "ScheduleFreeAdamW",
        {**OUR_BETAS, "epsilon": 1e-2},
        "As `schedule_free_adamw`.",
    ),
    Trace(
        "yogi",
        "yogi",
        "pytorch-optimizer",
        "pytorch_optimizer.Yogi",
        {**BETAS, "initial_accumulator": 0.25, "weight_decay": 0.1},
        "Yogi",
        {
            **OUR_BETAS,
            "epsilon": 1e-2,
            "initial_accumulator_value": 0.25,
            "weight_decay": 0.1,
        },
        "The first moment was made to start at 0, as in TensorFlow Addons and the "
        "paper (theirs: at `initial_accumulator`). The decay is decoupled, times the "
        "learning rate. Theirs adds epsilon after the bias correction: it was given "
        "epsilon / sqrt(1 - beta_2**t).",
    ),
    Trace(
        "yogi_no_decay",
        "yogi",
        "pytorch-optimizer",
        "pytorch_optimizer.Yogi",
        {"betas": (0.9, 0.999), "initial_accumulator": 1e-6},
        "Yogi",
        {
            "beta_1": 0.9,
            "beta_2": 0.999,
            "epsilon": 1e-3,
            "initial_accumulator_value": 1e-6,
        },
        "As `yogi`.",
    ),
    Trace(
        "mars_adamw",
        "mars",
        "pytorch-optimizer",
        "pytorch_optimizer.MARS",
        {
            **BETAS,
            "gamma": 0.05,
            "optimize_1d": True,
            "weight_decay": 0.1,
            "eps": 1e-2,
        },
        "AdamW",
        {
            **OUR_BETAS,
            "epsilon": 1e-2,
            "weight_decay": 0.1,
            "transforms": [["MARS", {"gamma": 0.05, "beta_1": 0.85}]],
        },
        "The approximate variant. Vectors are treated like matrices; by the authors' "
        "default a plain AdamW trains them. The decay is times the learning rate. Theirs "
        "keeps the last gradient by reference: each step has a new tensor.",
    ),
    Trace(
        "mars_lion",
        "mars",
        "pytorch-optimizer",
        "pytorch_optimizer.MARS",
        {"betas": (0.9, 0.99), "mars_type": "lion", "optimize_1d": True},
        "Lion",
        {
            "beta_1": 0.9,
            "beta_2": 0.9,
            "transforms": [["MARS", {"gamma": 0.025, "beta_1": 0.9}]],
        },
        "As `mars_adamw`. Its Lion steps by the sign of the momentum after the update: "
        "`Lion` with two equal decay rates.",
    ),
    Trace(
        "lookahead",
        "lookahead",
        "pytorch-optimizer",
        "pytorch_optimizer.Lookahead",
        {"k": 5, "alpha": 0.4},
        "AdamW",
        {
            **OUR_BETAS,
            "epsilon": 1e-2,
            "weight_decay": 0.1,
            "averaging": [["Lookahead", {"period": 5, "step_size": 0.4}]],
        },
        "Around `torch.optim.AdamW` with the arguments of `adamw`; the state of the inner "
        "optimizer is kept at a step back. " + EPSILON_HAT,
    ),
]
