"""A data set of samples that differ in length, images and labels, and its collator."""

from __future__ import annotations

import torch
from tiny import IMAGE_TOKEN, make_batch
from torch import Tensor


class Samples(torch.utils.data.Dataset):
    """Eight of them, padded as they come."""

    def __init__(self) -> None:
        self.batch = make_batch((14, 17, 11, 17, 12, 16, 15, 9), (1, 2, 0, 1, 2, 0, 1, 1))
        images = (self.batch["input_ids"] == IMAGE_TOKEN).sum(1) // 4
        self.images = self.batch.pop("pixel_values").split(images.tolist())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: value[i] for name, value in self.batch.items()} | {"images": self.images[i]}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of them."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0].keys() - {"images"}}
    images = torch.cat([item["images"] for item in items])
    return batch | ({"pixel_values": images} if len(images) else {})
