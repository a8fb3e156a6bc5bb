"""The Fréchet distance: known values, features of a TorchScript network, and bad inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import linalg

from vargpt_rl.evaluate import scorers
from vargpt_rl.evaluate.fid import SIDE, Statistics, distance, features, load_network, resized

D = 6


class Layers(torch.nn.Module):
    """Replaces Inception: a few functions of an image's mean colours."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 3 * D).view(3, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x.mean((2, 3)) @ self.weight)[:, :, None, None]


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("resizes inside, which is not the clean way")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.jit.script(Network()).save(str(path))
    return path


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a thing {i}" for i in range(12)))
    return f"prompts={file}"


@pytest.fixture
def reference(tmp_path):
    """A folder of images of different sizes, and one below it."""
    rng = np.random.default_rng(0)
    (tmp_path / "real/deeper").mkdir(parents=True)
    for i in range(10):
        pixels = np.full((40 + i, 30, 3), rng.integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / ("deeper" if i % 2 else "") / f"{i}.png")
    (tmp_path / "real/notes.txt").write_text("no image")
    return tmp_path / "real"


def test_distance_of_two_scalar_normals():
    one, other = (Statistics(np.array([m]), np.array([[s**2]])) for m, s in ((1.0, 2.0), (4.0, 3.5)))
    assert distance(one, other) == pytest.approx(3.0**2 + 1.5**2)
    assert distance(one, one) == pytest.approx(0, abs=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 40))
def test_distance_agrees_with_sqrtm(seed, n, m):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(count, D)) @ rng.normal(size=(D, D)) + rng.normal(size=D) for count in (n, m))
    first, second = (Statistics(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    # An eigenvalue of 0 comes out as rounding of the trace (1e-16 of it), its root as 1e-8 of it.
    near = {"abs": 1e-6 * (1 + np.trace(first.sigma + second.sigma))}
    assert distance(first, second) == pytest.approx(distance(second, first), **near)
    if min(n, m) > 2 * D:  # with fewer, the covariances are singular, and sqrtm is not to be trusted
        apart = first.mu - second.mu
        root = linalg.sqrtm(first.sigma @ second.sigma).real
        expected = apart @ apart + np.trace(first.sigma + second.sigma - 2 * root)
        assert distance(first, second) == pytest.approx(expected, **near)


def test_images_are_resized_without_rounding():
    ramp = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[None, :, None], 3, 2).repeat(8, 0))
    pixels = resized(ramp)
    assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.float32
    assert len(np.unique(pixels[150, :, 0])) > 200, "a rounded ramp has 32 values"
    assert np.abs(pixels[150, 140:160, 1] - ((np.arange(140, 160) + 0.5) * 32 / SIDE - 0.5)).max() < 0.05


def test_features_use_pixels_from_minus_one_to_one(weights):
    network = load_network(str(weights), torch.device("cpu"))
    images = [Image.new("RGB", (20, 30), colour) for colour in ("black", "white", (128, 128, 0))]
    found = features(network, images)
    means = torch.tensor([[-1.0] * 3, [127 / 128] * 3, [0.0, 0.0, -1.0]])
    expected = torch.sin(3 * means @ torch.linspace(-1, 1, 3 * D).view(3, D))
    assert found.shape == (3, D) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)


def test_compares_with_a_folder_and_with_statistics(
    command, prompts, painted, folder, result, weights, reference, tmp_path, monkeypatch
):
    monkeypatch.setattr(scorers, "BATCH", 5)
    arguments = ["benchmark=fid", prompts, f"weights={weights}"]
    assert command(*arguments, f"reference={reference}") == 0
    network = load_network(str(weights), torch.device("cpu"))

    def statistics(paths):
        found = features(network, [Image.open(path) for path in paths])
        return Statistics(found.mean(0), np.cov(found, rowvar=False))

    real = statistics(sorted(reference.rglob("*.png")))
    expected = distance(statistics((folder("fid") / "images").iterdir()), real)
    assert expected > 0.01
    assert result("fid")["metrics"] == {"fid": pytest.approx(expected)}
    assert result("fid")["notes"] == ["FID of 12 images: with fewer than about 10,000 it is biased upwards."]
    np.savez(tmp_path / "real.npz", mu=real.mu, sigma=real.sigma)
    assert command(*arguments, f"reference={tmp_path / 'real.npz'}") == 0
    assert result("fid")["metrics"] == {"fid": pytest.approx(expected)}
    assert "| VARGPT (reported) | 12.60 |" in (tmp_path / "out/fid.md").read_text()


def test_bad_inputs_fail_before_generating(command, prompts, painted, weights, reference, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    np.savez(tmp_path / "mu.npz", mu=np.zeros(D))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(D), sigma=np.zeros((D, D + 1)))
    torch.jit.script(Layers()).save(str(tmp_path / "other.pt"))
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "broken.npz").write_text("no arrays")
    for key, path, said in (
        ("reference", "none", "expected a folder of at least 2 images"),
        ("reference", "nowhere", "expected a folder of at least 2 images"),
        ("reference", "mu.npz", 'expected arrays "mu" and "sigma"'),
        ("reference", "odd.npz", 'expected "mu" [D] and "sigma" [D, D], got (6,) and (6, 7)'),
        ("reference", "broken.npz", 'expected arrays "mu" and "sigma"'),
        ("weights", "nowhere.pt", "no such file, expected the Inception network"),
        ("weights", "text.pt", "expected a TorchScript network"),
        ("weights", "other.pt", "expected a TorchScript network with a part 'layers'"),
    ):
        given = {"weights": weights, "reference": reference, key: tmp_path / path}
        assert command("benchmark=fid", prompts, *(f"{name}={value}" for name, value in given.items())) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"error: {key}={tmp_path / path}: {said}"), message
    assert not painted
