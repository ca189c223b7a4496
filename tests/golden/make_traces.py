"""Makes the golden traces: what other implementations do, step by step.

    python tests/golden/make_traces.py [name ...]

writes `<name>.npz` beside this file, of all or of those named, and `README.md`. It
needs the packages in the README, and no others: the tests only read the files.

Gradients don't depend on the weights, so that a difference in one step isn't
carried into the next ones but by the rule itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import json
import math
import pathlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from table import STEPS, TRACES, Trace

HERE = pathlib.Path(__file__).parent
ZERO_STEP = 7  # from 0, without any gradient


@dataclass(frozen=True)
class Problem:
    """What the rule is given: all in float64, with values that fit in float32.

    But for a constant learning rate, which may be one that is in a paper.

    Attributes:
        weights: one array for each tensor.
        gradients: for each tensor an array `(steps, *shape)`.
        rates: `(steps,)`.
    """

    weights: list[np.ndarray]
    gradients: list[np.ndarray]
    rates: np.ndarray


@dataclass
class Run:
    """What the reference did.

    Attributes:
        after: for each step, the weights after it.
        slots: for each tensor, its state at the end, by Keras's names.
        evaluated: for each step the weights to evaluate at, where they differ.
        totals: for each step the model-wide scalars.
    """

    after: list[list[np.ndarray]] = field(default_factory=list)
    slots: list[dict[str, np.ndarray]] = field(default_factory=list)
    evaluated: list[list[np.ndarray]] = field(default_factory=list)
    totals: list[dict[str, float]] = field(default_factory=list)


def problem_of(trace: Trace) -> Problem:
    """Weights near 4, gradients that push them down, a warm-up and a decay.

    The values of weights and gradients are multiples of 1/128.
    """
    rng = np.random.default_rng(20)

    def coarse(x):
        return np.round(x * 128) / 128

    weights = [coarse(rng.normal(size=shape) + 4.0) for shape in trace.shapes]
    gradients = [
        coarse(rng.normal(size=(STEPS, *shape)) + 0.5) for shape in trace.shapes
    ]
    for i, shape in enumerate(trace.shapes):
        if shape == (3,):
            weights[i] = np.zeros(shape)
        if shape == (7,):
            gradients[i][:3, 0] = 0.0
        gradients[i][ZERO_STEP] = 0.0
    if trace.constant:
        return Problem(weights, gradients, np.full(STEPS, trace.rate))
    rates = [
        trace.rate * (i / 4 if i < 4 else 0.93 ** (i - 4)) for i in range(1, STEPS + 1)
    ]
    return Problem(weights, gradients, np.array(rates, "float32").astype("float64"))


def located(name: str) -> Any:
    """The class or function of a full name.

    `timm.optim` is imported without `timm` itself, which needs torchvision.
    """
    if name.startswith("timm.") and "timm" not in sys.modules:
        package = types.ModuleType("timm")
        spec = importlib.util.find_spec("timm")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["timm"] = package
        # Its registry of optimizers needs the models.
        optim = types.ModuleType("timm.optim")
        optim.__path__ = [str(pathlib.Path(package.__path__[0]) / "optim")]
        sys.modules["timm.optim"] = optim
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def array(x: Any) -> np.ndarray:
    """A copy of a tensor in NumPy, which must be in float64."""
    if isinstance(x, torch.Tensor):
        x = x.detach().numpy()
    x = np.array(x)
    assert x.dtype == np.float64
    return x


def torch_run(
    trace: Trace,
    problem: Problem,
    slots: dict[str, str] | Callable[[dict], dict],
    before: Callable[[Any, int], None] | None = None,
    after: Callable[[Any, Run, list], None] | None = None,
    in_groups: bool = False,
) -> Run:
    """Runs a `torch.optim.Optimizer`.

    Args:
        trace, problem: what to run.
        slots: our name -> the reference's, or a function of its state.
        before: called before each step, with its number from 1.
        after: called after each step.
        in_groups: whether to pass the tensors as a group with the arguments.
    """
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in problem.weights]
    rate = float(problem.rates[0])
    arguments = {"lr": rate, **trace.arguments}
    cls = located(trace.reference)
    if in_groups:
        optimizer = cls([{"params": parameters, **arguments}])
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = cls(parameters, **arguments)
    run = Run()
    for step, rate in enumerate(problem.rates):
        for parameter, gradients in zip(parameters, problem.gradients, strict=True):
            # A new tensor each time: some references write into it.
            parameter.grad = torch.tensor(gradients[step])
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        if before:
            before(optimizer, step + 1)
        optimizer.step()
        run.after.append([array(p) for p in parameters])
        if after:
            after(optimizer, run, parameters)
    for parameter in parameters:
        state = optimizer.state[parameter]
        if callable(slots):
            run.slots.append({name: array(x) for name, x in slots(state).items()})
        else:
            run.slots.append(
                {
                    ours: array(state[theirs])
                    for ours, theirs in slots.items()
                    if theirs in state
                }
            )
    return run


def optax_run(
    trace: Trace,
    problem: Problem,
    transformation: optax.GradientTransformation,
    slots: dict[str, str],
) -> Run:
    """Runs a transformation whose learning rate is inside it.

    `slots` says where a slot is: our name -> a field of one of its states.
    """
    weights = [jnp.asarray(w) for w in problem.weights]
    state = transformation.init(weights)
    run = Run()
    for step in range(STEPS):
        gradients = [jnp.asarray(g[step]) for g in problem.gradients]
        updates, state = transformation.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
        run.after.append([array(w) for w in weights])
    parts = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "_fields"))
    for i in range(len(weights)):
        run.slots.append(
            {
                ours: array(getattr(part, name)[i])
                for ours, name in slots.items()
                for part in parts
                if hasattr(part, name)
            }
        )
    return run


def schedule_of(problem: Problem) -> Callable[[Any], jax.Array]:
    """The learning rates as a function of the number of the step, from 0."""
    rates = jnp.asarray(problem.rates)
    return lambda count: rates[count]


ADAM_SLOTS = {"momentum": "exp_avg", "velocity": "exp_avg_sq"}


def gradient_descent(trace, problem):
    return torch_run(trace, problem, slots={})


def decoupled_decay(trace, problem):
    """The decay times the learning rate, added to a transformation's updates."""
    decay = trace.settings.get("weight_decay", 0.0)
    rate = schedule_of(problem)
    return optax.add_decayed_weights(lambda count: -decay * rate(count))


def sgd(trace, problem):
    transformation = optax.chain(
        optax.scale_by_learning_rate(schedule_of(problem)),
        optax.trace(**trace.arguments),
        decoupled_decay(trace, problem),
    )
    return optax_run(trace, problem, transformation, slots={"momentum": "trace"})


def set_epsilon(trace, optimizer, t):
    """Such that an epsilon after the bias correction is our epsilon-hat."""
    for group in optimizer.param_groups:
        bias_2 = 1 - group["betas"][1] ** t
        group["eps"] = trace.settings["epsilon"] / math.sqrt(bias_2)


def adam(trace, problem):
    slots = ADAM_SLOTS | {"velocity_hat": "max_exp_avg_sq"}
    before = functools.partial(set_epsilon, trace)
    return torch_run(trace, problem, slots, before)


def yogi(trace, problem):
    """With a first moment that starts at 0."""

    def before(optimizer, t):
        set_epsilon(trace, optimizer, t)
        if t == 1:
            for group in optimizer.param_groups:
                optimizer.init_group(group)
                for parameter in group["params"]:
                    optimizer.state[parameter]["exp_avg"].zero_()

    return torch_run(trace, problem, ADAM_SLOTS, before)


def rmsprop(trace, problem):
    transformation = optax.chain(
        optax.rmsprop(schedule_of(problem), **trace.arguments),
        decoupled_decay(trace, problem),
    )
    run = optax_run(
        trace,
        problem,
        transformation,
        slots={"velocity": "nu", "average_gradient": "mu", "momentum": "trace"},
    )
    for slots in run.slots:
        if "momentum" in slots:
            slots["momentum"] = -slots["momentum"]
    return run


def lion(trace, problem):
    return torch_run(trace, problem, {"momentum": "exp_avg"})


def radam(trace, problem):
    return torch_run(trace, problem, ADAM_SLOTS)


def nadam(trace, problem):
    return torch_run(trace, problem, ADAM_SLOTS)


def lamb(trace, problem):
    return torch_run(trace, problem, ADAM_SLOTS)


def lars(trace, problem):
    transformation = optax.lars(schedule_of(problem), **trace.arguments)
    run = optax_run(trace, problem, transformation, slots={"momentum": "trace"})
    for slots in run.slots:
        slots["momentum"] = -slots["momentum"]
    return run


def adafactor(trace, problem):
    """Of two packages, which name their state differently."""

    def slots(state):
        if "variance" in state:
            return {"velocity": state["variance"]}
        if "row_var" in state:
            return {
                "row": state["row_var"].squeeze(-1),
                "column": state["col_var"].squeeze(-2),
            }
        if "exp_avg_sq" in state:
            return {"velocity": state["exp_avg_sq"]}
        return {"row": state["exp_avg_sq_row"], "column": state["exp_avg_sq_col"]}

    return torch_run(trace, problem, slots)


def muon_run(trace: Trace, problem: Problem, in_groups: bool = False) -> Run:
    """Theirs have outputs as rows, ours `(inputs, outputs)`; the momentum as a sum."""
    turned = Problem(
        [w.T for w in problem.weights],
        [g.swapaxes(1, 2) for g in problem.gradients],
        problem.rates,
    )
    slots = {"momentum": "momentum_buffer"}
    run = torch_run(trace, turned, slots, in_groups=in_groups)
    sums = 1 / (1 - trace.settings["momentum"])
    return Run(
        after=[[w.T for w in step] for step in run.after],
        slots=[{"momentum": sums * slot["momentum"].T} for slot in run.slots],
    )


def muon_torch(trace, problem):
    """In float64: the cast to bfloat16 is lifted, but for its being a copy."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        return muon_run(trace, problem)


def muon_pytorch_optimizer(trace, problem):
    """In float64; and divided by 1.02 times the norm, which its class can't say."""
    base = importlib.import_module("pytorch_optimizer.optimizer.muon.base")
    function = functools.partial(
        base.zero_power_via_newton_schulz_5,
        dtype=torch.float64,
        eps=1e-30,
        safety_factor=1.02,
    )
    with mock.patch.object(base, "zero_power_via_newton_schulz_5", function):
        return muon_run(trace, problem, in_groups=True)


def soap(trace, problem):
    """In float64: QR's cast to float32 is lifted."""
    to = torch.Tensor.to
    lifted = []

    def kept(self, *args, **kwargs):
        if args == (torch.float32,) and self.dtype == torch.float64:
            lifted.append(1)
            return self
        return to(self, *args, **kwargs)

    def slots(state):
        named = {"momentum": state["exp_avg"], "velocity": state["exp_avg_sq"]}
        for k, (statistics, basis) in enumerate(
            zip(state["GG"], state["Q"], strict=True)
        ):
            if len(basis):
                named |= {f"statistics_{k}": statistics, f"basis_{k}": basis}
        return named

    with mock.patch.object(torch.Tensor, "to", kept):
        run = torch_run(trace, problem, slots)
    assert lifted
    return run


def prodigy(trace, problem):
    def after(optimizer, run, parameters):
        run.totals.append({"estimate": optimizer.param_groups[0]["d"]})

    def slots(state):
        shape = state["exp_avg"].shape
        return {
            "momentum": state["exp_avg"],
            "velocity": state["exp_avg_sq"],
            "gradient_sum": state["s"].reshape(shape),
            "initial": state["p0"].expand(math.prod(shape)).reshape(shape),
        }

    return torch_run(trace, problem, slots, after=after)


def schedule_free(trace, problem):
    def before(optimizer, t):
        optimizer.train()

    def after(optimizer, run, parameters):
        optimizer.eval()
        run.evaluated.append([array(p) for p in parameters])
        optimizer.train()

    slots = {"velocity": "exp_avg_sq", "momentum": "z"}
    return torch_run(trace, problem, slots, before, after)


def mars(trace, problem):
    """Its own epsilon is our epsilon-hat. A Lion has no second moment."""
    slots = {"momentum": "exp_avg", "last_gradient": "last_grad"}
    if trace.class_name == "AdamW":
        slots["velocity"] = "exp_avg_sq"
    return torch_run(trace, problem, slots)


def lookahead(trace, problem):
    """Around AdamW, of which `adamw` is the trace."""
    wrapper = located(trace.reference)
    inner = next(x for x in TRACES if x.name == "adamw")
    made = []

    def make(parameters, lr, **arguments):
        made.append(torch.optim.AdamW(parameters, lr=lr, **inner.arguments))
        return wrapper(made[0], **arguments)

    def before(optimizer, t):
        set_epsilon(trace, optimizer, t)

    with mock.patch(trace.reference, make):
        run = torch_run(trace, problem, {"slow_weight": "slow_params"}, before)
    for slots, parameter in zip(run.slots, made[0].param_groups[0]["params"]):
        state = made[0].state[parameter]
        slots |= {ours: array(state[theirs]) for ours, theirs in ADAM_SLOTS.items()}
    return run


def write(trace: Trace, make: Callable[[Trace, Problem], Run]) -> None:
    """Makes one file; `tests/golden_traces.py` reads it."""
    problem = problem_of(trace)
    run = make(trace, problem)
    config = {
        "class_name": trace.class_name,
        "arguments": {"learning_rate": float(problem.rates[0]), **trace.settings},
    }
    provenance = {
        "package": trace.package,
        "version": importlib.metadata.version(trace.package),
        "reference": trace.reference,
        "arguments": trace.arguments,
        "dtype": "float64",
        "constant_rate": trace.constant,
        "notes": trace.notes,
    }
    arrays = {
        "config": np.array(json.dumps(config)),
        "provenance": np.array(json.dumps(provenance)),
        "learning_rates": problem.rates,
    }
    for i, weight in enumerate(problem.weights):
        # Exact: the values are multiples of 1/128.
        arrays[f"weight/{i}"] = weight.astype("float32")
        arrays[f"gradient/{i}"] = problem.gradients[i].astype("float32")
        arrays[f"after/{i}"] = np.stack([step[i] for step in run.after])
        if run.evaluated:
            arrays[f"evaluated/{i}"] = np.stack([step[i] for step in run.evaluated])
        for name, slot in run.slots[i].items():
            arrays[f"slot/{i}/{name}"] = slot
    for name in run.totals[0] if run.totals else ():
        arrays[f"total/{name}"] = np.array([step[name] for step in run.totals])
    for value in arrays.values():
        assert value.dtype.kind == "U" or np.all(np.isfinite(value))
    np.savez_compressed(HERE / f"{trace.name}.npz", **arrays)


README = """\
# Golden traces

What the authors' own code does, or a known package where there is none: the
weights after each step, from gradients that are in the file.
`make_traces.py` makes them from `table.py`; `../golden_traces.py` reads them.

```
pip install numpy jax {packages}
pip install --no-deps {timm}
python tests/golden/make_traces.py
```

Each has {steps} steps in float64, a learning rate that rises and falls (or is
constant, where it says so) and step 8 with no gradient at all. Gradients don't
depend on the weights. Where the rule takes any shape, one tensor starts at 0,
and one element has no gradient until step 4.

| trace | package | made by | our arguments | notes and traps |
|---|---|---|---|---|
{rows}
"""


def readme() -> str:
    """The table of all traces, and how to make them again."""

    def call(name: str, arguments: dict) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        return f"`{name}({inside})`"

    pinned, rows = {}, []
    for trace in TRACES:
        with np.load(HERE / f"{trace.name}.npz") as file:
            made = json.loads(file["provenance"].item())
        version = made["version"].partition("+")[0]
        pinned[trace.package] = f"{trace.package}=={version}"
        notes = trace.notes + (" Constant learning rate." if trace.constant else "")
        cells = [
            f"`{trace.name}`",
            f"{trace.package} {version}",
            call(trace.reference, trace.arguments),
            call(trace.class_name, trace.settings),
            notes.strip(),
        ]
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    timm = pinned.pop("timm")
    return README.format(
        packages=" ".join(sorted(pinned.values())),
        timm=timm,
        steps=STEPS,
        rows="\n".join(rows),
    )


def main(names: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    for trace in TRACES:
        if not names or trace.name in names:
            write(trace, globals()[trace.make])
    (HERE / "README.md").write_text(readme())


if __name__ == "__main__":
    main(sys.argv[1:])
