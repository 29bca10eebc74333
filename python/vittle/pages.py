"""Pages in one file that need no network: templates filled, images as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from vittle.files import save_text


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fills a template, escaping all that it does not call safe, and writes the page whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("vittle"), autoescape=True, undefined=StrictUndefined)
    save_text(path, environment.get_template(template).render(**content))


def data_uri(image: Image.Image) -> str:
    """The image within the page, as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
