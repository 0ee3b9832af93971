"""The trainer of the embedded generator: every stage on a handful of synthetic sprites."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from models.emoji.autoencoder import build_autoencoder, normalise_latents
from models.emoji.data import (
    COLOURS,
    STYLES,
    Jitter,
    Sprites,
    balanced_indices,
    caption,
    clean_name,
    compose,
)
from models.emoji.denoiser import PLACEMENT, CaptionedLatents, LatentSet, PictureFromCaption
from models.emoji.loop import Stage, cosine
from models.emoji.text import MAX_LENGTH, build_text_encoder, learn_merges, write_tokenizer
from models.emoji.train import Recipe, train


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    """Return eight names in up to three styles: discs of different radius and colour."""
    axis = torch.linspace(-1, 1, 64)
    radius = (axis[None] ** 2 + axis[:, None] ** 2).sqrt()
    rows = [(name, style) for name in range(8) for style in range(3) if (name + style) % 4]
    pixels = torch.zeros(len(rows), 4, 64, 64, dtype=torch.uint8)
    for row, (name, style) in enumerate(rows):
        pixels[row, style] = 255
        pixels[row, 3] = (radius < 0.3 + 0.08 * name).byte() * 255
    names = ("ant", "cat", "dog", "owl", "t-rex", "unicorn", "polar bear", "ox")
    ids = torch.tensor(rows)
    return Sprites(pixels, ids[:, 0], ids[:, 1], names, ("animal-mammal",) * 8)


def test_captions_use_the_right_article() -> None:
    """Vowels, the exception, and the cleaning of names."""
    assert caption("owl") == "an owl"
    assert caption("unicorn") == "a unicorn"
    assert caption("owl", "3d", "orange") == "a 3d owl on an orange background"
    assert clean_name("FRONT-FACING BABY CHICK") == "baby chick"
    assert clean_name("CAT FACE") == "cat"


def test_compose_is_seeded_and_says_what_it_shows(sprites: Sprites) -> None:
    """Equal seeds give equal pictures; the corner has the colour that the caption names."""

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return compose(sprites, balanced_indices(sprites, 16, generator), generator).images

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    generator = torch.Generator().manual_seed(3)
    told = Jitter(name_style=1.0, name_colour=1.0, shade=0.0, grade=0.0)
    batch = compose(sprites, balanced_indices(sprites, 32, generator), generator, told)
    assert batch.images.shape == (32, 3, 64, 64)
    assert batch.images.abs().max() <= 1
    for image, text, colour_id, style_id in zip(
        batch.images, batch.captions, batch.colour_id, batch.style_id, strict=True
    ):
        colour = list(COLOURS)[colour_id]
        assert f"{colour} background" in text
        assert STYLES[style_id] in text
        expected = torch.tensor(COLOURS[colour]) / 127.5 - 1
        torch.testing.assert_close(image[:, 0, 0], expected, atol=1e-4, rtol=0)


def test_sampling_is_balanced_over_names(sprites: Sprites) -> None:
    """Names with fewer sprites are not drawn less often."""
    rows = balanced_indices(sprites, 8000, torch.Generator().manual_seed(0))
    share = torch.bincount(sprites.name_id[rows], minlength=8) / 8000
    torch.testing.assert_close(share, torch.full((8,), 1 / 8), atol=0.02, rtol=0)


def test_tokenizer_never_fails_and_knows_whole_words(tmp_path: Path) -> None:
    """Known words are one token each, anything else falls back to bytes."""
    tokenizer = write_tokenizer(["a polar bear on a red background", "a t-rex"], tmp_path)
    assert len(tokenizer("a polar bear on a red background")["input_ids"]) == 9
    strange = tokenizer("Zebrafish, 漢字 \N{CAT FACE}!")["input_ids"]
    assert strange[0] == tokenizer.bos_token_id
    assert strange[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in strange[1:-1]
    assert learn_merges(["ab ab", "cab"]) == learn_merges(["cab", "ab"])


def test_normalised_latents_keep_the_reconstruction(sprites: Sprites) -> None:
    """Unit variance is folded into the weights without any change of the output."""
    torch.manual_seed(0)
    vae = build_autoencoder()
    generator = torch.Generator().manual_seed(0)
    images = compose(sprites, balanced_indices(sprites, 64, generator), generator).images
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        normalise_latents(vae, sprites, count=64, seed=0)
        posterior = vae.encode(images).latent_dist
        after = vae.decode(posterior.mean).sample
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(16), atol=0.2, rtol=0)


@pytest.mark.parametrize("muon", [False, True])
def test_a_resumed_stage_ends_where_an_unbroken_one_does(tmp_path: Path, muon: bool) -> None:
    """An interruption between two checkpoints leaves no trace in the result, whichever optimisers train."""

    def run(folder: Path, stop: int = 6) -> torch.Tensor:
        torch.manual_seed(0)
        first = nn.Linear(4, 4)
        module = nn.Sequential(first, nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(1)
        orthogonal = [first.weight] if muon else []
        stage = Stage("toy", module, folder, steps=6, lr=1e-2, generator=generator, save_every=0, orthogonal=orthogonal)

        def loss_of(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            if stage.step == stop:
                raise KeyboardInterrupt
            return module(torch.randn(8, 4, generator=generator)).square().mean(), {}

        stage.run(loss_of)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert cosine(0, 10, 2, 0.1) == 0.5
    assert cosine(10, 10, 2, 0.1) == pytest.approx(0.1)
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop=3)
    assert torch.equal(run(tmp_path / "broken"), whole)
    assert torch.equal(run(tmp_path / "broken"), whole)


def test_drawn_captions_say_what_the_latents_show(sprites: Sprites, tmp_path: Path) -> None:
    """Every drawn caption is one of the true ones of its picture, or empty; each part is named as often as planned."""
    tokenizer = write_tokenizer([caption(n, s, c) for n in sprites.names for s in STYLES for c in COLOURS], tmp_path)
    ids = torch.cartesian_prod(torch.arange(8), torch.arange(3), torch.arange(12))
    # A latent that carries its own labels, so that a draw can be recognised.
    latents = torch.zeros(len(ids), 16, 8, 8)
    latents[:, :3, 0, 0] = ids.float()
    data = CaptionedLatents(LatentSet(latents, *ids.unbind(1)), tokenizer, sprites.names, drop=0.1)
    drawn, rows = data.draw(2000, torch.Generator().manual_seed(0))
    named = [0, 0]
    for picture, row in zip(drawn, data.tokens[rows], strict=True):
        name, style, colour = (int(i) for i in picture[:3, 0, 0])
        # The tokenizer's pieces come back with spaces of their own.
        told = {
            caption(sprites.names[name], s, c).replace(" ", ""): (s is not None, c is not None)
            for s in (STYLES[style], None)
            for c in (list(COLOURS)[colour], None)
        } | {"": (False, False)}
        said = tokenizer.decode(row, skip_special_tokens=True).replace(" ", "")
        assert said in told
        named = [count + part for count, part in zip(named, told[said], strict=True)]
    assert named[0] / 2000 == pytest.approx(0.9 * PLACEMENT.name_style, abs=0.04)
    assert named[1] / 2000 == pytest.approx(0.9 * PLACEMENT.name_colour, abs=0.04)


def test_one_token_shows_one_cell(sprites: Sprites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of token 8 + i moves the 2x2 latents of cell i, row by row, and nothing else."""
    torch.manual_seed(0)
    module = PictureFromCaption(build_text_encoder(write_tokenizer(["a cat"], tmp_path)))
    states = torch.randn(1, MAX_LENGTH, 192)
    monkeypatch.setattr(module.text_encoder, "forward", lambda tokens: (states.clone(),))
    with torch.no_grad():
        before = module(torch.zeros(1, MAX_LENGTH, dtype=torch.long))
        for cell in (0, 1, 6, 15):
            kept = states.clone()
            states[:, 8 + cell] += 1
            moved = (module(torch.zeros(1, MAX_LENGTH, dtype=torch.long)) != before).any(1)[0]
            expected = torch.zeros(8, 8, dtype=torch.bool)
            row, column = divmod(cell, 4)
            expected[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = True
            assert torch.equal(moved, expected)
            states.copy_(kept)


def test_all_stages_from_nothing(sprites: Sprites, tmp_path: Path) -> None:
    """Three updates of everything leave a pipeline that loads and generates."""
    recipe = Recipe(
        batch=4, vae_steps=3, decoder_steps=2, latents=16, text_steps=3, text_batch=4, denoiser_steps=3, fresh=8
    )
    work, out = tmp_path / "work", tmp_path / "out"
    train(sprites, recipe, ("vae", "decoder", "text", "denoiser", "export"), work, out)
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.safety_checker is None
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        ["an owl"] * 2, num_inference_steps=2, guidance_scale=4.0, generator=generator, output_type="pt"
    ).images
    assert images.shape == (2, 3, 64, 64)
    assert torch.isfinite(images).all()
    assert (out / "samples.png").exists()
