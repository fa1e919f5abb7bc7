"""The methods' classes by name, for type checkers: written by ``python -m benchmarks.methods``."""

from sag_dit.guidance.apg import APG as APG
from sag_dit.guidance.auto import Autoguidance as Autoguidance
from sag_dit.guidance.cfg import CFG as CFG
from sag_dit.guidance.cfg_zero import CFGZero as CFGZero
from sag_dit.guidance.classifier import ClassifierGuidance as ClassifierGuidance
from sag_dit.guidance.fdg import FDG as FDG
from sag_dit.guidance.icg import ICG as ICG
from sag_dit.guidance.pag import PAG as PAG
from sag_dit.guidance.sag import SAG as SAG
from sag_dit.guidance.sag import BlurGuidance as BlurGuidance
from sag_dit.guidance.seg import SEG as SEG
from sag_dit.guidance.slg import SLG as SLG
from sag_dit.guidance.tpg import TPG as TPG
from sag_dit.guidance.tsg import TSG as TSG
