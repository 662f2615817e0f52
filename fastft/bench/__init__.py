"""`fastft bench`: how fast a configuration trains on this machine, where a step's time goes, and what it could be."""

from fastft.bench.measure import bench

__all__ = ["bench"]
