"""Clipping for custom transforms: see `tf_effopt.engine.clipping`."""

from tf_effopt.engine.clipping import *
