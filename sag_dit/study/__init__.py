"""The study: settings x seeds -> measurements -> results -> table, page and curves.

:func:`compare` does all of it in one call. ``evaluate.py`` is the same for the command line.
:func:`field_study` compares all guidance methods on several trainings, and :func:`findings` reads
what came of it.
"""

from sag_dit.study.comparison import Comparison as Comparison
from sag_dit.study.comparison import compare as compare
from sag_dit.study.effective import Effect as Effect
from sag_dit.study.effective import effect as effect
from sag_dit.study.field import Deadline as Deadline
from sag_dit.study.field import Family as Family
from sag_dit.study.field import Rules as Rules
from sag_dit.study.field import Subject as Subject
from sag_dit.study.field import field_study as field_study
from sag_dit.study.field import read_rows as read_rows
from sag_dit.study.findings import Findings as Findings
from sag_dit.study.findings import findings as findings
from sag_dit.study.measurement import Measurement as Measurement
from sag_dit.study.measurement import Setting as Setting
from sag_dit.study.pareto import Front as Front
from sag_dit.study.results import Result as Result
from sag_dit.study.setup import Ratio as Ratio
from sag_dit.study.variance import Components as Components
from sag_dit.study.variance import Difference as Difference
from sag_dit.study.variance import components as components
from sag_dit.study.variance import difference as difference
