"""What tuning changes besides accuracy: effective mutual information and the divergence of representations."""

from vittle.metrics.embeddings import embed_images, embed_texts, read_embeddings, write_embeddings
from vittle.metrics.emi import (
    CLUB,
    Embeddings,
    RepresentationMoments,
    effective_mutual_information,
    emid,
    emid_report,
    emid_upper_bound,
    load_club,
    representation_jsd,
    save_club,
)

__all__ = [
    "CLUB",
    "Embeddings",
    "RepresentationMoments",
    "effective_mutual_information",
    "embed_images",
    "embed_texts",
    "emid",
    "emid_report",
    "emid_upper_bound",
    "load_club",
    "read_embeddings",
    "representation_jsd",
    "save_club",
    "write_embeddings",
]
