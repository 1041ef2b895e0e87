"""Findings: the mistakes that Handloom reports, and how to silence, collect or forbid the warnings."""

from handloom._util.findings import collect as collect
from handloom._util.findings import silence as silence
from handloom._util.findings import strict as strict
from handloom.errors import Finding as Finding

__all__ = ["Finding", "collect", "silence", "strict"]
