"""The folders that grow by one file at a time. A new member is a file in its folder: nothing here or elsewhere names
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastft.registry import Registry

if TYPE_CHECKING:
    from fastft.corpus.rules.base import Rule
    from fastft.data.orders.base import Order
    from fastft.models.edits.base import Edit
    from fastft.objectives.base import Wrapper
    from fastft.optim.groupings.base import Grouping
    from fastft.optim.optimizers.base import OptimizerSpec
    from fastft.tasks.base import Task
    from fastft.track.base import Tracker
    from fastft.train.observers.base import Observer

TASKS: Registry[type[Task]] = Registry("task", "fastft.tasks")
ORDERS: Registry[type[Order]] = Registry("sample order", "fastft.data.orders")
EDITS: Registry[type[Edit]] = Registry("model edit", "fastft.models.edits")
OBJECTIVES: Registry[type[Wrapper]] = Registry("objective", "fastft.objectives")
OPTIMIZERS: Registry[type[OptimizerSpec]] = Registry("optimizer", "fastft.optim.optimizers")
GROUPINGS: Registry[type[Grouping]] = Registry("parameter grouping", "fastft.optim.groupings")
OBSERVERS: Registry[type[Observer]] = Registry("observer", "fastft.train.observers")
RULES: Registry[type[Rule]] = Registry("rule", "fastft.corpus.rules")
TRACKERS: Registry[type[Tracker]] = Registry("tracker", "fastft.track")
