"""The study: settings x seeds -> measurements -> results -> table, page and curves.

:func:`compare` does all of it in one call. ``evaluate.py`` is the same for the command line.
"""

from sag_dit.study.comparison import Comparison as Comparison
from sag_dit.study.comparison import compare as compare
from sag_dit.study.measurement import Measurement as Measurement
from sag_dit.study.measurement import Setting as Setting
from sag_dit.study.results import Result as Result
