"""Effective mutual information (arXiv 2502.00577): how far a model's answers serve their questions as references do.

    EMI(P) = I(X; model's answer) - I(X; reference)        EMID(P, Q) = EMI(P) - EMI(Q)

X is a question with its image; P are clean samples, Q are shifted ones. I is CLUB's estimate (arXiv 2006.12013), and
an upper bound of EMID comes from the Jensen-Shannon divergences of the four kinds of embeddings. All is in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vittle.errors import UserError
from vittle.metrics.club import CLUB, load_club, save_club
from vittle.metrics.embeddings import must_be_embeddings
from vittle.metrics.representation import RepresentationMoments, representation_jsd

__all__ = [
    "CLUB",
    "Embeddings",
    "RepresentationMoments",
    "effective_mutual_information",
    "emid",
    "emid_report",
    "emid_upper_bound",
    "load_club",
    "representation_jsd",
    "save_club",
]


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of n samples, a row each, L2-normalised as ``embed_images`` and ``embed_texts`` give them.

    Raises:
        UserError: a shape is not as it must be, n < 2, or a value is not finite.
    """

    visual: Tensor
    """Of the images, (n, d)."""
    text: Tensor
    """Of the questions, (n, d)."""
    response: Tensor
    """Of the model's answers, (n, e)."""
    reference: Tensor
    """Of the reference answers, (n, e)."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            must_be_embeddings(name, value, least=2)
        shapes = {name: tuple(value.shape) for name, value in vars(self).items()}
        for one, other in (("visual", "text"), ("response", "reference")):
            if shapes[one] != shapes[other]:
                raise UserError(f"{other} has shape {shapes[other]}; must be that of {one}, {shapes[one]}")
        if len(self.text) != len(self.response):
            raise UserError(f"response has {len(self.response)} rows; must have as many as text, {len(self.text)}")

    @property
    def query(self) -> Tensor:
        """What is asked: the mean of image and question, (n, d), not normalised again."""
        return (self.visual + self.text) / 2


def effective_mutual_information(club: CLUB, x: Tensor, y_model: Tensor, y_reference: Tensor) -> float:
    """I(x; y_model) - I(x; y_reference), in nats.

    Args:
        club: that estimates both.
        x: (n, x_dim), floating, as ``Embeddings.query``.
        y_model: (n, y_dim), of the model's answers.
        y_reference: (n, y_dim), of the reference answers.

    Raises:
        UserError: a shape is not as it must be, n < 2, or a value is not finite.
    """
    with torch.no_grad():
        return float(club(x, y_model) - club(x, y_reference))


def emid(club: CLUB, clean: Embeddings, shifted: Embeddings) -> float:
    """EMI(clean) - EMI(shifted), in nats: what a shift costs a model's answers.

    Raises:
        UserError: the embeddings' widths are not the CLUB's.
    """
    return _emi(club, clean) - _emi(club, shifted)


def _emi(club: CLUB, of: Embeddings) -> float:
    return effective_mutual_information(club, of.query, of.response, of.reference)


def emid_upper_bound(
    jsd_visual: float,
    jsd_text: float,
    jsd_response_clean: float,
    jsd_response_shifted: float,
    *,
    entropy_scale: float | None = None,
) -> float:
    """The bound of EMID: sqrt(Jv) + sqrt(Jt) + Jpy^(1/4) + Jqy^(1/4), or as theory scales it.

    Args:
        jsd_visual: of clean and shifted images, in nats.
        jsd_text: of clean and shifted questions.
        jsd_response_clean: of the model's answers and the references, on clean samples.
        jsd_response_shifted: the same on shifted samples.
        entropy_scale: H of the full bound H (sqrt(Jv) + sqrt(Jt)) + 4 (Jpy^(1/4) + Jqy^(1/4)). Without it the terms
            weigh alike, as in the paper's results: comparable among shifts, but no bound in nats.

    Raises:
        UserError: a divergence is not within [0, ln 2], or the scale is negative or not finite.
    """
    divergences = {
        "jsd_visual": jsd_visual,
        "jsd_text": jsd_text,
        "jsd_response_clean": jsd_response_clean,
        "jsd_response_shifted": jsd_response_shifted,
    }
    for name, value in divergences.items():
        if not 0 <= value <= math.log(2):
            raise UserError(f"{name} is {value}; must be within [0, ln 2]")
    if entropy_scale is not None and not 0 <= entropy_scale < math.inf:
        raise UserError(f"entropy_scale is {entropy_scale}; must be finite, at least 0")
    of_inputs = math.sqrt(jsd_visual) + math.sqrt(jsd_text)
    of_answers = jsd_response_clean**0.25 + jsd_response_shifted**0.25
    return of_inputs + of_answers if entropy_scale is None else entropy_scale * of_inputs + 4 * of_answers


def emid_report(
    club: CLUB, clean: Embeddings, shifted: Embeddings, *, entropy_scale: float | None = None
) -> dict[str, float]:
    """EMID of a clean and a shifted evaluation, and what it comes from.

    Args:
        club: that estimates the mutual information.
        clean: samples of P.
        shifted: samples of Q, of the same widths; there may be more or fewer.
        entropy_scale: as :func:`emid_upper_bound` takes it.

    Returns:
        ``emi_clean``, ``emi_shifted``, ``emid``, ``emid_upper_bound`` and the bound's arguments by their names.

    Raises:
        UserError: the embeddings' widths are not the CLUB's or not alike, or a row is zero.
    """
    emi = {"emi_clean": _emi(club, clean), "emi_shifted": _emi(club, shifted)}
    divergences = {
        "jsd_visual": representation_jsd(clean.visual, shifted.visual),
        "jsd_text": representation_jsd(clean.text, shifted.text),
        "jsd_response_clean": representation_jsd(clean.response, clean.reference),
        "jsd_response_shifted": representation_jsd(shifted.response, shifted.reference),
    }
    bound = emid_upper_bound(**divergences, entropy_scale=entropy_scale)
    return {**emi, "emid": emi["emi_clean"] - emi["emi_shifted"], "emid_upper_bound": bound, **divergences}
