"""Distribution shifts: the same inputs, made harder in a measured way."""

from vittle.shifts.image import IMAGE_SHIFTS, SEVERITIES, image_shift

__all__ = ["IMAGE_SHIFTS", "SEVERITIES", "image_shift"]
