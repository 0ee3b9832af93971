"""The rewards of the embedded model: contract on any weights, order of scores on trained ones."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from harness.api import Reward, UserError
from harness.prompts import Prompt
from rewards import _emoji
from rewards.background_accuracy import BackgroundAccuracy
from rewards.emoji_3d import Emoji3d, Emoji3dHeldout
from rewards.emoji_clip import EmojiClip, EmojiClipHeldout
from rewards.object_accuracy import ObjectAccuracy

CPU = torch.device("cpu")
SMOOTH: list[type[Reward]] = [EmojiClip, EmojiClipHeldout, Emoji3d, Emoji3dHeldout]
GOLD: list[type[Reward]] = [ObjectAccuracy, BackgroundAccuracy]


@pytest.fixture(scope="module")
def rewards() -> dict[type[Reward], Reward]:
    """One instance of each; building them draws nothing from torch's global generator."""
    before = torch.get_rng_state()
    built = {reward: reward(CPU) for reward in SMOOTH + GOLD}
    assert torch.equal(before, torch.get_rng_state())
    return built


@pytest.mark.parametrize("kind", SMOOTH)
def test_gradient_agrees_with_differences(
    kind: type[Reward], rewards: dict[type[Reward], Reward], pictures: Tensor, prompts: list[Prompt]
) -> None:
    """A small step along the gradient changes the score as the gradient says, to a quarter (float32, curved)."""
    reward = rewards[kind]
    x = pictures[[0, 12, 20]].clone().requires_grad_()
    chosen = [prompts[0], prompts[12], prompts[20]]
    (gradient,) = torch.autograd.grad(reward(x, chosen).sum(), x)
    norm = gradient.flatten(1).norm(dim=1)
    step = 0.002 * gradient / norm.view(-1, 1, 1, 1)
    with torch.no_grad():
        rise = (reward(x + step, chosen) - reward(x - step, chosen)) / 0.004
    assert torch.allclose(rise, norm, rtol=0.25)


@pytest.mark.parametrize("kind", SMOOTH + GOLD)
def test_a_score_depends_on_its_own_picture_and_prompt(
    kind: type[Reward], rewards: dict[type[Reward], Reward], pictures: Tensor, prompts: list[Prompt]
) -> None:
    """Alone or in a batch, in any order, the score is the same, float32 (B,)."""
    scores = rewards[kind](pictures, prompts)
    assert scores.shape == (24,)
    assert scores.dtype == torch.float32
    backwards = rewards[kind](pictures.flip(0), prompts[::-1]).flip(0)
    alone = rewards[kind](pictures[5:6], prompts[5:6])
    assert torch.allclose(scores, backwards, atol=1e-3)
    assert torch.allclose(scores[5:6], alone, atol=1e-3)


@pytest.mark.parametrize("kind", SMOOTH + GOLD)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_picture_scores_nan_and_leaves_the_others_alone(
    kind: type[Reward], rewards: dict[type[Reward], Reward], pictures: Tensor, prompts: list[Prompt], value: float
) -> None:
    """One value that is not finite makes a missing score, never a number."""
    broken = pictures[:3].clone()
    broken[1, 0, 30, 30] = value
    scores = rewards[kind](broken, prompts[:3])
    assert scores.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", SMOOTH + GOLD)
def test_other_sizes_are_resized(
    kind: type[Reward], rewards: dict[type[Reward], Reward], pictures: Tensor, prompts: list[Prompt]
) -> None:
    """A picture with every pixel doubled scores nearly as the picture itself; any size is taken."""
    doubled = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    small = rewards[kind](F.avg_pool2d(doubled, 2), prompts)
    large = rewards[kind](doubled, prompts)
    spread = float(small.std()) + 0.1
    assert float((small - large).abs().mean()) < 0.4 * spread
    assert rewards[kind](pictures[:2, :, :37, :50], prompts[:2]).isfinite().all()


@pytest.mark.parametrize("kind", SMOOTH + GOLD)
def test_pictures_and_prompts_must_pair_up(
    kind: type[Reward], rewards: dict[type[Reward], Reward], pictures: Tensor, prompts: list[Prompt]
) -> None:
    """A prompt too few is an error where the prompt is read, not a shifted score."""
    if kind in (Emoji3d, Emoji3dHeldout):
        return
    with pytest.raises(ValueError, match=r"prompts|shorter"):
        rewards[kind](pictures[:3], prompts[:2])


@pytest.mark.parametrize("metadata", [{}, {"object": None}, {"object": "squirrel"}, {"object": ["fox"]}, {"colour": 3}])
def test_gold_metrics_are_missing_where_they_are_not_defined(
    rewards: dict[type[Reward], Reward], pictures: Tensor, metadata: dict[str, object]
) -> None:
    """Without a known object or colour they do not apply, and say NaN rather than 0."""
    prompt = Prompt("p", "a fox", metadata)
    for kind in GOLD:
        assert not rewards[kind].applies(prompt)
        assert rewards[kind](pictures[:1], [prompt]).isnan().all()


def test_background_accuracy_knows_the_compositions(
    rewards: dict[type[Reward], Reward], pictures: Tensor, labels: list[dict[str, str]]
) -> None:
    """All 24 pictures have the colour that they were drawn with, and none has another one."""
    for shift in range(3):
        names = [row["colour"] for row in labels]
        named = [Prompt("p", "", {"colour": names[(i + shift) % 24]}) for i in range(24)]
        wanted = [float(names[(i + shift) % 24] == names[i]) for i in range(24)]
        assert rewards[BackgroundAccuracy](pictures, named).tolist() == wanted


def test_background_accuracy_reads_the_border_only(rewards: dict[type[Reward], Reward]) -> None:
    """A blue picture with a border of 4 red pixels is red; with 1 pixel it is blue."""
    blue, red = torch.tensor([44, 88, 212]) / 255, torch.tensor([214, 40, 40]) / 255
    prompts = [Prompt("p", "", {"colour": "red"})]
    for width, score in ((4, 1.0), (1, 0.0)):
        picture = red.view(1, 3, 1, 1).repeat(1, 1, 64, 64)
        picture[:, :, width:-width, width:-width] = blue.view(1, 3, 1, 1)
        assert rewards[BackgroundAccuracy](picture, prompts).tolist() == [score]


@pytest.mark.parametrize(("kind", "critic"), [(Emoji3d, "style3d"), (Emoji3dHeldout, "style3d_heldout")])
def test_the_3d_style_scores_higher(
    kind: type[Reward],
    critic: str,
    rewards: dict[type[Reward], Reward],
    pictures: Tensor,
    prompts: list[Prompt],
    figures: dict[str, dict[str, float]],
) -> None:
    """Of the pairs of a 3D picture and another, 95 % are in this order; on average they are 2 nats apart."""
    if critic not in figures:
        pytest.skip(f"metrics.json says that {critic} is untrained")
    scores = rewards[kind](pictures, prompts)
    assert float((scores[16:, None] > scores[None, :16]).float().mean()) >= 0.95
    assert float(scores[16:].mean() - scores[:16].mean()) > 2


@pytest.mark.parametrize(("kind", "critic"), [(EmojiClip, "clip"), (EmojiClipHeldout, "clip_heldout")])
def test_the_right_animal_aligns_best(
    kind: type[Reward],
    critic: str,
    rewards: dict[type[Reward], Reward],
    pictures: Tensor,
    labels: list[dict[str, str]],
    figures: dict[str, dict[str, float]],
) -> None:
    """In half of the pictures or more (chance: 3 of 24) the shown animal beats the other seven."""
    if critic not in figures:
        pytest.skip(f"metrics.json says that {critic} is untrained")
    names = [row["object"] for row in labels[:8]]
    table = [rewards[kind](pictures, [Prompt("p", f"a {name}")] * 24) for name in names]
    best = torch.stack(table, 1).argmax(1).tolist()
    assert sum(names[b] == row["object"] for b, row in zip(best, labels, strict=True)) >= 12


def test_object_accuracy_knows_the_compositions(
    rewards: dict[type[Reward], Reward], pictures: Tensor, prompts: list[Prompt], figures: dict[str, dict[str, float]]
) -> None:
    """The recognised share is at least the stated accuracy, less chance; hardly any is taken for the next one."""
    if "object" not in figures:
        pytest.skip("metrics.json says that object is untrained")
    stated = figures["object"]["accuracy"]
    chance = 3 * (stated * (1 - stated) / 24) ** 0.5 + 1 / 24
    assert float(rewards[ObjectAccuracy](pictures, prompts).mean()) >= stated - chance
    assert float(rewards[ObjectAccuracy](pictures, prompts[1:] + prompts[:1]).mean()) <= 0.1


def test_no_two_critics_share_weights() -> None:
    """Held-out and gold critics differ from the proxies in the shape of the network or in every weight matrix."""
    folders = [path for path in sorted((_emoji.EMOJI / "critics").iterdir()) if path.is_dir()]
    assert len(folders) == 5
    weights = sorted((_emoji.EMOJI / "critics").rglob("model.safetensors"))
    assert len({path.read_bytes() for path in weights}) == len(weights) == 7  # a CLIP has two towers
    seers = [next(folder for folder in (top / "image", top) if folder.is_dir()) for top in folders]
    shapes = {json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True) for folder in seers}
    assert len(shapes) == 5


def test_missing_weights_name_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error says which folder lacks what, and how to get it."""
    monkeypatch.setattr(_emoji, "EMOJI", tmp_path)
    with pytest.raises(UserError, match=r"style3d lacks config\.json and model\.safetensors: restore"):
        _emoji.load("style3d", CPU)


@pytest.mark.parametrize("text", ["", " ", "a fox " * 2000, "\U0001f98a", "<|endoftext|> fox", "Änderung 狐", "a\x00b"])
def test_any_text_has_a_score(rewards: dict[type[Reward], Reward], pictures: Tensor, text: str) -> None:
    """Empty, endless, foreign and odd texts give a finite score, the same a second time."""
    for kind in (EmojiClip, EmojiClipHeldout):
        first = rewards[kind](pictures[:2], [Prompt("p", text)] * 2)
        assert first.isfinite().all()
        assert bool((first.abs() <= 100.001).all())
        assert torch.equal(first, rewards[kind](pictures[:2], [Prompt("q", text)] * 2))
