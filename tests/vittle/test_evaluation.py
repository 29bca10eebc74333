"""`vittle evaluate` on the demo's own LLaVA: resuming, broken images, another model's folder, the judge."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from chat_server import serving
from peft import LoraConfig, get_peft_model
from PIL import Image
from processes import ENVIRONMENT

import vittle
from vittle import UserError
from vittle.cli import main
from vittle.demo import ALIGNED
from vittle.demo.scenes import write_dataset
from vittle.evaluate import ask, batches
from vittle.evaluation import EvaluateConfig, evaluate, open_evaluation
from vittle.locks import alone_in
from vittle.models import fingerprint, load_model, load_processor, load_tuned
from vittle.tasks.exact import Exact

SHIFTS = ("contrast:3", "keyboard:4", "frost:2+rd:3")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose even ones have the model's own clean answer for a reference: half are right."""
    folder = tmp_path_factory.mktemp("scenes")
    data = write_dataset(folder, split="held_out", count=24, seed=3)
    records = json.loads(data.read_text())
    task = Exact(data, folder / "images")
    model, processor = load_tuned(str(ALIGNED)), load_processor(str(ALIGNED))
    answers = {each.id: each.text for batch in ask(model, processor, batches(task.samples, 10)) for each in batch}
    for index, record in enumerate(records):
        record["conversations"][1]["value"] = "none" if index % 2 else answers[record["id"]]
        record["kind"] = "odd" if index % 2 else "even"
    data.write_text(json.dumps(records))
    return data


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(
        model=str(ALIGNED), task="exact", output=str(tmp_path / "run"), data=str(scenes),
        images=str(scenes.parent / "images"), shifts=SHIFTS, batch_size=10, max_new_tokens=128, workers=0,
    )  # fmt: skip


def contents(folder: str | Path) -> dict[str, bytes]:
    files = sorted(Path(folder).rglob("*.jsonl"))
    return {path.name: path.read_bytes() for path in files}


class TestRun:
    def test_answers_summary_and_shifts_added_later(self, config: EvaluateConfig) -> None:
        summary = evaluate(replace(config, shifts=SHIFTS[:1]))
        assert list(summary["conditions"]) == ["clean", "contrast:3"]
        before = contents(config.output)
        summary = evaluate(config)
        assert list(summary["conditions"]) == ["clean", *SHIFTS]
        assert {name: contents(config.output)[name] for name in before} == before
        clean = summary["conditions"]["clean"]
        assert clean["answered"] == 24 and clean["groups"] == {"even": {"accuracy": 100}, "odd": {"accuracy": 0}}
        assert clean["metrics"]["accuracy"] == 50 > summary["conditions"]["contrast:3"]["metrics"]["accuracy"]
        records = [json.loads(line) for line in contents(config.output)["keyboard-4.jsonl"].splitlines()]
        assert sorted(record["id"] for record in records) == [f"questions-{i:05}" for i in range(24)]
        assert all(record["question"].startswith("<image>\n") for record in records)
        right = [record["answer"] == record["reference"] for record in records]
        accuracy = summary["conditions"]["keyboard:4"]["metrics"]["accuracy"]
        assert accuracy == pytest.approx(100 * sum(right) / 24) == summary["means"]["text"]
        assert json.loads((Path(config.output) / "summary.json").read_text()) == summary

    @pytest.mark.slow
    def test_neither_workers_nor_the_other_samples_matter(self, config: EvaluateConfig, tmp_path: Path) -> None:
        evaluate(config)
        evaluate(replace(config, output=str(tmp_path / "other"), workers=2))
        assert contents(config.output) == contents(tmp_path / "other")
        evaluate(replace(config, output=str(tmp_path / "few"), limit=5))
        questions = {
            record["id"]: record["question"]
            for record in map(json.loads, contents(config.output)["keyboard-4.jsonl"].splitlines())
        }
        few = [json.loads(line) for line in contents(tmp_path / "few")["keyboard-4.jsonl"].splitlines()]
        assert len(few) == 5 and all(questions[record["id"]] == record["question"] for record in few)

    def test_every_cut_leads_to_the_same_answers(self, config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        config = replace(config, shifts=())
        evaluate(config)
        path, whole = Path(config.output) / "answers" / "clean.jsonl", contents(config.output)
        asked: list[int] = []
        import vittle.evaluation as module

        original = module.ask

        def counted(model: Any, processor: Any, batches: Any, *rest: Any) -> Any:
            asked.append(sum(map(len, batches)))
            return original(model, processor, batches, *rest)

        monkeypatch.setattr(module, "ask", counted)
        text = whole["clean.jsonl"]
        ends = [match.end() for match in re.finditer(b"\n", text)]
        for size, left in ((0, 24), (7, 24), (ends[8] + 3, 24), (ends[9], 14), (ends[9] + 5, 14), (ends[18], 14)):
            path.write_bytes(text[:size])
            evaluate(config)
            assert contents(config.output) == whole and asked[-1] == left
        evaluate(config)
        assert len(asked) == 6  # a whole folder needs no model

    @pytest.mark.slow
    def test_killed_at_any_moment(self, config: EvaluateConfig, tmp_path: Path) -> None:
        evaluate(config)
        broken_off = tmp_path / "broken off"
        command = [sys.executable, "-m", "vittle", "evaluate", "--model", config.model, "--task", "exact",
                   "--data", str(config.data), "--images", str(config.images), "--output", str(broken_off),
                   "--batch-size", "10", "--max-new-tokens", "128", "--workers", "0", "--shifts", *SHIFTS]  # fmt: skip
        for lines in (1, 30, 60):
            process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            deadline = time.monotonic() + 120
            while sum(text.count(b"\n") for text in contents(broken_off).values()) < lines and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert contents(broken_off) == contents(config.output)
        assert "accuracy" in done.stdout and max(map(len, done.stdout.splitlines()[:-1])) <= 80
        page = (broken_off / "report.html").read_text()
        assert 'src="data:image' in page and "http" not in re.sub(r'"http://www.w3.org[^"]*"', "", page)


class TestModels:
    def test_a_hub_id_brings_its_bottleneck(
        self, config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the Hub's cache has it, without a network."""
        model = with_bottleneck()
        model.bottleneck.bias_out.data.normal_(std=3)
        cache = tmp_path / "models--me--tuned"
        snapshot = cache / "snapshots" / "0123456789012345678901234567890123456789"
        shutil.copytree(ALIGNED, snapshot)
        vittle.save_bottleneck(model, snapshot)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(snapshot.name)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        batch = load_processor(str(ALIGNED))(text=["a b"], return_tensors="pt")
        assert (load_tuned("me/tuned")(**batch).logits == load_tuned(str(snapshot))(**batch).logits).all()
        assert fingerprint("me/tuned") == fingerprint(str(snapshot)) != fingerprint(str(ALIGNED))
        with pytest.raises(UserError, match="model is 'me/other'; must be a folder or Hub id"):
            load_tuned("me/other")

    def test_adapters_and_bottleneck(self, config: EvaluateConfig, tmp_path: Path) -> None:
        model = load_model(str(ALIGNED))
        vittle.attach_bottleneck(model)
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
        )
        adapted.base_model.model.bottleneck.bias_out.data.normal_(std=3)
        adapted.eval().save_pretrained(tmp_path / "lora")
        load_processor(str(ALIGNED)).save_pretrained(tmp_path / "lora")
        saved = tmp_path / "lora" / "adapter_config.json"
        saved.write_text(
            saved.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{ALIGNED}"')
        )
        loaded = load_tuned(str(tmp_path / "lora"))
        batch = load_processor(str(ALIGNED))(text=["a b"], return_tensors="pt")
        assert (loaded(**batch).logits == adapted(**batch).logits).all()
        assert (loaded(**batch).logits != load_tuned(str(ALIGNED))(**batch).logits).any()
        evaluate(replace(config, model=str(tmp_path / "lora"), shifts=()))
        prints = fingerprint(str(ALIGNED)), fingerprint(str(tmp_path / "lora"))
        (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
        assert len({*prints, fingerprint(str(tmp_path / "lora"))}) == 3
        with pytest.raises(UserError, match="and no adapter_model"):
            load_tuned(str(tmp_path / "lora"))

    def test_layer_jsd_is_zero_where_nothing_moves(self, config: EvaluateConfig) -> None:
        found = evaluate(replace(config, shifts=("contrast:3", "keyboard:7"), layer_jsd=True))["layer_jsd"]
        layers = load_model(str(ALIGNED)).config.text_config.num_hidden_layers
        assert all(len(values) == layers for each in found.values() for values in each.values())
        assert min(found["contrast:3"]["vision"]) > 1e-3 and min(found["contrast:3"]["text"]) > 1e-4
        assert (
            max(found["keyboard:7"]["vision"]) < 1e-6 and min(found["keyboard:7"]["text"]) > 1e-3
        )  # images come first


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 1}, "its seed was 0, now it is 1"),
            ({"batch_size": 9}, "its batch_size was 10, now it is 9"),
            ({"limit": 3}, "its limit was 2, now it is 3"),
            ({"workers": -1}, "workers is -1; must be an integer of at least 0"),
            ({"limit": 1, "layer_jsd": True}, "limit is 1; must be at least 2 with layer_jsd"),
            ({"shifts": ("sr:3",)}, "synonyms need NLTK and WordNet"),
            ({"shifts": ("foggy:1",)}, "near it: fog"),
            ({"batch_size": 0}, "batch_size is 0; must be an integer of at least 1"),
            (
                {"model": "/"},
                "model is '/'; must be a folder or Hub id of a vision-language model: it has no config.json",
            ),
        ],
    )
    def test_another_configuration(self, config: EvaluateConfig, change: dict[str, Any], message: str) -> None:
        small = replace(config, shifts=(), limit=2)
        evaluate(small)
        before = contents(config.output)
        with pytest.raises(UserError) as caught:
            evaluate(replace(small, **change))
        assert message in str(caught.value) and contents(config.output) == before
        assert list(evaluate(small)["conditions"]) == ["clean"]  # what failed is not asked for again

    def test_other_images_of_the_same_names(self, config: EvaluateConfig, tmp_path: Path) -> None:
        small = replace(config, shifts=(), limit=2)
        evaluate(small)
        shutil.copytree(str(config.images), tmp_path / "images")
        evaluate(replace(small, images=str(tmp_path / "images")))
        for path in (tmp_path / "images").iterdir():
            Image.new("RGB", (64, 64)).save(path)
        with pytest.raises(UserError, match=r"its data, .*, has changed since"):
            evaluate(replace(small, images=str(tmp_path / "images")))

    def test_another_chat_template(self, config: EvaluateConfig, tmp_path: Path) -> None:
        shutil.copytree(ALIGNED, tmp_path / "model")
        small = replace(config, model=str(tmp_path / "model"), shifts=(), limit=2)
        evaluate(small)
        template = tmp_path / "model" / "chat_template.jinja"
        template.write_text(template.read_text() + "!")
        with pytest.raises(UserError, match=r"its model, .*, has changed since"):
            evaluate(small)

    @pytest.mark.parametrize(
        ("file", "line", "message"),
        [
            ("answers/clean.jsonl", {"answer": "3"}, "must have `question`, and `answer` or `error`, all texts"),
            ("answers/clean.jsonl", {"question": "?", "answer": 7}, "and `answer` or `error`, all texts"),
            ("evaluation.json", {}, "evaluation.json has task null; vittle evaluate of this version writes it"),
        ],
    )
    def test_damaged_files(self, config: EvaluateConfig, file: str, line: dict[str, Any], message: str) -> None:
        small = replace(config, shifts=(), limit=2)
        evaluate(small)
        path = Path(config.output) / file
        first = json.loads(contents(config.output)["clean.jsonl"].splitlines()[0])
        path.write_text(json.dumps({"id": first["id"]} | line if line else {}) + "\n")
        with pytest.raises(UserError) as caught:
            evaluate(small)
        assert message in str(caught.value)

    def test_another_process_writes_there(self, config: EvaluateConfig) -> None:
        small = replace(config, shifts=(), limit=2)
        evaluate(small)
        with alone_in(Path(config.output)), pytest.raises(UserError, match=r"another process is writing .*run; let it"):
            evaluate(small)
        evaluate(small)

    def test_below_a_file(self, config: EvaluateConfig, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"output .* cannot be written: Not a directory"):
            evaluate(replace(config, task="digits", data=None, images=None, output=str(tmp_path / "file" / "run")))

    def test_a_model_that_has_changed(self, config: EvaluateConfig, tmp_path: Path) -> None:
        shutil.copytree(ALIGNED, tmp_path / "model")
        small = replace(config, model=str(tmp_path / "model"), shifts=(), limit=2)
        evaluate(small)
        vittle.save_bottleneck(with_bottleneck(), tmp_path / "model")
        with pytest.raises(UserError, match=r"its model, .*, has changed since"):
            evaluate(small)

    def test_answers_of_another_task(self, config: EvaluateConfig) -> None:
        small = replace(config, shifts=(), limit=2)
        evaluate(small)
        path = Path(config.output) / "answers" / "clean.jsonl"
        path.write_text(path.read_text().replace("questions-", "other-"))
        with pytest.raises(UserError, match=r'clean.jsonl, line 1 answers "other-.*; the task has "questions-'):
            evaluate(small)

    def test_a_folder_of_something_else(self, config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
        Path(config.output).mkdir()
        (Path(config.output) / "thesis.tex").write_text("precious")
        arguments = ["evaluate", "--model", config.model, "--task", "digits", "--output", config.output]
        assert main(arguments) == 2
        assert "is not empty and holds no evaluation" in capsys.readouterr().err
        assert [path.name for path in Path(config.output).iterdir()] == ["thesis.tex"]


def with_bottleneck() -> Any:
    model = load_model(str(ALIGNED))
    vittle.attach_bottleneck(model)
    return model


def test_a_broken_image_is_named_and_the_rest_go_on(config: EvaluateConfig, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes.parent, tmp_path / "data")
    broken = tmp_path / "data" / "images" / "questions-00003.png"
    broken.write_bytes(broken.read_bytes()[:100])
    config = replace(config, data=str(tmp_path / "data" / "questions.json"), images=str(broken.parent))
    summary = evaluate(config)
    assert list(summary["broken"]) == ["questions-00003"] and str(broken) in summary["broken"]["questions-00003"]
    assert all(each["answered"] == 23 for each in summary["conditions"].values())
    before = contents(config.output)
    evaluate(config)
    assert contents(config.output) == before


class TestTranslations:
    def translated(self, path: Path, scenes: Path, change: Callable[[str], str] = str) -> Path:
        records = [
            {"id": record["id"], "language": "German", "text": change("<image>\nWie viele?")}
            for record in json.loads(scenes.read_text())
        ]
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return path

    def test_stand_in_for_the_questions(self, config: EvaluateConfig, scenes: Path, tmp_path: Path) -> None:
        file = self.translated(tmp_path / "de.jsonl", scenes)
        evaluate(replace(config, shifts=("translation:German",), translations=str(file)))
        records = contents(config.output)["translation-German.jsonl"].splitlines()
        assert {json.loads(line)["question"] for line in records} == {"<image>\nWie viele?"}

    def test_may_be_added_and_must_stay(self, config: EvaluateConfig, scenes: Path, tmp_path: Path) -> None:
        evaluate(replace(config, shifts=()))
        file = self.translated(tmp_path / "de.jsonl", scenes)
        german = replace(config, shifts=("translation:German",), translations=str(file))
        evaluate(german)
        file.write_text(file.read_text() + file.read_text().replace("German", "Greek"))
        assert list(evaluate(replace(german, shifts=("translation",)))["conditions"]) == [
            "clean", "translation:German", "translation:Greek",
        ]  # fmt: skip
        evaluate(replace(config, shifts=()))  # needs no file
        file.write_text(file.read_text().replace("Wie viele?", "Was?"))
        with pytest.raises(UserError, match="holds answers to another German translation"):
            evaluate(replace(german, shifts=("translation:German", "contrast:3")))

    @pytest.mark.parametrize("language", ["../../../out", "a/b", "A+B", "a:b", "..", ""])
    def test_languages_are_names(self, config: EvaluateConfig, scenes: Path, tmp_path: Path, language: str) -> None:
        file = self.translated(tmp_path / "de.jsonl", scenes)
        file.write_text(file.read_text().replace("German", language))
        with pytest.raises(UserError, match="language"):
            evaluate(replace(config, shifts=("translation",), translations=str(file)))
        assert not (Path(config.output) / "evaluation.json").exists()

    def test_must_keep_the_markers(self, config: EvaluateConfig, scenes: Path, tmp_path: Path) -> None:
        file = self.translated(tmp_path / "de.jsonl", scenes, lambda text: text.removeprefix("<image>\n"))
        with pytest.raises(
            UserError, match=r'German text of id "questions-\d+" has 0 <image> marker\(s\); must have 1'
        ):
            evaluate(replace(config, shifts=("translation",), translations=str(file)))

    def test_made_by_an_endpoint(self, scenes: Path, tmp_path: Path) -> None:
        with serving(lambda message, times: f"auf Deutsch: {message}") as server:
            images = str(scenes.parent / "images")
            arguments = ["translate", "--task", "exact", "--data", str(scenes), "--images", images,
                         "--languages", "German", "Greek", "--url", server.url, "--translator", "m",
                         "--output", str(tmp_path / "t.jsonl")]  # fmt: skip
            assert main(arguments) == 0
            count = len(server.requests)
            assert main(arguments) == 0 and len(server.requests) == count == 48
        records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
        assert len(records) == 48 and all(r["text"].startswith("<image>\nauf Deutsch: ") for r in records)


class TestJudged:
    @pytest.fixture
    def bench(self, tmp_path: Path, scenes: Path) -> EvaluateConfig:
        from test_tasks import lines

        folder = tmp_path / "bench"
        asked = [
            {"question_id": i, "image": f"questions-{i:05}.png", "text": "What?", "category": "conv"} for i in range(6)
        ]
        lines(folder / "questions.jsonl", asked)
        lines(folder / "context.jsonl", [{"image": each["image"], "caption": "Digits."} for each in asked])
        lines(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": "Some digits."} for i in range(6)])
        return EvaluateConfig(
            model=str(ALIGNED), task="llava-bench", output=str(tmp_path / "judged"), data=str(folder),
            images=str(scenes.parent / "images"), max_new_tokens=4, workers=0, judge_model="m",
        )  # fmt: skip

    def test_goes_on_after_the_endpoint_failed(self, bench: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vittle.endpoint.AT_ONCE", 1)
        replies = iter(["8 4"] * 5)
        failing = serving(lambda message, times: next(replies, 401))
        with failing as server, pytest.raises(UserError, match="answered 401"):
            evaluate(replace(bench, judge_url=server.url))
        assert len(contents(bench.output)["clean.jsonl"].splitlines()) == 2
        with serving(lambda message, times: "8 4") as server:
            summary = evaluate(replace(bench, judge_url=server.url))
            assert len(server.requests) == 8
        metrics = summary["conditions"]["clean"]["metrics"]
        assert metrics == {"relative_score": 100, "model_score": 6, "reference_score": 6, "judged": 100}

    def test_a_question_that_is_turned_down_counts_as_not_judged(self, bench: EvaluateConfig) -> None:
        questions = Path(str(bench.data)) / "questions.jsonl"
        questions.write_text(questions.read_text().replace("What?", "Bad?", 1))
        config = replace(bench, shifts=("swap:7",))
        with serving(lambda message, times: 400 if "Bad?" in message else "8 4") as server:
            summary = evaluate(replace(config, judge_url=server.url))
            asked = len(server.requests)
            assert evaluate(replace(config, judge_url=server.url)) == summary and len(server.requests) == asked == 22
            assert all(
                "[Question]\nWhat?" in each["messages"][-1]["content"] or "Bad?" in str(each)
                for each in server.requests
            )  # not as it is shifted
        clean = summary["conditions"]["clean"]
        assert clean["metrics"]["judged"] == pytest.approx(500 / 6) and summary["judge_failures"]["clean"] == {
            "answers": 1,
            "replies": 1,
        }

    def test_needs_a_judge(self, bench: EvaluateConfig) -> None:
        with pytest.raises(UserError, match="task llava-bench needs a judge: --judge-url and --judge-model"):
            evaluate(bench)


def test_an_evaluation_is_opened_with_its_task(config: EvaluateConfig) -> None:
    evaluate(replace(config, limit=4, shifts=()))
    opened = open_evaluation(config.output)
    assert [sample.id for sample in opened.samples] == [each.id for each in opened.answers(opened.conditions[0])]
    with pytest.raises(UserError, match="holds no evaluation; vittle evaluate writes"):
        open_evaluation(Path(config.output) / "answers")
