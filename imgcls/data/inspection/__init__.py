"""The doctor's examinations: files, copies, labels, balance, the machine. Each gives a list of findings."""

from imgcls.data.inspection.duplicates import duplicate_findings
from imgcls.data.inspection.findings import NOTE, SERIOUS, SEVERITIES, WARNING, Finding, ranked
from imgcls.data.inspection.label_map import name_findings, spelling_findings, swap_findings
from imgcls.data.inspection.machine import machine_findings
from imgcls.data.inspection.pictures import (
    balance_findings,
    class_counts,
    colour_findings,
    kind_findings,
    mean_and_std,
    size_findings,
    unreadable_findings,
)
from imgcls.data.inspection.survey import Survey, survey

__all__ = [
    "NOTE",
    "SERIOUS",
    "SEVERITIES",
    "WARNING",
    "Finding",
    "Survey",
    "balance_findings",
    "class_counts",
    "colour_findings",
    "duplicate_findings",
    "kind_findings",
    "machine_findings",
    "mean_and_std",
    "name_findings",
    "ranked",
    "size_findings",
    "spelling_findings",
    "survey",
    "swap_findings",
    "unreadable_findings",
]
