"""The order of an epoch: batches of one modality and of like lengths, in random order, as LLaVA trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH = 50
"""Batches that are sorted by length together: enough for little padding, few enough to stay random."""


class ModalityLengthSampler(Sampler[int]):
    """Every index once an epoch. Batches cut from it in order hold records with images, or without, of like lengths;
    what does not fill a batch comes last, or is filled up.

    Args:
        lengths: of each record, in any unit.
        image_counts: of each record.
        batch_size: of the global batch: of all ranks and accumulation steps together.
        seed: of the order; epochs differ.
        fill: whether batches that are not full are filled up with the modality's first records of the epoch. Ranks
            that share a model's weights need it: all of them run the vision tower, or none.
    """

    def __init__(
        self, lengths: Sequence[int], image_counts: Sequence[int], batch_size: int, seed: int, fill: bool = False
    ) -> None:
        self.lengths, self.image_counts, self.batch_size, self.seed = lengths, image_counts, batch_size, seed
        self.fill, self.epoch = fill, 0
        with_images = sum(count > 0 for count in image_counts)
        of_modality = (with_images, len(lengths) - with_images)
        self.count = sum(-(-n // batch_size) * batch_size for n in of_modality) if fill else len(lengths)

    def set_epoch(self, epoch: int) -> None:
        """The Trainer says which one is to come."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        has_images = torch.tensor(self.image_counts) > 0
        lengths = torch.tensor(self.lengths)
        whole: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for modality in (True, False):
            indices = (has_images == modality).nonzero().flatten()
            indices = indices[torch.randperm(len(indices), generator=generator)]
            if self.fill and len(indices):
                missing = -len(indices) % self.batch_size
                indices = torch.cat((indices, indices.repeat(missing // len(indices) + 1)[:missing]))
            for mega in indices.split(MEGABATCH * self.batch_size):
                batches = mega[lengths[mega].argsort(descending=True, stable=True)].split(self.batch_size)
                for batch in batches:
                    (whole if len(batch) == self.batch_size else rest).append(batch)
        for i in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[i].tolist()
        for batch in rest:
            yield from batch.tolist()
