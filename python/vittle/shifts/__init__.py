"""Distribution shifts: the same inputs, made harder in a measured way."""

from vittle.shifts.condition import CLEAN, Condition, Shift, parse_conditions, vittle_preset
from vittle.shifts.image import IMAGE_SHIFTS, SEVERITIES, image_shift
from vittle.shifts.text import SYNONYM_SHIFTS, TEXT_SEVERITIES, TEXT_SHIFTS, text_shift

__all__ = [
    "CLEAN",
    "IMAGE_SHIFTS",
    "SEVERITIES",
    "SYNONYM_SHIFTS",
    "TEXT_SEVERITIES",
    "TEXT_SHIFTS",
    "Condition",
    "Shift",
    "image_shift",
    "parse_conditions",
    "text_shift",
    "vittle_preset",
]
