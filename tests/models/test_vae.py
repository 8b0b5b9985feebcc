"""The autoencoder: how latents are shifted and scaled, and what sizes it takes. Families test it whole."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from support.tiny import make_vae, write_json

from diffpref.errors import UserError
from diffpref.models.vae import Vae, find_vae
from diffpref.train.config import ModelConfig


def made(folder: Path, **config) -> Vae:
    """A random autoencoder with keys of its config changed; None takes a key out."""
    make_vae().save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | config
    write_json(folder / "config.json", {key: value for key, value in content.items() if value is not None})
    return Vae(folder, torch.device("cpu"))


MOMENTS = {"latents_mean": [0.0, 1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 4.0, 5.0]}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scaling_factor": None}, [3 * 0.18215] * 4),
        ({"scaling_factor": 0.5}, [1.5] * 4),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, [1.375] * 4),
        ({"scaling_factor": 0.5, **MOMENTS}, [1.5, 0.5, 0.125, 0.0]),
    ],
)
def test_latents_are_shifted_then_scaled(tmp_path, config, expected):
    vae, latents = made(tmp_path / "vae", **config), torch.full((2, 4, 1, 1), 3.0)
    torch.testing.assert_close(vae.scale(latents), torch.tensor(expected).reshape(1, 4, 1, 1).expand(2, -1, -1, -1))
    torch.testing.assert_close(vae.scale(latents[0]), torch.tensor(expected).reshape(4, 1, 1))


@pytest.mark.parametrize("config", [{}, {"shift_factor": 0.25}, MOMENTS])
def test_decoding_undoes_the_scaling(tmp_path, config):
    vae = made(tmp_path / "vae", **config)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(tmp_path / "vae").decode(latents).sample
    torch.testing.assert_close(vae.decode(vae.scale(latents)), (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_shapes(tmp_path):
    vae = made(tmp_path / "vae")
    assert (vae.channels, vae.shrink) == (4, 4)
    assert vae.latent_shape(12, 12) == (4, 3, 3) and vae.latent_shape(24, 16, patch=2) == (4, 4, 6)
    with pytest.raises(UserError, match=r"resolution: 10 is no multiple of the VAE's 4$"):
        vae.latent_shape(16, 10, patch=2)
    with pytest.raises(UserError, match="resolution: 12 is no multiple of 8, the VAE's 4 times the patch's 2"):
        vae.latent_shape(12, 16, patch=2)


def test_it_is_the_pipelines_or_the_one_that_is_given(pipeline, tmp_path):
    made(tmp_path / "vae", scaling_factor=0.5)
    cpu = torch.device("cpu")
    assert find_vae(ModelConfig(), pipeline, cpu).path == pipeline / "vae"
    given = find_vae(ModelConfig(vae=str(tmp_path / "vae")), pipeline, cpu)
    assert given.path == tmp_path / "vae" and given.config["scaling_factor"] == 0.5
    assert given.identity() != find_vae(ModelConfig(), pipeline, cpu).identity()
