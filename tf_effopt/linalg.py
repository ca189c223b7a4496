"""Norms and matrix iterations for custom rules: see `tf_effopt.engine.linalg`."""

from tf_effopt.engine.linalg import *
