"""The model that lmms-eval runs: what it asks and how; where lmms-eval is not installed, on a stand-in's base class."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from PIL import Image

from vittle.demo.scenes import write_dataset
from vittle.errors import UserError
from vittle.evaluate import Asking, ask, batches
from vittle.shifts import parse_conditions
from vittle.tasks import Sample

MODEL = Path(__file__).parents[2] / "python" / "vittle" / "demo" / "aligned"
HAS_LMMS = find_spec("lmms_eval") is not None
TASK, SPLIT = "digits", "test"
JOINT = "frost:3+keyboard:4"


class StandIn:
    """What `lmms_eval.api.model.lmms` gives to its subclasses."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank


class Manifest(NamedTuple):
    """The fields that are set of `lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str


@pytest.fixture(scope="module")
def lmms() -> Iterator[ModuleType]:
    """The module; the stand-ins are gone after it."""
    there = set(sys.modules)
    if not HAS_LMMS:
        for name in ("", ".api", ".api.model", ".models", ".models.registry_v2"):
            sys.modules[f"lmms_eval{name}"] = ModuleType(f"lmms_eval{name}")
        vars(sys.modules["lmms_eval.api.model"])["lmms"] = StandIn
        vars(sys.modules["lmms_eval.models.registry_v2"])["ModelManifest"] = Manifest
    yield import_module("vittle.lmms")
    if not HAS_LMMS:
        for name in set(sys.modules) - there:
            if name.startswith("lmms_eval") or name == "vittle.lmms":
                del sys.modules[name]


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Twelve questions on scenes, by their images' files."""
    folder = tmp_path_factory.mktemp("scenes")
    records = json.loads(write_dataset(folder, split="held_out", count=12, seed=0).read_text())
    return [
        {"image": str(folder / "images" / each["image"]), "question": each["conversations"][0]["value"][8:]}
        for each in records
    ]


@pytest.fixture(scope="module")
def make(lmms: ModuleType, docs: list[dict[str, Any]]) -> Callable[..., Any]:
    """A model that knows the questions as one task's and as another's."""
    if not MODEL.exists():
        pytest.skip("the demo's model is not there: make demo-checkpoint")

    def made(**arguments: Any) -> Any:
        model = lmms.Vittle(str(MODEL), device="cpu", **arguments)
        model.task_dict = {TASK: {SPLIT: docs}, "another": {SPLIT: docs}}
        return model

    return made


def show(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(doc["image"])]


def show_nothing(doc: dict[str, Any]) -> list[Image.Image]:
    return []


def arguments(docs: list[dict[str, Any]], number: int, **changes: Any) -> tuple[Any, ...]:
    """Of a request, as lmms-eval's tasks of the simple kind make them."""
    given = {
        "context": docs[number]["question"], "settings": {"max_new_tokens": 8, "until": ["\n\n"]}, "visuals": show,
        "doc": number, "task": TASK, "split": SPLIT,
    }  # fmt: skip
    return tuple((given | changes).values())


def test_manifest_names_the_class(lmms: ModuleType) -> None:
    assert lmms.MANIFEST.model_id == "vittle"
    module, _, name = lmms.MANIFEST.simple_class_path.rpartition(".")
    assert module == lmms.__name__ and getattr(lmms, name).is_simple


@pytest.mark.parametrize("spec", ["frost", "frost:9", "frosty:3", "images", "translation:German", "fog:2+frost:3", ""])
def test_shifts_must_be_one_condition(lmms: ModuleType, spec: str) -> None:
    with pytest.raises(UserError, match=r"^shift"):
        lmms.Vittle(str(MODEL), shifts=spec)


@pytest.mark.parametrize("size", ["auto", 0, "-1"])
def test_batch_size_must_be_a_number(lmms: ModuleType, size: int | str) -> None:
    with pytest.raises(UserError, match=r"^batch_size is"):
        lmms.Vittle(str(MODEL), batch_size=size)


@pytest.mark.parametrize("shifts", ["clean", JOINT])
def test_answers_are_those_of_vittle_evaluate(
    make: Callable[..., Any], docs: list[dict[str, Any]], shifts: str
) -> None:
    model = make(shifts=shifts, seed=5, batch_size=4)
    samples = [
        Sample(f"{TASK}\0{SPLIT}\0{i}", f"<image>\n{doc['question']}", (Path(doc["image"]),), "")
        for i, doc in enumerate(docs)
    ]
    asked = ask(model.model, model.processor, batches(samples, 4), parse_conditions([shifts])[-1], Asking(8, seed=5))
    expected = {answer.id: answer.text for answers in asked for answer in answers}
    found = model.generate_until([SimpleNamespace(args=arguments(docs, i)) for i in range(len(docs))])
    assert found == [expected[sample.id] for sample in samples]
    assert len(set(found)) > 1


def test_requests_of_all_kinds_together(make: Callable[..., Any], docs: list[dict[str, Any]]) -> None:
    model = make(batch_size=3)
    kinds: list[dict[str, Any]] = [
        {}, {"visuals": show_nothing}, {"settings": {"max_new_tokens": 2}}, {"visuals": lambda doc: None},
        {"settings": {"max_new_tokens": 8, "num_beams": 2}}, {"settings": {"max_new_tokens": 8, "until": "right"}},
    ]  # fmt: skip
    mixed = [arguments(docs, number, **kinds[number % len(kinds)]) for number in range(len(docs))]
    batches_of, answers = [], model._answers
    model._answers = lambda batch: batches_of.append(batch) or answers(batch)
    together = model.generate_until([SimpleNamespace(args=each) for each in mixed])
    assert max(map(len, batches_of)) > 1
    assert all(len({(bool(each.images), repr(each.settings)) for each in batch}) == 1 for batch in batches_of)
    alone = [model.generate_until([SimpleNamespace(args=each)])[0] for each in mixed]
    assert together == alone
    assert not any("right" in answer for answer in together[5::6])
    assert any("right" in answer for answer in together)


def test_noise_depends_on_seed_task_and_number_alone(make: Callable[..., Any], docs: list[dict[str, Any]]) -> None:
    model = make(shifts=JOINT, seed=1)

    def asked(seed: int = 1, **changes: Any) -> tuple[str, bytes]:
        model.seed = seed
        one = model._asked(0, *arguments(docs, 3, **changes))
        return one.prompt, one.images[0].tobytes()

    first = asked()
    assert asked() == first
    for other in (asked(seed=2), asked(task="another")):
        assert other[0] != first[0] and other[1] != first[1]


def test_images_stand_at_their_markers_or_else_first(make: Callable[..., Any], docs: list[dict[str, Any]]) -> None:
    model = make()

    def prompt(context: str, images: int) -> str:
        grey = [show(docs[0])[0].convert("L")]
        asked = model._asked(0, *arguments(docs, 0, context=context, visuals=lambda doc: grey * images))
        assert len(asked.images) == images and all(image.mode == "RGB" for image in asked.images)
        return " ".join(asked.prompt.split())

    assert prompt("Is <image> like <image>?", 2) == "USER: Is<image> like<image> ? ASSISTANT:"
    assert prompt("Is <image> like <image>?", 1) == "USER: <image> Is like ? ASSISTANT:"
    assert prompt("Which?", 2) == "USER: <image> <image> Which? ASSISTANT:"
    assert prompt("Which <image>?", 0) == "USER: Which ? ASSISTANT:"


def test_what_is_no_image_is_refused(make: Callable[..., Any], docs: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="task digits shows a str; must show images, neither video nor audio"):
        make()._asked(0, *arguments(docs, 0, visuals=lambda doc: ["clip.mp4"]))


def test_what_is_not_done_says_so(make: Callable[..., Any]) -> None:
    model = make()
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match=r"^the vittle model answers "):
            method([])


GREEDY = {"max_new_tokens": 1024, "do_sample": False}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, GREEDY),
        ({"temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}, GREEDY | {"num_beams": 1}),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0.9}, GREEDY),
        ({"temperature": 0.7, "do_sample": False, "max_new_tokens": 16}, GREEDY | {"max_new_tokens": 16}),
        ({"image_aspect_ratio": "original", "until": ["ASSISTANT:"]}, GREEDY),
        ({"temperature": 0.2, "top_p": 0.9}, GREEDY | {"do_sample": True, "temperature": 0.2, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 5}, GREEDY | {"do_sample": True, "top_k": 5}),
    ],
)
def test_settings_of_a_benchmark(lmms: ModuleType, asked: dict[str, Any], told: dict[str, Any]) -> None:
    assert lmms._generation(asked) == told


@pytest.mark.parametrize(
    ("until", "answer"),
    [
        (None, "A\n\nB Q: C"),
        ([], "A\n\nB Q: C"),
        (["\n\n"], "A\n\nB Q: C"),  # lmms-eval's own, where the benchmark names none
        (["\n\n", "Q:"], "A"),
        ("Q:", "A\n\nB "),
        (["C", "B"], "A\n\n"),
        (["</s>", ""], "A\n\nB Q: C"),
    ],
)
def test_answers_end_where_a_benchmark_stops(lmms: ModuleType, until: Any, answer: str) -> None:
    assert lmms._until("A\n\nB Q: C", {"until": until}) == answer


YAML = """\
task: vittle_digits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function show.show
doc_to_text: "{{{{question}}}}"
doc_to_target: question
generation_kwargs: {{max_new_tokens: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""

SHOW = """\
from PIL import Image

def show(doc):
    return [Image.open(doc["image"])]
"""


@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_of_lmms_eval(
    lmms: ModuleType, make: Callable[..., Any], docs: list[dict[str, Any]], tmp_path: Path
) -> None:
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from lmms_eval.tasks import TaskManager

    registry = ModelRegistryV2()
    registry.register_manifest(lmms.MANIFEST)
    model = registry.get_model_class("vittle").create_from_arg_string(
        f"pretrained={MODEL},shifts={JOINT},seed=5", {"batch_size": "4", "device": "cpu", "max_batch_size": None}
    )
    expected = make(shifts=JOINT, seed=5, batch_size=4)
    expected.task_dict["vittle_digits"] = {SPLIT: docs}
    wanted = expected.generate_until(
        [SimpleNamespace(args=arguments(docs, i, task="vittle_digits")) for i in range(len(docs))]
    )
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "digits.yaml").write_text(YAML.format(file=file))
    (tmp_path / "show.py").write_text(SHOW)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = evaluator.simple_evaluate(model, tasks=["vittle_digits"], task_manager=manager)
    samples = sorted(results["samples"]["vittle_digits"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == wanted
