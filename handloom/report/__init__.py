"""Looks at finished and running runs: their events, curves and images as PNG, and quality measures."""

from handloom.report._events import read_events as read_events
from handloom.report._figures import save_curves as save_curves
from handloom.report._figures import save_image_grid as save_image_grid
from handloom.report._quality import frechet_distance as frechet_distance

__all__ = ["frechet_distance", "read_events", "save_curves", "save_image_grid"]
