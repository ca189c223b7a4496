"""Which programs run the update of these gradients."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import tensorflow as tf

from tf_effopt.engine.sent import common_slots, own_slots
from tf_effopt.runtime import xla
from tf_effopt.runtime.base import Engine
from tf_effopt.runtime.missing_gradients import MissingGradients
from tf_effopt.runtime.programs import Program, shared_update
from tf_effopt.runtime.sparse_input import is_sparse
from tf_effopt.runtime.variables import local_component, mapped
from tf_effopt.runtime.watching import watchers

log = logging.getLogger("tf_effopt")

ANY_SET = "any set"  # a key of programs that are told which gradients there are


class Programs:
    """The programs of one optimizer, on all its replicas and devices.

    Attributes:
        by_set: the device, what watches, and the set of gradients -> programs.

    Args:
        engine: whose programs they are.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.by_set: dict[tuple, list[Program]] = {}
        self._of_sent: dict[tuple, list[Program]] = {}
        self._usual_sets: dict[tuple, tuple] = {}  # the first set of each place
        self._missing_gradients = MissingGradients(engine.variables)
        self._warned_of: set[tuple[str, str]] = set()

    def of(
        self, gradients: list[Any], indices: list[int]
    ) -> tuple[list[Program], list[Any], Any]:
        """The programs of this replica for gradients of these variables.

        The first set of variables gets dedicated programs. All other sets, such as those
        of stochastic depth, share programs that are told which gradients there are.

        Returns:
            The programs; the gradients that they take; a boolean for each variable,
            whether it has a gradient, or None for programs of this set.
        """
        here = self._device_of(indices[0])
        kinds = tuple(is_sparse(g) for g in gradients)
        # What is watched runs as other operations than what isn't.
        place = here, watchers()
        key = (*place, tuple(indices), kinds)
        usual = self._usual_sets.setdefault(place, key)
        any_set = (*place, ANY_SET)
        if not shares_programs(self.engine) or (
            # A set that comes back isn't compiled anew for counts that differ by now.
            key == usual and (any_set not in self.by_set or self.engine.counts_agree())
        ):
            if key not in self.by_set:
                self.by_set[key] = self._made(indices)
            return self.by_set[key], gradients, None
        trained = self.engine.trained_indices()
        if any_set not in self.by_set:
            self.by_set[any_set] = self._made(trained)
        given = dict(zip(indices, gradients, strict=True))
        filled = [
            self._missing_gradients.filled(
                given.get(i), self.engine.variables[i], self._device_of(i)
            )
            for i in trained
        ]
        present = np.zeros(len(self.engine.state), bool)
        present[indices] = True
        return self.by_set[any_set], filled, tf.constant(present)

    def of_sent(self, indices: list[int]) -> list[Program]:
        """Those of the stages on what is sent, for gradients of these variables."""
        key = self._device_of(indices[0]), watchers(), tuple(indices)
        if key not in self._of_sent:
            self._of_sent[key] = [
                self._program(device, members, indices, of_sent=True)
                for device, members in self._by_device(indices).items()
            ]
        return self._of_sent[key]

    def _device_of(self, index: int) -> str:
        """Where a variable is, on this replica."""
        return local_component(self.engine.state[index]["weight"]).device

    def _made(self, indices: list[int]) -> list[Program]:
        moved = self.engine.variables_to_update(indices)
        return [
            self._program(device, members, indices)
            for device, members in self._by_device(moved).items()
        ]

    def _by_device(self, indices: list[int]) -> dict[str, list[int]]:
        devices: dict[str, list[int]] = {}
        for i in indices:
            devices.setdefault(self._device_of(i), []).append(i)
        return devices

    def _program(
        self, device: str, members: list[int], indices: list[int], of_sent: bool = False
    ) -> Program:
        """The program of these members, which takes gradients of `indices`.

        Args:
            of_sent: whether it runs the stages on what is sent, not the update.
        """
        positions = {index: position for position, index in enumerate(indices)}
        plan = self.engine.plan
        select = own_slots if of_sent else common_slots
        variables = [self.engine.variables[i] for i in members]
        state = [
            mapped(local_component, select(plan, self.engine.state[i])) for i in members
        ]
        is_inlined = compiles_steps(self.engine.strategy)
        is_cpu = tf.DeviceSpec.from_string(device).device_type == "CPU"
        update = shared_update(
            device,
            plan,
            variables,
            state,
            is_compiled=not (is_inlined or of_sent)
            and self._compiles_on(device, variables, state),
            is_inlined=is_inlined,
            stacks_matrices=not is_cpu or is_inlined,
            replicas=self.engine.strategy.num_replicas_in_sync,
        )
        return Program(update, state, [positions.get(i) for i in members])

    def _compiles_on(self, device: str, variables: list, state: list[dict]) -> bool:
        """Whether XLA can run this optimizer's update on `device`."""
        if watchers():
            # Nor is a trial made, whose result would outlast the watching.
            self._warn_of(device, "XLA can't compile the operations of `tf.debugging`")
            return False
        failure = xla.update_failure(
            device, self.engine.plan, variables, state, self.engine.model_state
        )
        if failure is not None:
            self._warn_of(device, failure.splitlines()[0])
        return failure is None

    def _warn_of(self, device: str, failure: str) -> None:
        if (device, failure) in self._warned_of:
            return
        self._warned_of.add((device, failure))
        log.warning(
            "%s updates without XLA on %s: %s",
            type(self.engine.optimizer).__name__,
            device,
            failure,
        )


def shares_programs(engine: Engine) -> bool:
    """Whether all sets of variables with a gradient, but for the first, share programs."""
    # A step that is compiled as a whole is traced for its set; lazy rows are to stay rows.
    return not (compiles_steps(engine.strategy) or engine.is_lazy)


def compiles_steps(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy compiles whole steps, for TPU; see also `tf_effopt.tpu`."""
    is_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    return is_tpu or getattr(strategy, "compiles_steps", False)
