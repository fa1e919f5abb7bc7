"""Searches: an image is drawn several times from noises of its own, and a verifier chooses one.

Each particle of an image has random streams of its own, so that what is chosen depends on the
image's seed and index alone: not on its neighbours, the number of ranks, or interruptions.
"""

from sag_dit.search.best_of import BestOf as BestOf
from sag_dit.search.fk import FKSteering as FKSteering
from sag_dit.search.verifier import CLASSIFIER as CLASSIFIER
from sag_dit.search.verifier import ClassVerifier as ClassVerifier
from sag_dit.search.verifier import Judge as Judge
from sag_dit.search.verifier import Verifier as Verifier
