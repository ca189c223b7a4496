"""One update of each optimizer library, ready to be timed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from workloads import Workload

OURS = "tf_effopt graph"


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer and its settings.

    Attributes:
        name: as on the command line.
        title: as in the report.
        rule: its class in `tf_effopt`.
        arguments: of the constructor, where they aren't the defaults.
        config: all of them, `get_config()` of ours.
    """

    name: str
    title: str
    rule: str
    arguments: dict[str, Any]
    config: dict[str, Any]

    @property
    def micro_steps(self) -> int:
        """Calls in an update."""
        return self.config.get("gradient_accumulation_steps") or 1

    @property
    def calls(self) -> int:
        """Calls in a full cycle: not all of them are alike.

        With accumulation some only accumulate; SOAP turns its bases now and then.
        """
        return self.micro_steps * (self.config.get("precondition_frequency") or 1)


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A library's way to run an update.

    Attributes:
        name: as in the report.
        framework: whose process it runs in.
        packages: what must be installed for it.
    """

    name: str
    framework: str
    packages: tuple[str, ...]


COMPETITORS = (
    Competitor(OURS, "tensorflow", ("tensorflow",)),
    Competitor("tf_effopt eager", "tensorflow", ("tensorflow",)),
    Competitor("Keras graph", "tensorflow", ("tensorflow",)),
    Competitor("Keras XLA", "tensorflow", ("tensorflow",)),
    Competitor("Keras eager", "tensorflow", ("tensorflow",)),
    Competitor("optax jit", "jax", ("jax", "optax")),
    Competitor("torch fused", "torch", ("torch",)),
)


class Update(Protocol):
    """An optimizer with its weights, gradients and state."""

    def build(self) -> None:
        """Makes the state."""

    def __call__(self) -> None:
        """Runs one update; returns when it is done."""

    def first_weights(self) -> np.ndarray:
        """The first tensor's first weights, to see that all do the same."""

    def state_bytes(self) -> int:
        """The state's size, scalars such as step counts left out."""


class NoSuchRule(Exception):
    """The library hasn't got this optimizer."""


# ----------------------------------------------------------- tf_effopt and Keras


class KerasUpdate:
    """`optimizer.apply` of `tf_effopt` or of `keras.optimizers`.

    Args:
        mode: `"eager"`, `"graph"` (a `tf.function`) or `"XLA"` (one with
            `jit_compile=True`).
    """

    def __init__(self, library: str, mode: str, case: Case, workload: Workload):
        import keras
        import tensorflow as tf

        self.strategy = _strategy(workload.replicas)
        with self.scope():
            self.variables = [keras.Variable(w) for w in workload.weights()]
            self.optimizer = _keras_optimizer(library, case)
        self.gradients = _keras_gradients(workload, self.strategy)
        compiled = {"graph": {}, "XLA": {"jit_compile": True}}
        self.step = self._step
        if mode != "eager":
            self.step = tf.function(self._step, autograph=False, **compiled[mode])

    def scope(self) -> Any:
        import tensorflow as tf

        return (self.strategy or tf.distribute.get_strategy()).scope()

    def _step(self) -> None:
        # A graph captures the gradients, as it has them in training. As arguments
        # each costs 8 microseconds of Python, which no training step pays.
        if self.strategy is None:
            self.optimizer.apply(self.gradients, self.variables)
        else:
            self.strategy.run(
                lambda g: self.optimizer.apply(g, self.variables),
                args=(self.gradients,),
            )

    def build(self) -> None:
        with self.scope():
            self.optimizer.build(self.variables)

    def __call__(self) -> None:
        self.step()
        self.optimizer.iterations.numpy()

    def first_weights(self) -> np.ndarray:
        return self.variables[0].numpy()

    def state_bytes(self) -> int:
        state = [v for v in self.optimizer.variables if len(v.shape)]
        return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in state)


@functools.cache
def _strategy(replicas: int) -> Any:
    import tensorflow as tf

    if replicas == 1:
        return None
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


@functools.cache  # All ways to run share one copy.
def _keras_gradients(workload: Workload, strategy: Any) -> Any:
    import tensorflow as tf

    def of_replica(replica: int) -> list[Any]:
        return [tf.constant(g) for g in workload.gradients(replica)]

    if strategy is not None:
        return strategy.experimental_distribute_values_from_function(
            lambda context: of_replica(context.replica_id_in_sync_group)
        )
    if workload.rows is None:
        return of_replica(0)
    ids = tf.constant(workload.ids())
    return [
        tf.IndexedSlices(values, ids, tf.constant(shape))
        for values, shape in zip(of_replica(0), workload.shapes, strict=True)
    ]


def _keras_optimizer(library: str, case: Case) -> Any:
    import keras

    import tf_effopt

    if library == "tf_effopt":
        if not hasattr(tf_effopt, case.rule):  # It may be another version.
            raise NoSuchRule
        return getattr(tf_effopt, case.rule)(**case.arguments)
    rule = {"GradientDescent": "SGD"}.get(case.rule, case.rule)
    if not hasattr(keras.optimizers, rule):
        raise NoSuchRule
    arguments = {k: v for k, v in case.arguments.items() if k != "lazy"}
    return getattr(keras.optimizers, rule)(**arguments)


# ------------------------------------------------------------------------- optax


def _optax_rule(case: Case) -> Any:
    import optax

    c, eta = case.config, case.config["learning_rate"]

    momentum = c.get("momentum") or None
    betas = {"b1": c.get("beta_1"), "b2": c.get("beta_2")}
    moments = {**betas, "eps": c.get("epsilon")}
    decay = {"weight_decay": c["weight_decay"] or 0.0}
    contrib = optax.contrib
    rules: dict[str, Callable[[], Any]] = {
        "GradientDescent": lambda: optax.sgd(eta),
        "SGD": lambda: optax.sgd(eta, momentum, c["nesterov"]),
        "RMSprop": lambda: optax.rmsprop(
            eta, c["rho"], c["epsilon"], centered=c["centered"], momentum=momentum
        ),
        "Adam": lambda: optax.adam(eta, **moments),
        "AdamW": lambda: optax.adamw(eta, **moments, **decay),
        "Lion": lambda: optax.lion(eta, **betas, **decay),
        "RAdam": lambda: optax.radam(eta, **moments),
        "Nadam": lambda: optax.nadam(eta, **moments),
        "Lamb": lambda: optax.lamb(eta, **moments, **decay),
        "Lars": lambda: optax.lars(
            eta,
            **decay,
            trust_coefficient=c["trust_coefficient"],
            momentum=momentum,
            nesterov=c["nesterov"],
        ),
        "Adafactor": lambda: optax.adafactor(eta, min_dim_size_to_factor=2),
        "Muon": lambda: contrib.muon(
            eta, beta=momentum, consistent_rms=c["rms_rate"], **decay
        ),
        "Prodigy": lambda: contrib.prodigy(eta, betas=tuple(betas.values()), **decay),
        "ScheduleFreeAdamW": lambda: contrib.schedule_free_adamw(eta, **moments),
        "Yogi": lambda: optax.yogi(eta, **moments),
    }
    if case.rule not in rules or c["lazy"]:
        raise NoSuchRule
    rule = rules[case.rule]()
    if c["global_clipnorm"]:
        rule = optax.chain(optax.clip_by_global_norm(c["global_clipnorm"]), rule)
    if case.micro_steps > 1:
        rule = optax.MultiSteps(rule, case.micro_steps)
    return rule


class OptaxUpdate:
    """`optax` in one `jax.jit`, weights and state donated."""

    def __init__(self, case: Case, workload: Workload):
        import jax
        import jax.numpy as jnp
        import optax

        self.rule = rule = _optax_rule(case)
        self.weights = [jnp.array(w) for w in workload.weights()]
        self.gradients = [jnp.array(g) for g in workload.gradients()]
        self.ids = None if workload.rows is None else jnp.array(workload.ids())
        self.state: Any = None
        self.averages = None
        if case.config["use_ema"]:
            self.averages = [jnp.array(w) for w in workload.weights()]
        share = 1 - case.config["ema_momentum"]

        def step(weights: Any, state: Any, averages: Any, gradients: Any, ids: Any):
            if ids is not None:  # JAX has no sparse gradients.
                gradients = [
                    jnp.zeros_like(w).at[ids].add(g)
                    for w, g in zip(weights, gradients, strict=True)
                ]
            updates, state = rule.update(gradients, state, weights)
            weights = optax.apply_updates(weights, updates)
            if averages is not None:
                averages = optax.incremental_update(weights, averages, share)
            return weights, state, averages

        self.step = jax.jit(step, donate_argnums=(0, 1, 2))

    def build(self) -> None:
        import jax

        # A copy: a state that starts at the weights can't be donated with them.
        state = self.rule.init(self.weights)
        self.state = jax.tree.map(lambda x: x.copy(), state)

    def __call__(self) -> None:
        import jax

        self.weights, self.state, self.averages = jax.block_until_ready(
            self.step(self.weights, self.state, self.averages, self.gradients, self.ids)
        )

    def first_weights(self) -> np.ndarray:
        return np.asarray(self.weights[0])

    def state_bytes(self) -> int:
        import jax

        arrays = jax.tree.leaves((self.state, self.averages))
        return sum(x.nbytes for x in arrays if x.ndim)


# ------------------------------------------------------------------------- torch


def _torch_optimizer(case: Case, weights: list[Any]) -> Any:
    import torch

    c = case.config
    rules: dict[str, tuple[type, dict]] = {}
    if case.rule in ("GradientDescent", "SGD"):
        momentum = {k: c[k] for k in ("momentum", "nesterov") if k in c}
        rules[case.rule] = torch.optim.SGD, {"fused": True, **momentum}
    elif case.rule == "RMSprop":  # It has no fused form.
        names = {"alpha": "rho", "momentum": "momentum", "centered": "centered"}
        settings = {k: c[ours] for k, ours in names.items()}
        settings |= {"eps": c["epsilon"], "foreach": True}
        rules["RMSprop"] = torch.optim.RMSprop, settings
    elif case.rule in ("Adam", "AdamW"):
        settings = {"betas": (c["beta_1"], c["beta_2"]), "eps": c["epsilon"]}
        if c["lazy"]:
            rules["Adam"] = torch.optim.SparseAdam, settings
        else:
            settings["fused"] = True
            rules["Adam"] = torch.optim.Adam, settings
            decay = {"weight_decay": c["weight_decay"]}
            rules["AdamW"] = torch.optim.AdamW, settings | decay
    elif case.rule in ("RAdam", "Nadam"):
        settings = {"betas": (c["beta_1"], c["beta_2"]), "eps": c["epsilon"]}
        theirs = {"RAdam": torch.optim.RAdam, "Nadam": torch.optim.NAdam}
        rules[case.rule] = theirs[case.rule], settings | {"foreach": True}
    elif case.rule == "Adafactor":
        rules["Adafactor"] = torch.optim.Adafactor, {"foreach": True}
    if case.rule not in rules:
        raise NoSuchRule
    optimizer, settings = rules[case.rule]
    return optimizer(weights, lr=c["learning_rate"], **settings)


class TorchUpdate:
    """`torch.optim` with `fused=True`, or `foreach=True` where it has no such."""

    def __init__(self, case: Case, workload: Workload):
        import torch

        self.case = case
        self.weights = [torch.nn.Parameter(torch.tensor(w)) for w in workload.weights()]
        self.gradients = [torch.tensor(g) for g in workload.gradients()]
        self.ids = None if workload.rows is None else torch.tensor(workload.ids())
        self.optimizer = _torch_optimizer(case, self.weights)
        self.averages: list[Any] = []
        self.micro_step = 0

    def build(self) -> None:
        import torch

        if self.ids is None:
            for w, g in zip(self.weights, self.gradients, strict=True):
                # With accumulation `backward` adds to `.grad`: no further state.
                w.grad = torch.zeros_like(w) if self.case.micro_steps > 1 else g
        if self.case.config["use_ema"]:
            self.averages = [w.detach().clone() for w in self.weights]

    def __call__(self) -> None:
        import torch

        self.micro_step += 1
        with torch.no_grad():
            if self.ids is not None:
                self._set_embedding_gradients()
            if self.case.micro_steps > 1:
                for w, g in zip(self.weights, self.gradients, strict=True):
                    w.grad.add_(g, alpha=1 / self.case.micro_steps)
                if self.micro_step % self.case.micro_steps:
                    return
            self._update()
            if self.case.micro_steps > 1:
                self.optimizer.zero_grad(set_to_none=False)

    def _set_embedding_gradients(self) -> None:
        import torch

        for w, g in zip(self.weights, self.gradients, strict=True):
            w.grad = None
            if self.case.config["lazy"]:
                w.grad = torch.sparse_coo_tensor(
                    self.ids[None], g, w.shape, check_invariants=False
                )
            else:
                w.grad = torch.zeros_like(w).index_add_(0, self.ids, g)

    def _update(self) -> None:
        import torch

        config = self.case.config
        if config["global_clipnorm"]:
            torch.nn.utils.clip_grad_norm_(self.weights, config["global_clipnorm"])
        self.optimizer.step()
        if self.averages:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(config["ema_momentum"])
            average(self.averages, [w.detach() for w in self.weights], 1)

    def first_weights(self) -> np.ndarray:
        return self.weights[0].detach().numpy()

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        tensors = [x for state in states for x in state.values()]
        tensors = [x for x in tensors if getattr(x, "ndim", 0)]
        return sum(x.nbytes for x in tensors + self.averages)


# ------------------------------------------------------------------------ choice


def make_update(competitor: str, case: Case, workload: Workload) -> Update:
    library, mode = competitor.split()
    if library == "optax":
        return OptaxUpdate(case, workload)
    if library == "torch":
        return TorchUpdate(case, workload)
    return KerasUpdate(library, mode, case, workload)
