"""Which rule trains which tensor, by what the tensor is to its layer."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from tf_effopt.base.optimizer import Optimizer
from tf_effopt.base.role import EMBEDDING, HIDDEN, Role
from tf_effopt.base.roles import Roles
from tf_effopt.base.roles_by_path import role_by_path
from tf_effopt.hyperparameters import Hyperparameter
from tf_effopt.rules import Matrices, Part
from tf_effopt.state.variables import matches


class KnownRoles(Hyperparameter):
    """`Roles`, or None, fixed once the optimizer is built."""

    expected = "what `tf_effopt.roles(model)` returned, or None"

    def check(self, value: Any) -> Roles | None:
        if isinstance(value, dict) and set(value) == {"entries"}:
            return Roles.from_config(value)  # as `get_config` gives it
        if value is not None and not isinstance(value, Roles):
            raise self.error(value)
        return value

    def structure(self, value: Roles | None) -> Roles | None:
        return value


class RoutedByRole(Optimizer):
    """Base of optimizers with one rule for hidden matrices and one for all else.

    A subclass sets `other_part` and `matrix_part`, and declares `roles`,
    `exclude_layers`, `exclude_embeddings` and `split_heads`.
    """

    other_part: ClassVar[Part]

    def matrix_part(self, view: Matrices) -> Part:
        """The part of the matrices that are looked at in this way."""
        raise NotImplementedError

    def part(self, path: str, shape: tuple[int, ...]) -> Part:
        (part,) = self.parts([(path, shape)])
        return part

    def parts(self, variables: list[tuple[str, tuple[int, ...]]]) -> list[Part]:
        if self.roles is None:
            roles = [role_by_path(path, shape) for path, shape in variables]
        else:
            roles = self.roles.of(variables)
        return [
            self._part_of(path, role)
            for (path, _), role in zip(variables, roles, strict=True)
        ]

    def _part_of(self, path: str, role: Role) -> Part:
        is_embedding = role.kind == EMBEDDING and not self.exclude_embeddings
        if matches(self.exclude_layers, path) or not (
            role.kind == HIDDEN or is_embedding
        ):
            return self.other_part
        view = (role.per_head() if self.split_heads else role).matrices
        return self.other_part if view is None else self.matrix_part(view)

    def build(self, variables: list[Any]) -> None:
        is_new = not self.built
        super().build(variables)
        if is_new:
            self._warn_of_routing()

    def _warn_of_routing(self) -> None:
        parts = self.parts(self._built_on)
        rows = [
            f"{part.name:5}  {path}  {shape}"
            for (path, shape), part in zip(self._built_on, parts, strict=True)
            if len(shape) > 1
        ]
        if self._built_on and all(part is self.other_part for part in parts):
            lora = any("lora" in path.lower() for path, _ in self._built_on)
            why = " (adapters of LoRA aren't hidden matrices)" if lora else ""
            warnings.warn(
                f"{self.name} trains no variable by {type(self).__name__}: none of the "
                f"{len(parts)} is a hidden matrix{why}, so that AdamW trains all. Use "
                "`tf_effopt.AdamW`, or see `print(optimizer.describe())`.",
                stacklevel=3,
            )
        elif self.roles is None and any(part is not self.other_part for part in parts):
            table = "\n".join(rows)
            warnings.warn(
                f"{self.name} goes by the paths and shapes of the variables:\n{table}\n"
                "An output layer can't be told by its path. Pass "
                "`roles=tf_effopt.roles(model)`, or name it: "
                "`exclude_layers=['name of the output layer']`.",
                stacklevel=3,
            )
