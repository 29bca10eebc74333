"""EMI against its definition, against Gaussians whose mutual information is known, and within its memory."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from processes import ENVIRONMENT
from torch import Tensor

from vittle import UserError
from vittle.demo import ALIGNED
from vittle.demo.scenes import write_dataset
from vittle.evaluate import Asking, batches
from vittle.metrics import (
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
from vittle.metrics.layers import LayerJSD, layer_states
from vittle.models import load_processor, load_tuned
from vittle.shifts import CLEAN
from vittle.tasks.exact import Exact


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """On one thread, which is fastest for networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_pairs(club: CLUB, x: Tensor, y: Tensor) -> Tensor:
    """The estimate with every pair (i, j) written out."""
    mu, logvar = club.p_mu(x), club.p_logvar(x)
    own = -((mu - y) ** 2) / (2 * logvar.exp())
    others = torch.stack([-((mu[i] - y) ** 2).mean(0) / (2 * logvar[i].exp()) for i in range(len(x))])
    return (own - others).sum(1).mean()


class TestClub:
    @pytest.mark.parametrize("count", [2, 40, 1024, 1500])
    def test_is_the_mean_over_all_pairs(self, count: int) -> None:
        club, x, y = CLUB(5, 3, 16).double(), rows(count, 5), rows(count, 3, seed=1)
        estimate, wanted = club(x, y), by_pairs(club, x, y)
        assert float(estimate.detach()) == pytest.approx(float(wanted.detach()), rel=1e-11)
        gradients = [torch.autograd.grad(value, list(club.parameters())) for value in (estimate, wanted)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)

    def test_keeps_its_digits_far_from_the_origin(self) -> None:
        club, x, y = CLUB(5, 3, 16), rows(200, 5).float(), rows(200, 3, seed=1).float()
        with torch.no_grad():
            near = float(club(x, y))
            club.p_mu[2].bias += 4096
            assert float(club(x, y + 4096)) == pytest.approx(near, abs=1e-3)

    def test_loss_is_the_released_one(self) -> None:
        club, x, y = CLUB(5, 3, 16), rows(20, 5).float(), rows(20, 3, seed=1).float()
        mu, logvar = club.p_mu(x), club.p_logvar(x)
        wanted = -(-((mu - y) ** 2) / logvar.exp() - logvar).sum(dim=1).mean(dim=0)
        torch.testing.assert_close(club.loss(x, y), wanted)

    @pytest.mark.parametrize("correlation", [0.4, 0.7])
    def test_of_correlated_gaussians(self, correlation: float) -> None:
        """With the true conditional CLUB is d r^2 / (1 - r^2), above the mutual information -d/2 ln(1 - r^2)."""
        width, square = 4, correlation**2
        x = rows(6000, width).float()
        y = correlation * x + math.sqrt(1 - square) * rows(6000, width, seed=1).float()
        club = CLUB(width, width, 64).fit(x[:4000], y[:4000], steps=300, batch_size=512, learning_rate=5e-3)
        with torch.no_grad():
            estimate, shuffled = float(club(x[4000:], y[4000:])), float(club(x[4000:], y[4000:].roll(1, 0)))
        assert estimate > -width / 2 * math.log(1 - square)
        assert estimate == pytest.approx(width * square / (1 - square), rel=0.1)
        assert abs(shuffled) < 0.1

    def test_fit_depends_on_its_arguments_alone(self) -> None:
        x, y = rows(30, 5).float(), rows(30, 3, seed=1).float()
        state = torch.get_rng_state()
        first = CLUB(5, 3, 16)
        torch.set_rng_state(state)
        first.fit(x, y, steps=3, batch_size=8)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        second, third = (CLUB(5, 3, 16).fit(x, y, steps=3, batch_size=8, seed=seed) for seed in (0, 1))
        for name, weight in first.state_dict().items():
            assert torch.equal(weight, second.state_dict()[name])
            assert not torch.equal(weight, third.state_dict()[name])

    def test_refuses(self) -> None:
        club, x, y = CLUB(5, 3, 16), rows(8, 5), rows(8, 3)
        bad = y.clone()
        bad[6, 1] = math.nan
        for call, message in {
            lambda: club(x[:, :4], y): "x has shape (8, 4); must be (n, 5) for this CLUB",
            lambda: club(x, x): "y has shape (8, 5); must be (n, 3) for this CLUB",
            lambda: club(x, y[:7]): "x has 8 rows and y has 7; must have as many",
            lambda: club(x[:1], y[:1]): "x has 1 rows; must have at least 2",
            lambda: club(x, bad): "y has values that are not finite, first in row 6",
            lambda: club(x, y.int()): "y is of torch.int32; must be a floating tensor (n, d)",
            lambda: club(x[0], y): "x has shape (5,); must be (n, d)",
            lambda: club.fit(x, bad): "y has values that are not finite, first in row 6",
            lambda: club.fit(x, y, steps=0): "steps is 0; must be an integer of at least 1",
            lambda: club.fit(x, y, learning_rate=0): "learning_rate is 0; must be a number above 0",
            lambda: CLUB(5, 3, 1): "hidden_size is 1; must be an integer of at least 2",
        }.items():
            assert refusal(call) == message


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def rezipped(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Writes an archive again, with every file of it changed."""
    with zipfile.ZipFile(path) as archive:
        files = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


class TestFiles:
    def test_released_sizes(self) -> None:
        state = CLUB(768, 768, 500).state_dict()
        assert sum(tensor.numel() for tensor in state.values()) == 770_036
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
            f"{net}.{name}": shape
            for net in ("p_mu", "p_logvar")
            for name, shape in {
                "0.weight": (250, 768), "0.bias": (250,), "2.weight": (768, 250), "2.bias": (768,),
            }.items()
        }  # fmt: skip

    @pytest.mark.parametrize("write", ["safetensors", "state dict", "dict", "OrderedDict"])
    def test_round_trip(self, write: str, tmp_path: Path) -> None:
        club, path = CLUB(7, 5, 6), tmp_path / "club"
        state = club.state_dict()
        if write == "safetensors":
            save_club(club, path)
        else:
            torch.save({"state dict": state, "dict": dict(state), "OrderedDict": OrderedDict(state)}[write], path)
        loaded = load_club(path)
        assert (loaded.x_dim, loaded.y_dim, loaded.hidden_size) == (7, 5, 6)
        for name, weight in loaded.state_dict().items():
            assert weight.dtype == torch.float32 and torch.equal(weight, state[name])
        x, y = rows(6, 7), rows(6, 5)
        assert float(loaded(x, y).detach()) == float(club(x, y).detach())
        loaded.fit(x, y, steps=1)

    @pytest.mark.parametrize("place", ["instead of a tensor", "beside the tensors", "alone"])
    def test_a_pickle_runs_nothing(self, place: str, tmp_path: Path) -> None:
        path, trace = tmp_path / "club.pt", tmp_path / "trace"
        content: Any = dict(CLUB(7, 5, 6).state_dict())
        content["p_mu.0.bias" if place == "instead of a tensor" else "more"] = Evil(trace)
        torch.save(Evil(trace) if place == "alone" else content, path)
        message = refusal(lambda: load_club(path))
        assert message.startswith(f"{path} is no CLUB's weights in fp32 of torch.save's, or is damaged: its pickle ")
        assert not trace.exists()
        torch.load(path, weights_only=False)
        assert trace.exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state | {"more": torch.ones(2)}, "no state dict with a CLUB's eight names"),
            (lambda state: {"p_mu.0.weight": torch.ones(2, 3)}, "no state dict with a CLUB's eight names"),
            (lambda state: [state], "has the opcode"),
            (lambda state: state | {"p_mu.0.weight": torch.ones(7, 3).T}, "not contiguous, or shares its storage"),
            (lambda state: state | {"p_mu.0.bias": torch.ones(6)[:3]}, "not contiguous, or shares its storage"),
            (lambda state: state | {"p_mu.0.bias": torch.ones(6)[3:]}, "arguments that are not an fp32 tensor's"),
            (lambda state: {name: value.half() for name, value in state.items()}, "that are not an fp32 tensor's"),
            (lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()}, "the opcode NEWTRUE"),
            (lambda state: state | {"p_mu.0.bias": torch.ones(2)}, "p_mu.0.weight of shape (3, 7)"),
            (lambda state: state | {"p_logvar.0.bias": torch.ones(1, 3)}, "p_logvar.0.bias of shape (1, 3)"),
            (lambda state: state | {"p_mu.0.bias": torch.full((3,), math.inf)}, "p_mu.0.bias with values not finite"),
        ],
    )
    def test_refuses_other_tensors(self, change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
        path = tmp_path / "club.pt"
        torch.save(change(dict(CLUB(7, 5, 6).state_dict())), path)
        assert message in refusal(lambda: load_club(path))

    def test_refuses_damaged_files(self, tmp_path: Path) -> None:
        path = tmp_path / "club.pt"
        torch.save(CLUB(7, 5, 6).state_dict(), path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert "is no safetensors file, or is damaged" in refusal(lambda: load_club(path))
        assert "does not exist" in refusal(lambda: load_club(tmp_path / "none.pt"))
        assert "or is damaged" in refusal(lambda: load_club(tmp_path))
        for change, method, message in (
            (lambda name, data: data, zipfile.ZIP_DEFLATED, "or is compressed"),
            (lambda name, data: data[:-4] if name.endswith("data/2") else data, zipfile.ZIP_STORED, "data/2 has 56"),
            (lambda name, data: data * 100 if name.endswith("/data/2") else data, zipfile.ZIP_STORED, "data/2 has 60"),
            (lambda name, data: data * 99 if name.endswith(".pkl") else data, zipfile.ZIP_STORED, "data.pkl has"),
            (lambda name, data: b"big" if name.endswith("byteorder") else data, zipfile.ZIP_STORED, "little-endian"),
        ):
            path.write_bytes(whole)
            rezipped(path, change, method)
            assert message in refusal(lambda: load_club(path))
        assert "cannot be written" in refusal(lambda: save_club(CLUB(7, 5, 6), tmp_path / "none" / "club"))

    def test_any_pickle_is_read_or_refused(self, tmp_path: Path) -> None:
        path, stream = tmp_path / "club.pt", io.BytesIO()
        torch.save(CLUB(2, 2, 2).state_dict(), stream)
        draw = torch.Generator().manual_seed(0)
        outcomes = []
        for _ in range(200):
            path.write_bytes(stream.getvalue())

            def damage(name: str, data: bytes) -> bytes:
                if not name.endswith("data.pkl"):
                    return data
                place, byte = (int(torch.randint(top, (), generator=draw)) for top in (len(data), 256))
                return data[:place] + bytes([byte]) + data[place + 1 :]

            rezipped(path, damage)
            try:
                load_club(path)
                outcomes.append("read")
            except UserError:
                outcomes.append("refused")
        assert outcomes.count("refused") > 100


class TestRepresentationJsd:
    def test_against_matrix_logarithms(self) -> None:
        x, y = rows(50, 6), rows(80, 6, seed=1) * torch.linspace(0.2, 2, 6)

        def density(value: Tensor) -> Any:
            unit = (value / value.norm(dim=1, keepdim=True)).numpy()
            return unit.T @ unit / len(unit)

        def entropy(matrix: Any) -> float:
            return -float((matrix @ scipy.linalg.logm(matrix)).trace().real)

        of_x, of_y = density(x), density(y)
        wanted = entropy((of_x + of_y) / 2) - (entropy(of_x) + entropy(of_y)) / 2
        assert wanted > 0.01
        assert representation_jsd(x, y) == pytest.approx(wanted, rel=1e-9)
        assert representation_jsd(x.float(), y.float()) == pytest.approx(wanted, rel=1e-5)

    def test_bounds(self) -> None:
        x, y = torch.zeros(20, 8), torch.zeros(30, 8)
        x[:, :4], y[:, 4:] = rows(20, 4), rows(30, 4, seed=1)
        assert representation_jsd(x, x) < 1e-12
        assert representation_jsd(x, y) == pytest.approx(math.log(2), abs=1e-12)
        assert representation_jsd(x, y) <= math.log(2)

    def test_invariances(self) -> None:
        x, y = rows(20, 6), rows(25, 6, seed=1) + 1
        jsd = representation_jsd(x, y)
        turn = torch.linalg.qr(rows(6, 6, seed=2)).Q
        scale = rows(20, 1, seed=3).abs() + 1e-3
        for other in (
            representation_jsd(y, x), representation_jsd(x * scale, y), representation_jsd(x @ turn, y @ turn),
            representation_jsd(x.flip(0), -y),
        ):  # fmt: skip
            assert other == pytest.approx(jsd, rel=1e-9)

    def test_of_the_released_code(self) -> None:
        """Equal for as many rows on both sides; else the released value can be negative, which no divergence is."""

        def entropy(matrix: Tensor) -> float:
            values = torch.linalg.eigvalsh(matrix).clamp(min=1e-300)
            shares = values / values.sum()
            return float(-(shares * shares.log()).sum())

        def released(x: Tensor, y: Tensor) -> float:
            unit = [value / value.norm(dim=1, keepdim=True) for value in (x, y)]
            of_x, of_y = (each.T @ each for each in unit)
            return entropy((of_x + of_y) / 2) - (entropy(of_x) + entropy(of_y)) / 2

        x, y = rows(20, 6), rows(20, 6, seed=1) + 1
        assert representation_jsd(x, y) == pytest.approx(released(x, y), rel=1e-9)
        assert representation_jsd(x, torch.cat([y, y])) == pytest.approx(released(x, y), rel=1e-9)
        many, few = torch.eye(2, dtype=torch.float64)[[0] * 100], torch.eye(2, dtype=torch.float64)
        assert released(many, few) < -0.2 < 0.2 < representation_jsd(many, few)

    def test_moments_in_batches(self) -> None:
        x, y = rows(2500, 5).float(), rows(40, 5, seed=1).float()
        whole, parts, other = (RepresentationMoments(5) for _ in range(3))
        whole.update(x)
        other.update(y)
        for part in x.split([1, 999, 1500]):
            parts.update(part)
        assert parts.count == 2500
        torch.testing.assert_close(parts.density, whole.density, rtol=1e-13, atol=1e-15)
        assert float(whole.density.trace()) == pytest.approx(1)
        assert parts.entropy() == pytest.approx(whole.entropy(), rel=1e-12)
        assert whole.jsd(other) == pytest.approx(representation_jsd(x, y), rel=1e-12)

    @pytest.mark.parametrize(("n", "m", "width"), [(30, 20, 200), (30, 150, 200), (150, 30, 200), (300, 250, 200)])
    def test_is_that_of_the_moments_however_many_rows(self, n: int, m: int, width: int) -> None:
        x, y = rows(n, width).float(), rows(m, width, seed=1).float() + 0.1
        of_x, of_y = (RepresentationMoments(width) for _ in range(2))
        of_x.update(x)
        of_y.update(y)
        assert representation_jsd(x, y) == pytest.approx(of_x.jsd(of_y), rel=1e-9)

    def test_of_few_wide_rows_takes_no_matrix_of_their_width(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And a side's own entropy is worked out once, however many others it is compared with."""
        sizes, original = list[int](), torch.linalg.eigvalsh

        def noted(matrix: Tensor) -> Tensor:
            sizes.append(len(matrix))
            return original(matrix)

        monkeypatch.setattr(torch.linalg, "eigvalsh", noted)
        states = {"text": rows(2 * 9, 64).reshape(2, 9, 64)}
        measure = LayerJSD(states)
        for seed in (1, 2, 3):
            shifted = {"text": rows(2 * 7, 64, seed).reshape(2, 7, 64), "vision": states["text"]}
            found = measure(shifted)
            pairs = zip(states["text"], shifted["text"], strict=True)
            assert found == {"text": [representation_jsd(*pair) for pair in pairs]} == LayerJSD(states)(shifted)
        sizes.clear()
        measure(shifted)
        assert sorted(sizes) == [7, 7, 16, 16]

    def test_entropy_of_what_is_known(self) -> None:
        moments = RepresentationMoments(4)
        moments.update(torch.eye(4) * 3)
        assert moments.entropy() == pytest.approx(math.log(4))

    def test_refuses(self) -> None:
        x = rows(5, 3)
        zero, infinite = x.clone(), x.clone()
        zero[2], infinite[4, 0] = 0, math.inf
        moments = RepresentationMoments(3)
        for call, message in {
            lambda: representation_jsd(x, zero): "y has a row of zeros, row 2; must have none",
            lambda: representation_jsd(infinite, x): "x has values that are not finite, first in row 4",
            lambda: representation_jsd(x, x[:1]): "y has 1 rows; must have at least 2",
            lambda: representation_jsd(x[:1], x): "x has 1 rows; must have at least 2",
            lambda: representation_jsd(x, x[:, :2]): "y has shape (5, 2); must be (n, 3)",
            lambda: moments.update(zero): "x has a row of zeros, row 2; must have none",
            lambda: moments.entropy(): "the moments are of no rows; must be of at least one",
            lambda: moments.jsd(RepresentationMoments(4)): "other has width 4; must have 3",
        }.items():
            assert refusal(call) == message


def evaluation(count: int, seed: int, noise: float) -> Embeddings:
    """Answers that repeat the query, the model's with some noise."""
    visual, text, error = (torch.nn.functional.normalize(rows(count, 6, seed=seed + i)) for i in range(3))
    query = (visual + text) / 2
    return Embeddings(visual, text, query + noise * error, query)


class TestEmi:
    def test_is_the_difference_of_two_estimates(self) -> None:
        clean, club = evaluation(200, 0, 0.5), CLUB(6, 6, 32)
        x = (clean.visual + clean.text) / 2
        assert torch.equal(clean.query, x)
        club.fit(x, clean.reference, steps=100)
        emi = effective_mutual_information(club, x, clean.response, clean.reference)
        wanted = by_pairs(club.double(), x, clean.response) - by_pairs(club, x, clean.reference)
        assert emi == pytest.approx(float(wanted.detach()), rel=1e-4)
        assert effective_mutual_information(club, x, clean.reference, clean.reference) == 0
        assert effective_mutual_information(club, x, clean.response.roll(1, 0), clean.reference) < 0 != emi

    def test_report(self) -> None:
        clean, shifted = evaluation(90, 0, 0.1), evaluation(60, 7, 0.8)
        club = CLUB(6, 6, 32).fit(clean.query, clean.reference, steps=50)
        report = emid_report(club, clean, shifted)
        of = {
            name: effective_mutual_information(club, each.query, each.response, each.reference)
            for name, each in (("emi_clean", clean), ("emi_shifted", shifted))
        }
        jsd = {
            "jsd_visual": representation_jsd(clean.visual, shifted.visual),
            "jsd_text": representation_jsd(clean.text, shifted.text),
            "jsd_response_clean": representation_jsd(clean.response, clean.reference),
            "jsd_response_shifted": representation_jsd(shifted.response, shifted.reference),
        }
        difference = of["emi_clean"] - of["emi_shifted"]
        assert report == {**of, "emid": difference, "emid_upper_bound": emid_upper_bound(**jsd), **jsd}
        assert emid(club, clean, shifted) == difference == -emid(club, shifted, clean) != 0
        assert len({*jsd.values()}) == 4
        scaled = emid_report(club, clean, shifted, entropy_scale=3.0)
        assert scaled["emid_upper_bound"] == emid_upper_bound(**jsd, entropy_scale=3.0)

    def test_bound(self) -> None:
        assert emid_upper_bound(0.04, 0.09, 0.0016, 0.0081) == pytest.approx(0.2 + 0.3 + 0.2 + 0.3)
        full = emid_upper_bound(0.04, 0.09, 0.0016, 0.0081, entropy_scale=10)
        assert full == pytest.approx(10 * (0.2 + 0.3) + 4 * (0.2 + 0.3))
        assert emid_upper_bound(0, 0, 0, math.log(2)) == pytest.approx(math.log(2) ** 0.25)

    def test_refuses(self) -> None:
        x = rows(5, 3)
        for call, message in {
            lambda: Embeddings(x, x[:, :2], x, x): "text has shape (5, 2); must be that of visual, (5, 3)",
            lambda: Embeddings(x, x, x, x[:4]): "reference has shape (4, 3); must be that of response, (5, 3)",
            lambda: Embeddings(x, x, x[:4], x[:4]): "response has 4 rows; must have as many as text, 5",
            lambda: Embeddings(x[:1], x, x, x): "visual has 1 rows; must have at least 2",
            lambda: emid_upper_bound(0.1, 1, 0, 0): "jsd_text is 1; must be within [0, ln 2]",
            lambda: emid_upper_bound(0.1, 0, math.nan, 0): "jsd_response_clean is nan; must be within [0, ln 2]",
            lambda: emid_upper_bound(0, 0, 0, 0, entropy_scale=-1): "entropy_scale is -1; must be finite, at least 0",
        }.items():
            assert refusal(call) == message


MEASURE = """
import torch
from vittle.metrics import CLUB, effective_mutual_information, representation_jsd

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

baseline, club = kib("VmRSS"), CLUB(768, 768, 500)
x, y, z = (torch.randn(10_000, 768) for _ in range(3))
effective_mutual_information(club, x, y, z)
representation_jsd(y, z)
print((kib("VmHWM") - baseline) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell its peak memory")
def test_ten_thousand_samples_stay_within_a_gibibyte() -> None:
    command = [sys.executable, "-c", MEASURE]
    path = {"PYTHONPATH": str(Path(__file__).parents[2] / "python")}
    outcome = subprocess.run(command, env=ENVIRONMENT | path, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    assert 0.09 < float(outcome.stdout) < 1


def test_states_are_kept_as_the_model_has_them(tmp_path: Path) -> None:
    """Half the memory of fp32 for a model in bf16, and nothing lost."""
    data = write_dataset(tmp_path, split="held_out", count=4, seed=3)
    task = Exact(data, tmp_path / "images")
    model, processor = load_tuned(str(ALIGNED), torch.bfloat16), load_processor(str(ALIGNED))
    states = layer_states(model, processor, batches(task.samples, 2), CLEAN, Asking())
    assert {name: (each.dtype, each.shape[1]) for name, each in states.items()} == {
        "vision": (torch.bfloat16, 4), "text": (torch.bfloat16, 4),
    }  # fmt: skip
    assert sum(LayerJSD(states)({name: each.float() for name, each in states.items()})["text"]) < 1e-9
