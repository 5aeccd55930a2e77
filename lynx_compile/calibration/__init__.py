"""From a pipeline to a profile: statistics, closed-form branches, sensitivity, choice, refinement."""

from .emulation import emulate
from .run import calibrate
from .workload import Inputs, Pipeline, Workload

__all__ = ["Inputs", "Pipeline", "Workload", "calibrate", "emulate"]
