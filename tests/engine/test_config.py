"""From the words of a command to settings; and every mistake is one sentence that says what would be right."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import yaml

from harness import cli
from harness.config import (
    ArmConfig,
    RunConfig,
    merge,
    parse_arm,
    parse_budget,
    parse_seeds,
    parse_set,
    presets,
    resolve,
)
from harness.errors import UserError
from harness.grid import Grid, build_arm, parse_reward
from harness.registry import discover, load_reward
from harness.reward_sources import parse_settings
from tests.engine.fakes import PLUGINS


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("5", (0, 1, 2, 3, 4)), ("1", (0,)), ("0,3,7", (0, 3, 7)), ("4,", (4,)), ("1000-1002", (1000, 1001, 1002))],
)
def test_seeds_are_a_count_a_list_or_a_range(text: str, seeds: tuple[int, ...]) -> None:
    """The three ways to write seeds mean what the help says."""
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "-1", "-1,2", "5-3", "", ",", "many", "1.5", "1,b"])
def test_seeds_that_mean_nothing_are_refused(text: str) -> None:
    """No run without a seed, and no negative seed: -1 is the base model's."""
    with pytest.raises(UserError, match="--seeds") as caught:
        parse_seeds(text)
    assert repr(text) in str(caught.value)


def test_an_arm_is_a_label_a_method_and_values() -> None:
    """Values are typed as in YAML, and dots nest."""
    arm = parse_arm("K=5: draft-k k=5 learning_rate=0.001 sampler.eta=0.5")
    assert arm == ArmConfig(
        label="K=5", method="draft-k", overrides={"k": 5, "learning_rate": 0.001, "sampler": {"eta": 0.5}}
    )


def test_set_reaches_methods_sections_and_the_run() -> None:
    """A first word that is a section or alone belongs to the run, any other is a method."""
    items = ["draft-k.k=5", "sampler.steps=20", "micro_batch=4", "budget.curve_points=[1, 2]"]
    assert parse_set(items) == {
        "settings": {"draft-k": {"k": 5}},
        "sampler": {"steps": 20},
        "micro_batch": 4,
        "budget": {"curve_points": [1, 2]},
    }


def test_a_budget_is_a_unit_and_an_amount() -> None:
    """As the help says."""
    assert parse_budget("denoiser_rows=5e4") == {"unit": "denoiser_rows", "amount": 50000.0}


def test_a_reward_is_a_weighted_sum() -> None:
    """Weights default to one; spaces do not matter."""
    assert parse_reward("2*emoji-3d + emoji-clip+-0.5*x") == [(2.0, "emoji-3d"), (1.0, "emoji-clip"), (-0.5, "x")]


def test_merging_lays_sections_over_sections() -> None:
    """What is not said stays; the prompts of an evaluation are replaced as a whole."""
    base = {"sampler": {"steps": 4, "eta": 0.0}, "evaluation": {"prompts": {"training": 6}, "latents": 1}}
    over = {"sampler": {"steps": 9}, "evaluation": {"prompts": {"held-out": 2}}}
    assert merge(base, over) == {
        "sampler": {"steps": 9, "eta": 0.0},
        "evaluation": {"prompts": {"held-out": 2}, "latents": 1},
    }


def test_what_is_passed_beats_the_preset_and_the_preset_beats_the_defaults() -> None:
    """Three layers, the last one wins, value by value."""
    config = resolve({"preset": "smoke", "sampler": {"guidance": 2.0}, "settings": {"draft": {"batch_size": 8}}})
    smoke = yaml.safe_load(presets()["smoke"].read_text(encoding="utf-8"))
    assert config.sampler.guidance == 2.0
    assert config.sampler.steps == smoke["sampler"]["steps"] != RunConfig().sampler.steps
    assert config.settings["draft"]["batch_size"] == 8
    assert config.settings["ddpo"] == smoke["settings"]["ddpo"]


@pytest.mark.parametrize("name", presets())
def test_presets_hold_only_what_exists(name: str) -> None:
    """Every preset resolves, describes itself, and gives valid values to methods that exist."""
    content = yaml.safe_load(presets()[name].read_text(encoding="utf-8"))
    assert content["description"].strip()
    config = resolve({"preset": name})
    assert set(config.settings) <= set(discover("methods"))
    for method in discover("methods"):
        arm = build_arm(ArmConfig(label=method, method=method), config)
        given = config.settings.get(method, {})
        own = arm.config.model_dump()
        values = {**own.get("optimizer", {}), **own}
        for key, value in given.items():
            if not isinstance(value, dict):
                assert values[key] == pytest.approx(value), f"{name}: {method}.{key}"


CLAIMS = [name for name, path in presets().items() if "findings" in yaml.safe_load(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("model", ["emoji", "path/to/pipeline"])
@pytest.mark.parametrize("name", CLAIMS)
def test_statements_speak_of_what_the_preset_runs(name: str, model: str) -> None:
    """Arms exist and are valid; on the embedded model also rewards, variants, mixtures, points and probes."""
    config = resolve({"preset": name, "model": model})
    arms = {arm.label for arm in config.all_arms() if build_arm(arm, config)}
    quantities = [q for f in config.findings for statement in f.statements for q in (*statement.plus, *statement.minus)]
    assert quantities
    assert {q.arm for q in quantities} | {q.at for q in quantities if q.at} <= arms
    assert all(load_reward(parse_settings(name)[0]).differentiable for name in config.rewards)
    if model != "emoji":
        return
    mixes = {"+".join(f"{weight:g}*{reward}" for reward, weight in mix.weights.items()) for mix in config.mixes}
    stopping = {"early-stopping"} if config.early_stopping else set()
    variants = {v.label for v in config.variants} | stopping | {"default", "own-sampler"}
    points = {f"{point:g}" for point in config.budget.curve_points} | {None}
    for q in quantities:
        assert q.trained_on in (mixes if q.variant == "mix" else {*config.rewards, None})
        assert q.variant in variants | {"mix"}
        probed = q.of.startswith("gradient")
        assert not probed or f"gradient-{'variance' if q.of.endswith('variance') else 'norms'}" in config.probes
        assert q.point in ({"start", "middle", "end"} if probed else points)
        assert q.reward is None or load_reward(parse_settings(q.reward)[0])
        assert not (q.axis and q.of == "gain") or points != {None}


def test_arms_of_a_run_have_labels_of_their_own() -> None:
    """A method's label is its name, a file's its stem; no label twice, and none that the base model has."""
    config = RunConfig(methods=("draft", "dir/mine.py:Mine"), arms=(ArmConfig(label="K", method="draft-k"),))
    assert [arm.label for arm in config.all_arms()] == ["draft", "mine", "K"]
    for arms, word in (
        ((ArmConfig(label="draft", method="ddpo"),), "draft"),
        ((ArmConfig(label="base", method="ddpo"),), "base"),
    ):
        with pytest.raises(UserError, match=f"'{word}'"):
            RunConfig(methods=("draft",), arms=arms).all_arms()


def test_a_method_that_trains_nothing_has_no_optimizer() -> None:
    """A learning rate of its own stays its own, and the settings of an optimiser that it has not are refused."""
    config = RunConfig(methods=("noise-opt",))
    arm = build_arm(ArmConfig(label="x", method="noise-opt", overrides={"learning_rate": 0.3}), config)
    assert arm.config.model_dump()["learning_rate"] == 0.3
    for method, overrides in (("noise-opt", {"optimizer": {}}), ("best-of-n", {"learning_rate": 0.1})):
        with pytest.raises(UserError, match=f"there is no setting {method}.{next(iter(overrides))}"):
            build_arm(ArmConfig(label="x", method=method, overrides=overrides), config)


@pytest.mark.parametrize("spelling", ["draft.learning_rate=0.5", "draft.optimizer.learning_rate=0.5"])
def test_a_setting_of_the_optimizer_may_stand_with_its_section_or_without(spelling: str) -> None:
    """What was passed wins over the preset, and an arm's own over both, however each spells it."""
    config = resolve({"methods": ["draft"], "preset": "quick", **parse_set([spelling])})
    arm = build_arm(ArmConfig(label="x", method="draft"), config)
    assert arm.config.model_dump()["optimizer"]["learning_rate"] == 0.5
    for overrides in ({"learning_rate": 0.25}, {"optimizer": {"learning_rate": 0.25}}):
        arm = build_arm(ArmConfig(label="x", method="draft", overrides=overrides), config)
        assert arm.config.model_dump()["optimizer"]["learning_rate"] == 0.25


def test_an_arm_may_have_a_sampler_of_its_own() -> None:
    """The arm's training sampler changes, the run's evaluation sampler does not."""
    config = resolve({"preset": "smoke", "arms": [vars(parse_arm("few: draft sampler.steps=2"))], "model": "gaussian"})
    grid = Grid(config)
    assert grid.arms["few"].sampler.steps == 2
    assert grid.config.sampler.steps == 4


def test_each_cell_has_a_name_and_hash_of_its_own() -> None:
    """Seeds are outermost, the base comes first, and any difference of training shows in the hash."""
    arms = [vars(parse_arm("K=1: draft-k k=1")), vars(parse_arm("K=2: draft-k k=2"))]
    shared = {"preset": "smoke", "model": "gaussian", "seeds": (0, 1), "rewards": [f"{PLUGINS}:Quadratic"]}
    cells = Grid(resolve({**shared, "arms": arms})).cells
    assert [(cell.arm, cell.seed) for cell in cells] == [("base", -1), ("K=1", 0), ("K=2", 0), ("K=1", 1), ("K=2", 1)]
    assert len({cell.cell for cell in cells}) == len({cell.training_hash for cell in cells}) == len(cells)


MISTAKES = {
    "--methods draft --preset smok": ("'smok'", "did you mean 'smoke'"),
    "--methods darft": ("'darft'", "did you mean 'draft'"),
    "--methods draft --rewards emoji-3": ("'emoji-3'", "did you mean 'emoji-3d'"),
    "--methods draft --suite animls": ("'animls'", "did you mean 'animals'"),
    "--methods draft --model gausian": ("'gausian'", "did you mean 'gaussian'"),
    "--methods draft --set sampler.step=3": ("sampler.step", "did you mean 'steps'"),
    "--methods draft --set draft.batchsize=3": ("draft.batchsize", "did you mean 'batch_size'"),
    "--methods draft --set draft.learning_rat=3": ("draft.learning_rat", "did you mean 'learning_rate'"),
    "--methods draft --set dratf.batch_size=3": ("'dratf'", "did you mean 'draft'"),
    "--methods draft --set micro_batc=3": ("micro_batc", "did you mean 'micro_batch'"),
    "--methods draft --set sampler.steps=0": ("sampler.steps=0", "greater than or equal to 1"),
    "--methods draft --set draft.batch_size=none": ("'none'", "integer"),
    "--methods draft --set draft.learning_rate=-1": ("learning_rate=-1", "greater than 0"),
    "--methods draft --set sampler.steps": ("'sampler.steps'", "sampler.steps=20"),
    "--methods draft --set sampler.steps=[3": ("[3", "YAML"),
    "--methods draft --set sampler=1 --set sampler.eta=1": ("sampler", "one of the two"),
    "--methods draft --set 'evaluation.prompts={held-out: 0}'": ("'held-out': 0", "at least one prompt"),
    "--methods draft --set sampler.spacing=leading --set sampler.steps=600": ("600", "at most 500"),
    "--methods draft --seeds 3-1": ("'3-1'", "(5-9)"),
    "--methods draft --seeds 1,1": ("(1, 1)", "repeat"),
    "--methods draft --budget 256": ("'256'", "queries=256"),
    "--methods draft --budget apples=3": ("'apples'", "queries"),
    "--methods draft --budget queries=-3": ("-3", "greater than 0"),
    "--methods draft --budget queries=inf": ("inf", "finite"),
    "--arm draft": ("'draft'", "'K=5: draft-k k=5'"),
    "--methods draft,draft": ("'draft'", "label"),
    "--seeds 2": ("--methods", "list methods"),
    "--methods draft --reference ddpo": ("'ddpo'", "draft"),
    "--methods draft --rewards jpeg-bytes": ("jpeg-bytes", "ddpo"),
    "--methods draft --rewards object-accuracy": ("object-accuracy", "never trained on"),
    "--methods draft --rewards 2*": ("'2*'", "2*emoji-3d"),
    "--methods draft --rewards 1.2.3*emoji-3d": ("'1.2.3*emoji-3d'", "2*emoji-3d"),
    "--methods absent.py:Mine": ("absent.py", "does not exist"),
    "--methods absent.py": ("'absent.py'", "ClassName"),
    f"--methods {PLUGINS}:Spi": ("Spi", "did you mean 'Spy'"),
    f"--methods {PLUGINS}:Quadratic": ("Quadratic", "FineTuner"),
    "--methods draft --config absent.yaml": ("absent.yaml", "cannot be read"),
    "--methods draft --device gpu": ("'gpu'", "cuda"),
    "--methods draft --device meta": ("--device meta", "take cpu"),
    "--methods draft --dtype float8": ("'float8'", "float32"),
    "--methods draft --keep-images all": ("'all'", "final"),
    "--methods draft --workers two": ("'--workers'", "integer"),
    "--method draft": ("--method", "--methods"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_sentence_with_a_remedy(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 2, one line that names the bad value and what would be right, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in words else ["--model", "gaussian"]
    monkeypatch.setattr(sys, "argv", ["harness", "run", "--dry-run", *model, *shlex.split(words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    for word in MISTAKES[words]:
        assert word in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("status nowhere", "nowhere holds no run"),
        ("report nowhere", "nowhere holds no run"),
        ("list method", "methods"),
    ],
)
def test_other_commands_explain_mistakes_too(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 2 and one line from every command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harness", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert said in stderr
