"""A JSON list of any size, record by record; and the order of an epoch."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vittle.data import LlavaDataset, ModalityLengthSampler, index
from vittle.data.index import read_record, scan
from vittle.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    records=st.lists(JSON, min_size=1, max_size=8),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    mark=st.booleans(),
)
def test_every_record_is_found_where_it_is(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Any],
    chunk: int,
    ascii_only: bool,
    indent: int | None,
    mark: bool,
) -> None:
    path = tmp_path_factory.mktemp("index") / "list.json"
    text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(index, "CHUNK", chunk)
        found = list(scan(path))
        assert [each.value for each in found] == records
        assert [read_record(file, each.offset, each.size) for each in found] == records


@given(text=st.text(alphabet='[]{},:"01 \\ua', max_size=20), chunk=st.integers(1, 10))
def test_what_is_no_list_is_refused_as_json_does(
    tmp_path_factory: pytest.TempPathFactory, text: str, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("index") / "list.json"
    path.write_text(text, encoding="utf-8")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK", chunk)
        if isinstance(value, list) and value:
            assert [each.value for each in scan(path)] == value
        else:
            with pytest.raises(UserError, match=r"is not JSON|must hold"):
                list(scan(path))


def write(folder: Path, count: int, **changes: Any) -> Path:
    path = folder / "data.json"
    turns = [{"from": "human", "value": "which?"}, {"from": "gpt", "value": "this"}]
    path.write_text(json.dumps([{"id": i, "conversations": turns} | changes for i in range(count)]))
    return path


def test_workers_read_the_same_records(tmp_path: Path) -> None:
    data = LlavaDataset(write(tmp_path, 20), tmp_path)
    assert data[3]["id"] == 3  # the file is open in this process now
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert sorted(item["id"] for item in loader) == list(range(20))
    assert pickle.loads(pickle.dumps(data))[7]["id"] == 7
    with pytest.raises(IndexError):
        data[20]


def test_repeated_ids(tmp_path: Path) -> None:
    path = write(tmp_path, 3, id="x")
    with pytest.raises(UserError) as raised:
        LlavaDataset(path, tmp_path)
    message = f'{path}: record 1 (id "x"): record 0 has this id too; ids must differ, unless you allow repeated ids'
    assert str(raised.value) == message
    assert len(LlavaDataset(path, tmp_path, unique_ids=False)) == 3
    skipping = LlavaDataset(path, tmp_path, on_bad="skip")
    assert len(skipping) == 1 and skipping.bad == [message, message.replace("record 1", "record 2", 1)]


def test_a_file_without_a_good_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no good record; the first of 2 bad ones: .*`conversations` is \[\]"):
        LlavaDataset(write(tmp_path, 2, conversations=[]), tmp_path, on_bad="skip")


def test_a_broken_image_gives_way_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "<image> which?"}, {"from": "gpt", "value": "this"}]
    path = write(tmp_path, 3)
    records = json.loads(path.read_text())
    records[1] |= {"image": "broken.png", "conversations": turns}
    path.write_text(json.dumps(records))
    (tmp_path / "broken.png").write_text("no image")
    data = LlavaDataset(path, tmp_path, on_bad="skip")
    assert data[1]["id"] == 2 and data.broken == 1
    assert f"skipped: {path}: record 1 (id 1): image {tmp_path / 'broken.png'} cannot be" in capsys.readouterr().err
    assert sorted(item["id"] for item in DataLoader(data, batch_size=None, num_workers=2)) == [0, 2, 2]
    assert data.broken == 2  # a worker's count too


BIG = """
import json, resource, sys
from pathlib import Path
from vittle.data import LlavaDataset
folder = Path(sys.argv[1])
with (folder / "big.json").open("w") as file:
    file.write("[")
    for i in range(665_298):
        turns = [{"from": ("human", "gpt")[k % 2], "value": "word " * (5 + 7 * (i % 9))} for k in range(2 + i % 3 * 2)]
        file.write(("," if i else "") + json.dumps({"id": f"{i:012d}", "conversations": turns}))
    file.write("]")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = LlavaDataset(folder / "big.json", folder)
assert len(data) == 665_298 and data[665_297]["id"] == "000000665297" and data[0]["id"] == "000000000000"
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_a_file_of_mix665k_size_takes_little_memory(tmp_path: Path) -> None:
    """665,298 records: below 300 MiB above what the imports take."""
    result = subprocess.run([sys.executable, "-c", BIG, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "big.json").stat().st_size > 2e8
    assert float(result.stdout) < 300
    (tmp_path / "big.json").unlink()


def test_an_epoch_has_every_record_once_in_batches_of_a_kind() -> None:
    lengths, images = [(37 * i) % 101 for i in range(1000)], [int(i % 3 > 0) for i in range(1000)]
    sampler = ModalityLengthSampler(lengths, images, batch_size=8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(1000)) == list(range(len(sampler)))
    batches = [order[i : i + 8] for i in range(0, 1000, 8)]
    pure = [batch for batch in batches if len({images[i] for i in batch}) == 1]
    assert len(pure) >= len(batches) - 2
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in pure]
    assert sorted(spread)[len(spread) // 2] <= 3  # of 101
    firsts = [sum(lengths[i] for i in batch) / 8 for batch in pure]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
    assert order == list(ModalityLengthSampler(lengths, images, batch_size=8, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != order and sorted(sampler) == sorted(order)
    assert list(ModalityLengthSampler(lengths, images, batch_size=8, seed=2)) != order
