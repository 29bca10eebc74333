"""EMID over an evaluation: what is embedded, how often, and what of an earlier run still holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vittle import UserError
from vittle.demo import ALIGNED
from vittle.demo.scenes import write_dataset
from vittle.evaluation import EvaluateConfig, evaluate, open_evaluation
from vittle.metrics import CLUB, emid_report, load_club, run, save_club, write_embeddings
from vittle.metrics.embeddings import embed_images, embed_texts, read_embeddings
from vittle.metrics.emi import Embeddings
from vittle.models import load_model, load_processor
from vittle.shifts import parse_conditions

SHIFTS = ("contrast:3", "keyboard:4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation, two image encoders and a text encoder."""
    folder = tmp_path_factory.mktemp("emid")
    data = write_dataset(folder, split="held_out", count=12, seed=3)
    evaluate(EvaluateConfig(
        model=str(ALIGNED), task="exact", output=str(folder / "evaluation"), data=str(data),
        images=str(folder / "images"), shifts=SHIFTS, batch_size=12, max_new_tokens=4, workers=0,
    ))  # fmt: skip
    model, processor = load_model(str(ALIGNED)), load_processor(str(ALIGNED))
    for name in ("image", "other"):
        model.model.vision_tower.save_pretrained(folder / name)
        processor.image_processor.save_pretrained(folder / name)
        torch.nn.init.normal_(model.model.vision_tower.embeddings.patch_embedding.weight)
    model.get_decoder().save_pretrained(folder / "text")
    processor.tokenizer.save_pretrained(folder / "text")
    return folder


@pytest.fixture
def evaluation(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "evaluation", tmp_path / "evaluation"))


@pytest.fixture
def club(tmp_path: Path) -> str:
    torch.manual_seed(0)

    save_club(CLUB(128, 128, 8), tmp_path / "club.safetensors")
    return str(tmp_path / "club.safetensors")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The encoders that are loaded and what they embed."""
    seen: dict[str, list[Any]] = {"loads": [], "items": []}

    def count(load: Callable[..., Any]) -> Callable[..., Any]:
        def counting(encoder: str) -> Callable[..., Any]:
            seen["loads"].append(Path(encoder).name)
            embedder = load(encoder)

            def embed(batch: Any) -> Any:
                seen["items"] += [each.tobytes() if isinstance(each, Image.Image) else each for each in batch]
                return embedder(batch)

            return embed

        return counting

    monkeypatch.setattr(run, "image_embedder", count(run.image_embedder))
    monkeypatch.setattr(run, "text_embedder", count(run.text_embedder))
    return seen


def encoders(made: Path, image: str = "image") -> tuple[str, str]:
    return str(made / image), str(made / "text")


def test_is_the_report_of_embeddings_made_one_by_one(
    made: Path, evaluation: Path, club: str, counted: dict[str, list[Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    found = run.measure(evaluation, *encoders(made), club=club)
    told = capfd.readouterr()
    assert "embedding contrast:3" in told.err and "Loading" not in told.err + told.out
    assert max(map(len, told.err.replace("\r", "\n").splitlines())) <= 80
    assert sorted(counted["loads"]) == ["image", "text"]
    assert len(counted["items"]) == len(set(counted["items"]))
    opened = open_evaluation(evaluation)

    def embedded(name: str) -> Embeddings:
        (condition,) = (each for each in parse_conditions([name]) if each.name == name)
        answers = {each.id: each for each in opened.answers(condition)}
        images = [
            condition.images([Image.open(sample.images[0]).convert("RGB")], sample.id, 0)[0]
            for sample in opened.samples
        ]
        texts = {
            "text": [answers[sample.id].question for sample in opened.samples],
            "response": [answers[sample.id].text or "" for sample in opened.samples],
            "reference": [sample.reference for sample in opened.samples],
        }
        plain = {kind: [text.replace("<image>", "").strip() for text in own] for kind, own in texts.items()}
        return Embeddings(
            embed_images(images, made / "image"),
            **{kind: embed_texts(own, made / "text") for kind, own in plain.items()},
        )

    assert list(found) == list(SHIFTS) and found == json.loads((evaluation / run.RESULT).read_text())
    for name in SHIFTS:
        wanted = emid_report(load_club(club), embedded("clean"), embedded(name))
        assert found[name] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_what_is_there_is_not_embedded_again(
    made: Path, evaluation: Path, club: str, counted: dict[str, list[Any]]
) -> None:
    first = run.measure(evaluation, *encoders(made), club=club)
    counted["loads"].clear()
    assert run.measure(evaluation, *encoders(made), club=club) == first and counted["loads"] == []
    (evaluation / run.EMBEDDINGS / "keyboard-4.safetensors").unlink()
    counted["items"].clear()
    assert run.measure(evaluation, *encoders(made), club=club) == first
    assert counted["loads"] == ["text"] and all(isinstance(each, str) for each in counted["items"])


def test_another_encoder_is_another_measurement(made: Path, evaluation: Path, club: str) -> None:
    first = run.measure(evaluation, *encoders(made), club=club)
    other = run.measure(evaluation, *encoders(made, "other"), club=club)
    assert first != other
    assert run.measure(evaluation, *encoders(made), club=club) == first
    with pytest.raises(UserError, match=r"^encoder is '.*none'; must be a folder or Hub id of an image encoder: "):
        run.measure(evaluation, *encoders(made, "none"), club=club)


def test_files_that_do_not_tell_their_origin_are_made_again(made: Path, evaluation: Path, club: str) -> None:
    first = run.measure(evaluation, *encoders(made), club=club)
    for path in (evaluation / run.EMBEDDINGS).iterdir():
        write_embeddings({name: torch.randn_like(value) for name, value in read_embeddings(path).items()}, path)
    assert run.measure(evaluation, *encoders(made), club=club) == first


def test_other_answers_are_embedded_again(made: Path, evaluation: Path, club: str) -> None:
    first = run.measure(evaluation, *encoders(made), club=club)
    path = evaluation / "answers" / "keyboard-4.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["answer"] = "the left one, I think"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    second = run.measure(evaluation, *encoders(made), club=club)
    assert second["contrast:3"] == first["contrast:3"] and second["keyboard:4"] != first["keyboard:4"]
    del records[3]["answer"]
    records[3]["error"] = "cannot be decoded"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run.measure(evaluation, *encoders(made), club=club)["contrast:3"] != first["contrast:3"]
    assert len(read_embeddings(evaluation / run.EMBEDDINGS / "clean.safetensors")["text"]) == 11


def test_a_club_of_several_evaluations(
    made: Path, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row that is drawn is the query's with the model's or with the reference answer."""
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fit_drawn(self: CLUB, draw: Callable[..., Any], count: int, **settings: Any) -> CLUB:
        drawn.append(draw(torch.arange(count)))
        return self

    monkeypatch.setattr(CLUB, "fit_drawn", fit_drawn)
    run.train_club([evaluation, made / "evaluation"], *encoders(made), tmp_path / "club.safetensors")
    files = [
        Embeddings(**read_embeddings(folder / run.EMBEDDINGS / f"{name}.safetensors"))
        for folder in (evaluation, made / "evaluation")
        for name in ("clean", "contrast-3", "keyboard-4")
    ]
    ((x, y),) = drawn
    assert torch.equal(x, torch.cat([each.query for each in files for _ in range(2)]))
    assert torch.equal(y, torch.cat([answers for each in files for answers in (each.response, each.reference)]))


def test_a_club_is_trained_where_none_is_given(made: Path, evaluation: Path, tmp_path: Path) -> None:
    run.train_club(evaluation, *encoders(made), tmp_path / "club.safetensors", seed=3)
    given = run.measure(evaluation, *encoders(made), club=str(tmp_path / "club.safetensors"))
    assert run.measure(evaluation, *encoders(made), seed=3) == given
