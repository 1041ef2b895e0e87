"""Warnings about sample weights, masks and losses that a step was given and does not use."""

from handloom._data.sample_weight import WEIGHTS
from handloom._util.findings import warn
from handloom.backends.dependencies import Dependencies

MASK, OWN_MASK = "the mask", "the mask computed by compute_mask of"
"""How the marks of masks begin: those of outputs, and those that the step computes by `layer.compute_mask`."""


def unused_in(dependencies: Dependencies) -> list[str]:
    """The marks that a program does not use; no masks of outputs if the step uses one that it computed itself."""
    unused = dependencies.unused
    uses_its_own = any(mark.startswith(OWN_MASK) and mark not in unused for mark in dependencies.marks)
    return [mark for mark in unused if not (uses_its_own and mark.startswith(MASK))]


def warn_of_unused(step: str, mark: str) -> None:
    """Warns that a step does not use a marked value. Values with other marks may be unused."""
    if mark == WEIGHTS:
        warn(
            f"HL204: {step} does not use the sample weights.",
            "Every example counts alike in its losses and metrics.",
            "Pass the weights on, for example compute_loss(x, y, y_pred, sample_weight), or do not give them to fit().",
        )
    elif mark.startswith(MASK):
        warn(
            f"HL252: {step} does not use {mark}.",
            "Masked values count like all others.",
            "Call a Keras loss with y_pred exactly as the layer returned it; in a loss of your own, multiply by "
            "layer.compute_mask(inputs). If the step masks in another way, silence this warning: "
            'hl.checks.silence("HL252").',
        )
    elif mark.startswith(("the losses added by", "the regularizer of")):
        warn(
            f"HL253: {step} does not use {mark}.",
            "It is part of no loss that the step minimizes.",
            "Use minimize(), which includes it, or add sum(layer.losses) to the loss.",
        )
