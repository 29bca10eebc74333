"""Synthetic discriminative training: pairs of pictures that differ where the model does not look.

VPG-C (arXiv 2308.04152, section 2.2) asks which objects a model ignores, edits them, and trains the model to tell what
changed. Every part can be replaced: `make_pairs` takes them as callables, and a folder of pairs made by any other means
is read alike.
"""

from vittle.discriminative.attention import attention_of
from vittle.discriminative.gallery import write_gallery
from vittle.discriminative.pairs import KINDS, Kind, Pair, StoredPair, read_pairs, to_llava, write_pairs
from vittle.discriminative.pipeline import Attend, Describe, Edit, Edited, Object, Picture, make_edits, make_pairs
from vittle.discriminative.significance import significance

__all__ = [
    "KINDS",
    "Attend",
    "Describe",
    "Edit",
    "Edited",
    "Kind",
    "Object",
    "Pair",
    "Picture",
    "StoredPair",
    "attention_of",
    "make_edits",
    "make_pairs",
    "read_pairs",
    "significance",
    "to_llava",
    "write_gallery",
    "write_pairs",
]
