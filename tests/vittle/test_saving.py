"""A bottleneck on disk: what is written, what is refused, and the released code's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tiny import WIDTH, make_batch, tiny_llava

from vittle import (
    BottleneckConfig,
    UserError,
    attach_bottleneck,
    detach_bottleneck,
    from_released,
    load_bottleneck,
    save_bottleneck,
    to_released,
)


def test_save_and_load(tmp_path: Path) -> None:
    model, batch = tiny_llava(), make_batch()
    attach_bottleneck(model, BottleneckConfig(layer=2, prior="learnable", alpha=0.25, beta=0.3))
    model.bottleneck.set_alpha(0.125)
    save_bottleneck(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bottleneck.safetensors",
        "bottleneck_config.json",
    ]
    other = tiny_llava()
    loaded = load_bottleneck(other, tmp_path)
    assert loaded.alpha == 0.125 and json.loads((tmp_path / "bottleneck_config.json").read_text())["layer"] == 2
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_load_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model = tiny_llava()
    with pytest.raises(UserError, match=r"bottleneck_config.json does not exist"):
        load_bottleneck(model, tmp_path)
    attach_bottleneck(model)
    save_bottleneck(model, tmp_path)
    detach_bottleneck(model)
    whole = (tmp_path / "bottleneck.safetensors").read_bytes()
    (tmp_path / "bottleneck.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"bottleneck\.safetensors is damaged"):
        load_bottleneck(model, tmp_path)
    assert not hasattr(model, "bottleneck")


def rewrite(name: str, value: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "bottleneck_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def reshape(change: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / "bottleneck.safetensors"
        save_file(change(load_file(path)), path)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewrite("format", 2), "has format 2; this version reads format 1: upgrade vittle-kernels"),
        (rewrite("format", "x"), "has format 'x'; this version reads format 1: save_bottleneck writes it"),
        (rewrite("colour", "red"), "has an unknown setting 'colour'"),
        (rewrite("layer", 9), "layer is 9; must be in [1, 4]"),
        (
            rewrite("prior", "learnable"),
            "has no prior; must be (2, 64), by the model and bottleneck_config.json",
        ),
        (rewrite("format", True), "has format True"),
        (rewrite("layer", True), "layer is True; must be in [1, 4]"),
        (rewrite("alpha", "x"), "alpha is 'x'; must be in [0, 1]"),
        (rewrite("beta", None), "beta is None; must not be negative"),
        (reshape(lambda t: t | {"alpha": torch.tensor(7.0)}), "has alpha 7.0; must be in [0, 1]"),
        (reshape(lambda t: t | {"bias_in": t["bias_in"].long()}), "has bias_in of torch.int64; must be floating point"),
        (reshape(lambda t: t | {"weight_in": torch.tensor(1.0)}), "has weight_in of shape (); must be (2, 32, 32)"),
        (lambda folder: (folder / "bottleneck_config.json").write_text("{"), "bottleneck_config.json is damaged"),
        (lambda folder: (folder / "bottleneck_config.json").write_text("[1]"), "has format None"),
        (lambda folder: (folder / "bottleneck.safetensors").unlink(), "neither bottleneck.safetensors nor model.saf"),
        (
            reshape(lambda t: {n: x[..., :8].clone() if x.dim() else x for n, x in t.items()}),
            "has width 8; the model's hidden size is 32",
        ),
        (
            reshape(lambda t: {n: x[1:].clone() if x.dim() else x for n, x in t.items()}),
            "has heads for text only; the model needs vision and text",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Any, message: str, tmp_path: Path) -> None:
    model = tiny_llava()
    attach_bottleneck(model)
    save_bottleneck(model, tmp_path)
    detach_bottleneck(model)
    change(tmp_path)
    with pytest.raises(UserError) as raised:
        load_bottleneck(model, tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not hasattr(model, "bottleneck") and "forward" not in vars(model)


def test_a_text_model_refuses_a_bottleneck_for_vision(tmp_path: Path) -> None:
    model = tiny_llava()
    attach_bottleneck(model)
    save_bottleneck(model, tmp_path)
    llama = FAMILIES[-1].model()
    with pytest.raises(UserError, match="has heads for vision and text; the model needs text only"):
        load_bottleneck(llama, tmp_path)


def test_names_of_the_released_code_convert_both_ways() -> None:
    """A checkpoint as the released code builds its modules gives the same heads."""
    torch.manual_seed(0)
    released = {}
    for modality in "vt":
        head = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, 2 * WIDTH)
        )  # fmt: skip
        released |= {f"model.bottleneck_layer_{modality}.{n}": t for n, t in head.state_dict().items()}
        for name in ("mean", "logsigma_sq"):
            released[f"model.learnable_prior.{name}_{modality}"] = torch.randn(1, 1, WIDTH)
    others = {"model.embed_tokens.weight": torch.zeros(3)}
    state = from_released(released | others, prior="learnable")
    model = tiny_llava()
    attach_bottleneck(model, BottleneckConfig(prior="learnable")).load_state_dict(state)
    back = to_released(model.bottleneck.state_dict())
    assert back.keys() == released.keys() and all(torch.equal(back[name], released[name]) for name in back)

    x = torch.randn(5, WIDTH)
    vision = torch.tensor([True, False, True, False, False])
    bottleneck = model.bottleneck.eval()
    heads = {m: torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, 2 * WIDTH))
             for m in "vt"}  # fmt: skip
    for m, head in heads.items():
        prefix = f"model.bottleneck_layer_{m}."
        head.load_state_dict({n.removeprefix(prefix): t for n, t in released.items() if n.startswith(prefix)})
    mean = torch.where(vision[:, None], heads["v"](x), heads["t"](x))[:, :WIDTH]
    torch.testing.assert_close(bottleneck(x, vision).hidden_states, (x + mean) / 2)
    prior = torch.cat([released[f"model.learnable_prior.{n}_t"].flatten() for n in ("mean", "logsigma_sq")])
    assert torch.equal(bottleneck.prior[1], prior)

    fixed = from_released(released, prior="fixed")
    assert "prior" not in fixed and set(to_released(fixed)) < set(released)
    with pytest.raises(UserError, match=r"the checkpoint has no bottleneck_layer_v\.0\.weight"):
        from_released(others, prior="fixed")


def test_folders_that_are_none(tmp_path: Path) -> None:
    model = tiny_llava()
    attach_bottleneck(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, or below one; must be a folder"):
        save_bottleneck(model, tmp_path / "file" / "x")
    with pytest.raises(UserError, match="does not exist"):
        load_bottleneck(tiny_llava(), tmp_path / "file")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is damaged"):
        load_bottleneck(tiny_llava(), tmp_path / "shards")


def test_what_the_released_code_cannot_hold() -> None:
    llama = FAMILIES[-1].model()
    with pytest.raises(UserError, match="has two whole heads; this one is for text or inference only"):
        to_released(attach_bottleneck(llama).state_dict())
    with pytest.raises(UserError, match="prior is 'Learnable'; must be"):
        from_released({}, prior="Learnable")
