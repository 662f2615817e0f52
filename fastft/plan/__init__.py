"""Planning past the machines at hand: step time, memory, failures of a run,
from a model that is held to published measurements.
"""
