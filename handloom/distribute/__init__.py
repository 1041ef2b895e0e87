"""Strategies, which decide how a run uses its devices: their contract, and the one for a single device."""

from handloom._util.shard import Shard as Shard
from handloom.distribute._strategy import SingleDevice as SingleDevice
from handloom.distribute._strategy import Strategy as Strategy
from handloom.distribute._strategy import current as current

__all__ = ["Shard", "SingleDevice", "Strategy", "current"]
