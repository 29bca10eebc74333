"""Conditions: how a user names them, and what a sample's noise depends on."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vittle import UserError
from vittle.shifts import CLEAN, IMAGE_SHIFTS, TEXT_SHIFTS, Condition, Shift, parse_conditions, vittle_preset

QUESTION = "<image>\nWhich animal is sitting on the wooden table?\nAnswer the question using a single word or phrase."


def names(*specs: str, languages: tuple[str, ...] = ()) -> list[str]:
    return [each.name for each in parse_conditions(specs, languages)]


def test_specs() -> None:
    assert names() == ["clean"]
    assert names("frost:3", "frost:2-3", "rd:7") == ["clean", "frost:3", "frost:2", "rd:7"]
    assert names("fog") == ["clean", *(f"fog:{severity}" for severity in range(1, 6))]
    assert names("keyboard:1+frost:2-3") == ["clean", "frost:2+keyboard:1", "frost:3+keyboard:1"]
    assert names("translation", languages=("German", "Greek")) == ["clean", "translation:German", "translation:Greek"]
    assert len(names("images")) == 1 + 5 * len(IMAGE_SHIFTS) and len(names("texts")) == 1 + 7 * len(TEXT_SHIFTS)
    assert len(IMAGE_SHIFTS) == 16 and len(TEXT_SHIFTS) == 9
    assert parse_conditions(names("vittle")) == parse_conditions(["vittle"])


def test_vittles_preset_is_9_9_9() -> None:
    for languages in ((), ("German", "Korean", "Hindi", "Greek")):
        conditions = vittle_preset(languages)
        groups = [each.group for each in conditions]
        assert [groups.count(group) for group in ("image", "text", "joint")] == [9, 9, 9]
        assert len(set(conditions)) == 27
        translated = [str(each.text) for each in conditions if each.text and each.text.kind == "translation"]
        assert translated == [f"translation:{language}" for language in languages[:3]] * 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("frosst:3", "'frosst' is no kind of shift; near it: frost"),
        ("qqq", "one of gaussian_noise, "),
        ("frost:6", "its severity must be in 1 to 5"),
        ("frost:0", "its severity must be in 1 to 5"),
        ("rd:8", "its severity must be in 1 to 7"),
        ("frost:4-2", "its severity must be in 1 to 5"),
        ("frost:x", "its severity must be in 1 to 5"),
        ("frost:1+fog:1", "must be of one image shift and one text shift"),
        ("rd:1+rs:1", "must be of one image shift and one text shift"),
        ("frost:1+rd:1+rs:1", "must be of one image shift and one text shift"),
        ("translation:German", "needs --translations"),
        ("", "is no kind of shift"),
    ],
)
def test_refuses(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_conditions([spec])
    assert message in str(caught.value) and repr(spec) in str(caught.value)


def test_noise_is_the_samples_own() -> None:
    condition = Condition(Shift("gaussian_noise", 3), Shift("keyboard", 7))
    image = Image.new("RGB", (16, 16), (128, 128, 128))

    def seen(id: str, seed: int) -> tuple[bytes, bytes, str]:
        one, other = condition.images([image, image], id, seed)
        return one.tobytes(), other.tobytes(), condition.question(QUESTION, id, seed)

    assert seen("a", 0) == seen("a", 0)
    assert seen("a", 0)[0] != seen("a", 0)[1]
    for other in (seen("b", 0), seen("a", 1)):
        assert all(one != another for one, another in zip(seen("a", 0), other, strict=True))
    question = seen("a", 0)[2]
    assert question.startswith("<image>\n") and question.endswith(QUESTION[QUESTION.index("\nAnswer") :])


def test_clean_is_untouched() -> None:
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert CLEAN.images([image], "a", 0)[0] is image and CLEAN.question(QUESTION, "a", 0) == QUESTION
    assert (CLEAN.name, CLEAN.group) == ("clean", "clean")


def test_a_translation_is_looked_up() -> None:
    condition = Condition(text=Shift("translation", "German"))
    assert condition.question(QUESTION, "7", 0, lambda id, language: f"{id} {language}") == "7 German"
    assert condition.file_name == "translation-German"
