"""Compiles for TPU ahead of time, on a machine without one.

    python -m tf_effopt.tpu --optimizer AdamW Muon --topology v5e:2x2

Needs the extra `[tpu-compile]`. What is compiled was not run: memory and the number
of all-reduces are those of the program, HBM traffic and cycles are estimates, and
there is no time.
"""

from tf_effopt.tpu.report import Report
from tf_effopt.tpu.steps import compile_train_step, compile_update

__all__ = ["Report", "compile_train_step", "compile_update"]
