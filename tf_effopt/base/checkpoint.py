"""Configurations and files: what an optimizer saves and loads."""

from __future__ import annotations

import warnings
from typing import Any, Self

import keras
import numpy as np

from tf_effopt import runtime
from tf_effopt.base import saving
from tf_effopt.base.arguments import constructor_arguments
from tf_effopt.base.configurable import serialized
from tf_effopt.base.selection import Selection
from tf_effopt.engine import counts
from tf_effopt.runtime import keras_hooks
from tf_effopt.state.variables import dtype_name, placeholder

# Keys of a configuration that are no arguments of the constructor.
EXCLUSIONS = "exclude_from_weight_decay"
BUILT_ON = "built_on"
COMMUNICATION = "communication"
EXTRA_KEYS = EXCLUSIONS, BUILT_ON, COMMUNICATION
# Arguments that are lists of objects.
OBJECTS = ("transforms", "averaging", "groups")


class Saving(keras.optimizers.Optimizer):
    """The part of `Optimizer` that saves and loads."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, with their values now."""
        config = super().get_config()
        shared = [x.name for x in self.shared_arguments()]
        for name in (*constructor_arguments(type(self)), *shared):
            if name not in config:
                config[name] = getattr(self, name)
        config = {name: serialized(value) for name, value in config.items()}
        for name in OBJECTS:
            things = getattr(self, name)
            config[name] = [keras.saving.serialize_keras_object(x) for x in things]
        if self._decay_exclusions:
            config[EXCLUSIONS] = self._decay_exclusions.get_config()
        if communication := self._engine.communication.get_config():
            config[COMMUNICATION] = communication
        if self._built_on:
            config[BUILT_ON] = [[path, list(shape)] for path, shape in self._built_on]
        return config

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> Self:
        """Makes an optimizer from what `get_config` returned."""
        config = dict(config)
        extras = {name: config.pop(name) for name in EXTRA_KEYS if name in config}
        for name in OBJECTS:
            config[name] = [
                keras.saving.deserialize_keras_object(x, custom_objects=custom_objects)
                for x in config.get(name, ())
            ]
        optimizer = super().from_config(config, custom_objects=custom_objects)
        optimizer._set_from_config(extras)
        return optimizer

    def _set_from_config(self, extras: dict[str, Any]) -> None:
        """Sets what is in a configuration but no argument of the constructor."""
        if exclusions := extras.get(EXCLUSIONS):
            self._decay_exclusions = Selection.of_saved(exclusions)
        if built_on := extras.get(BUILT_ON):
            self._built_on = [(path, tuple(shape)) for path, shape in built_on]
        if communication := extras.get(COMMUNICATION):
            self._engine.communication = runtime.Communication(**communication)

    def save_own_variables(self, store: Any) -> None:
        """Saves the state, also one that was loaded and waits for `build`."""
        missed = self._missed_to_load
        if self._state_to_load is None:
            super().save_own_variables(store)
            missed = self._engine.missed()
        else:
            for i, value in enumerate(self._pending_state()):
                store[str(i)] = value
        if missed is not None:
            store[counts.MISSED] = missed

    def load_own_variables(self, store: Any) -> None:
        """Loads the state that this class, or Keras's own of its name, saved.

        An optimizer that isn't built yet keeps it until it is, but for the number of
        updates and the learning rate, which are in place at once.

        Raises:
            ValueError: the state is that of another optimizer or model.
        """
        keys = set(store.keys())
        state = [np.array(store[str(i)]) for i in range(len(keys - {counts.MISSED}))]
        state = saving.without_loss_scale(state)
        if not state:
            return  # The file is of a model that wasn't compiled.
        self._missed_to_load = (
            np.array(store[counts.MISSED]) if counts.MISSED in keys else None
        )
        self._numbers_before = self._numbers_now()
        self._may_skip_state = keras_hooks.skips_mismatches()
        if self.built:
            self._assign_state(state)
            self._assign_missed()
        elif saving.is_untrained(state) or saving.fits(
            self._in_this_layout(state), self.variables
        ):
            self._assign_state(state)
            if int(self._iterations) > 0:
                # It has trained, so `build` must not add slots to this state.
                self._state_to_load = state
        else:
            self._state_to_load = state
            for variable, value in zip(self._numbers(), state, strict=False):
                if value.shape == ():  # else it isn't this optimizer's: `build` says so
                    variable.assign(value)

    def set_weights(self, weights: list[Any]) -> None:
        """Sets the state, as Keras's; before `build` it waits, as what was loaded.

        Args:
            weights: values of this optimizer's `variables`, in their order.

        Raises:
            ValueError: the state is that of another optimizer or model.
        """
        values = map(keras.ops.convert_to_numpy, weights)
        self.load_own_variables({str(i): value for i, value in enumerate(values)})

    def _pending_state(self) -> list[np.ndarray]:
        """The state that waits for `build`; what may have changed since, as it is now."""
        state, numbers = list(self._state_to_load), self._numbers_now()
        state[0] = numbers[0]
        if len(numbers) > 1 and self._has_rate(state):
            state[1] = numbers[1]
        return state

    def _has_rate(self, state: list[np.ndarray]) -> bool:
        """Whether a state that waits has a learning rate."""
        if len(state) < 2 or state[1].shape != ():
            return False
        # A scalar weight's first slot looks like one.
        lacks = self.built and saving.fits([state[0], *state], self.variables)
        return not lacks

    def _assign_pending_state(self) -> None:
        state, loaded = self._pending_state(), self._state_to_load
        self._state_to_load = None
        if not self._has_rate(loaded):
            self._put_numbers_back(loaded, first=1)
        try:
            self._assign_state(state)
        except ValueError as error:
            if not self._may_skip_state:
                raise
            self._put_numbers_back(loaded)
            self._missed_to_load = None
            warnings.warn(
                f"{self.name}: the training starts with no state, since the weights "
                f"were loaded with `skip_mismatch=True`. {error}",
                stacklevel=4,
            )

    def _put_numbers_back(self, loaded: list[np.ndarray], first: int = 0) -> None:
        """Undoes what loading has set before `build`, unless it was changed since."""
        for variable, value, before in list(
            zip(self._numbers(), loaded, self._numbers_before, strict=False)
        )[first:]:
            if value.shape == () and value == keras.ops.convert_to_numpy(variable):
                variable.assign(before)

    def _numbers_now(self) -> list[np.ndarray]:
        return [np.array(keras.ops.convert_to_numpy(v)) for v in self._numbers()]

    def _numbers(self) -> list[keras.Variable]:
        """What is there before `build`, and first in the state.

        The number of updates and, unless it is a schedule, the learning rate.
        """
        rate = self._learning_rate
        return [self._iterations, *([rate] if isinstance(rate, keras.Variable) else [])]

    def _assign_state(self, state: list[np.ndarray]) -> None:
        if saving.is_untrained(state):
            for variable, value in zip(self._numbers(), state, strict=False):
                variable.assign(value)
            return
        variables = self.variables
        state = self._in_this_layout(state)
        if self._built_on_before and not saving.fits(state, variables):
            self._assign_some_of(state)
            return
        saving.check_fits(self.name, state, variables)
        for variable, value in zip(variables, state, strict=True):
            variable.assign(value)

    def _in_this_layout(self, state: list[np.ndarray]) -> list[np.ndarray]:
        """The state as this optimizer has it, if it can be brought to that."""
        for candidate in saving.with_rate_as(state, self._numbers_now()):
            if saving.fits(candidate, self.variables):
                return candidate
            if not self.built:
                continue
            first = self._slots_start
            slots = self.convert_keras_slots(candidate[first:], steps=int(candidate[0]))
            if slots is not None and saving.fits(
                candidate[:first] + slots, self.variables
            ):
                return candidate[:first] + slots
        return state

    def _assign_missed(self) -> None:
        """Assigns what variables missed of the updates, by the state just loaded."""
        missed, self._missed_to_load = self._missed_to_load, None
        if missed is not None and len(missed) != len(self._trainable_variables):
            raise ValueError(
                f"The saved state doesn't fit {self.name!r}: it has counts of updates "
                f"of {len(missed)} variables, and the optimizer trains "
                f"{len(self._trainable_variables)}. Train the variables that it was "
                "saved with."
            )
        self._engine.set_missed(missed)

    def _assign_some_of(self, state: list[np.ndarray]) -> None:
        """Assigns what is of the variables that are still trained."""
        whole = self._unbuilt_copy(groups=[])
        whole._built_on, whole._state_to_load = self._built_on_before, None
        dtypes = [dtype_name(v) for v in self._trainable_variables]
        dtype = dtypes[0] if dtypes else None
        with self._engine.building(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `build` has said what there is to say.
            whole.build([placeholder(*known, dtype) for known in whole._built_on])
            whole._assign_state(state)
            whole._missed_to_load = self._missed_to_load
            whole._assign_missed()
        places = [whole._built_on.index(known) for known in self._built_on]
        self._take_state(whole, places)
        self._missed_to_load = self._engine.missed()
        for mine, other in zip(self._numbers(), whole._numbers(), strict=True):
            mine.assign(keras.ops.copy(other.value))

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict:
        """TensorFlow's: what is saved below this object."""
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":
            # A function that calls `apply` takes them along. In a checkpoint they'd
            # be missing from every file of Keras's optimizers, and of earlier versions.
            own = self._engine.untracked_variables()
            children |= {f"_engine{name}": x for name, x in own.items()}
        elif self._record_of_missed() is not None and self._engine.missed() is not None:
            children[counts.MISSED] = self._record_of_missed()
        return children

    def _lookup_dependency(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == counts.MISSED and self._record_of_missed() is not None:
            return self._record_of_missed()
        return super()._lookup_dependency(name, *args, **kwargs)

    def _record_of_missed(self) -> Any:
        return getattr(self._engine, "missed_record", None) if self.built else None

    def convert_keras_slots(
        self, saved: list[np.ndarray], steps: int
    ) -> list[np.ndarray] | None:
        """The slots from those that Keras's class of the same name saved.

        For classes whose slots differ from Keras's on purpose.

        Args:
            saved: what comes after averages and accumulators in Keras's state.
            steps: of the saved training.

        Returns:
            The values of this optimizer's slots, or None if `saved` isn't Keras's.
        """
        return None
