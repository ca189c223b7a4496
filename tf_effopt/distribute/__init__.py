"""Several devices and hosts: what is done once for all of them."""

from tf_effopt.distribute.matrix_work import divide_matrix_work

__all__ = ["divide_matrix_work"]
