"""Findings: what a stability report comes to, by stated rules.

A rule is a pure function of the report that returns one finding or None. ``RULES`` lists them; ``findings_of`` asks
each. The figures they go by are in ``thresholds.py``, each with its origin; docs/findings.md is written from both.
"""

from redline.findings.finding import Finding, Level, Rule
from redline.findings.rules import RULES, findings_of

__all__ = ["RULES", "Finding", "Level", "Rule", "findings_of"]
