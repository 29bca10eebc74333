"""The data path: LLaVA's JSON, a chat template's spans, and the batches that a model trains on."""

from vittle.data.collate import CaptionCollator, Collator
from vittle.data.llava import LlavaDataset, Record, parse_record
from vittle.data.sampler import ModalityLengthSampler
from vittle.data.template import ChatTemplate

__all__ = [
    "CaptionCollator",
    "ChatTemplate",
    "Collator",
    "LlavaDataset",
    "ModalityLengthSampler",
    "Record",
    "parse_record",
]
