"""Feeds: any source as batches with a position; checks of labels and of sample weights."""
