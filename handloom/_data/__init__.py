"""Feeds: any source as batches with a position."""
