"""`python -m harness mix`: products are mixed, the error is the true one, what is exported is what was mixed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from harness import cli, store
from harness.api import Adapter, AdapterConfig, Generation, Prompt, Randomness, SamplerConfig, UserError
from harness.config import MixConfig
from harness.evaluation import noise_bank
from harness.lora_products import factor_pairs, mix_products
from harness.mixing import Mix, parse_weights, resolve_mix
from harness.report.analysis import analyse
from harness.report.mixes import mix_difference, mix_gain, mixes_table
from harness.report.records import load_mixes, load_run
from harness.sampling import generate
from models.stable_diffusion import StableDiffusion
from tests.engine.fakes import Bench, plugin_file, run_inline

SHAPES = {"down.to_q": (10, 6), "up.to_out.0": (5, 9)}  # (out, in) of linear layers
CONVOLUTION = ("conv", (7, 4, 3, 3))  # (out, in, height, width)
CHAIN = SamplerConfig(steps=4, guidance=2.0)


def adapter(seed: int, rank: int) -> dict[str, Tensor]:
    """Random factors in double precision, of two linear layers and a convolution."""
    draw = Randomness(seed).normal
    found = {}
    for module, (outputs, inputs) in SHAPES.items():
        found[f"{module}.lora_A.default.weight"] = draw((rank, inputs), module, "a", dtype=torch.float64)
        found[f"{module}.lora_B.default.weight"] = draw((outputs, rank), module, "b", dtype=torch.float64)
    module, (outputs, *kernel) = CONVOLUTION
    found[f"{module}.lora_A.default.weight"] = draw((rank, *kernel), module, "a", dtype=torch.float64)
    found[f"{module}.lora_B.default.weight"] = draw((outputs, rank, 1, 1), module, "b", dtype=torch.float64)
    return found


def products(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense B A of each module."""
    names = [name for name in parameters if ".lora_B." in name]
    return {
        name.partition(".lora_B.")[0]: parameters[name].double().flatten(1)
        @ parameters[name.replace("lora_B", "lora_A")].double().flatten(1)
        for name in names
    }


def weighted(*parts: tuple[float, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weighted sum of dense products."""
    dense = [(weight, products(parameters)) for weight, parameters in parts]
    return {module: sum((w * d[module] for w, d in dense), torch.zeros(())) for module in dense[0][1]}


# ------------------------------------------------------------------------------------------------- the linear algebra


@pytest.mark.parametrize("rank", [5, 8])
def test_at_the_exact_rank_the_product_is_the_weighted_sum_of_products(rank: int) -> None:
    """To 1e-10, also beyond the exact rank, with weights of both signs; shapes are those of an adapter of that rank."""
    parts = (0.7, adapter(1, 2)), (-1.3, adapter(2, 3))
    mixed = mix_products(parts, rank)
    assert mixed.exact_rank == 5
    assert mixed.error == mixed.worst == 0.0
    expected = weighted(*parts)
    for module, product in products(mixed.parameters).items():
        torch.testing.assert_close(product, expected[module], rtol=0, atol=1e-10)
    assert {n: p.shape for n, p in mixed.parameters.items()} == {n: p.shape for n, p in adapter(0, rank).items()}


def test_mixing_factors_instead_would_be_something_else() -> None:
    """(sum w B)(sum w A) has cross terms: it is far from the sum of products."""
    first, second = adapter(1, 2), adapter(2, 2)
    factors = {name: 0.5 * first[name] + 0.5 * second[name] for name in first}
    expected = weighted((0.5, first), (0.5, second))
    exact = products(mix_products([(0.5, first), (0.5, second)], 4).parameters)
    for module, product in products(factors).items():
        assert (product - expected[module]).norm() > 0.5 * expected[module].norm()
        assert (exact[module] - expected[module]).norm() < 1e-10 * expected[module].norm()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_is_the_true_one_and_the_smallest_possible(rank: int) -> None:
    """Against the dense matrix: it is the distance to the exported product, and no matrix of the rank is nearer."""
    parts = (0.5, adapter(1, 2)), (2.0, adapter(2, 3))
    mixed = mix_products(parts, rank)
    dense, exported = weighted(*parts), products(mixed.parameters)
    distances, norms, tails = {}, {}, {}
    for module, matrix in dense.items():
        distances[module] = float((matrix - exported[module]).norm())
        norms[module] = float(matrix.norm())
        tails[module] = float(torch.linalg.svdvals(matrix)[rank:].norm())
        assert torch.linalg.matrix_rank(exported[module]) == rank
    assert distances == pytest.approx(tails, rel=1e-10)
    total = (sum(d**2 for d in distances.values()) / sum(n**2 for n in norms.values())) ** 0.5
    assert mixed.error == pytest.approx(total, rel=1e-10)
    relative = {module: distances[module] / norms[module] for module in dense}
    assert mixed.worst == pytest.approx(max(relative.values()), rel=1e-10)
    assert relative[mixed.worst_module] == max(relative.values())


def test_the_order_of_parameters_changes_no_bit() -> None:
    """Files of adapters are read in no particular order."""
    parts = [(0.5, adapter(1, 2)), (2.0, adapter(2, 3))]
    turned = [(weight, dict(reversed(parameters.items()))) for weight, parameters in parts]
    first, second = mix_products(parts, 2), mix_products(turned, 2)
    assert (first.error, first.worst, first.worst_module) == (second.error, second.worst, second.worst_module)
    assert list(first.parameters) == list(second.parameters)
    assert all(torch.equal(p, second.parameters[name]) for name, p in first.parameters.items())


def test_adapters_that_do_nothing() -> None:
    """Of B = 0, as adapters start, and of weight 0: no division by a norm of zero."""
    zero = {name: p * (0.0 if ".lora_B." in name else 1.0) for name, p in adapter(1, 2).items()}
    for parts in ([(1.0, zero)], [(0.0, adapter(1, 2)), (0.0, adapter(2, 2))]):
        mixed = mix_products(parts, 1)
        assert mixed.error == mixed.worst == 0.0
        assert not any(product.any() for product in products(mixed.parameters).values())


def test_an_adapter_of_another_kind_is_refused() -> None:
    """An affine term has no product B A."""
    for names in (["bias", "gain"], ["to_q.lora_A.weight"], ["to_q.lora_A.w", "to_q.lora_B.w", "bias"], []):
        with pytest.raises(UserError, match="no LoRA"):
            factor_pairs(names)


# ---------------------------------------------------------------------------------------------------- what was asked


def test_words() -> None:
    """Weights in their order, names with `=`-free text before the last sign, and labels that tell mixes apart."""
    assert list(parse_weights(" b=0.5, a=-2e-1,2*a+1*b=1").items()) == [("b", 0.5), ("a", -0.2), ("2*a+1*b", 1.0)]
    for text in ("a", "a=", "=1", "a=1,", "a=x", "", "a=1,a=2"):
        with pytest.raises(UserError, match="--weights"):
            parse_weights(text)
    assert Mix("x", {"a": 0.5, "2*a+1*b": 1}, 4).label == "0.5*a+1*(2*a+1*b)"
    slugs = [Mix("x", {"a": w}, r).slug for w, r in ((1 / 3, 4), (0.333333, 4), (1 / 3, 8), (-1 / 3, 4))]
    assert len(set(slugs)) == 4
    assert slugs[1] == "x--0.333333*a--rank4"


def test_what_cannot_be_mixed_is_refused_with_what_can() -> None:
    """Unknown arms and rewards, arms that train nothing, no weights, weights that are no numbers."""
    arms = [{"label": "draft", "kind": "training"}, {"label": "best-of-n", "kind": "inference"}]
    plan = {"arms": arms, "training_rewards": ["a", "b"], "config": {"adapter": {"rank": 4}}}
    assert resolve_mix(MixConfig(arm="draft", weights={"b": 1.0}), plan) == Mix("draft", {"b": 1.0}, 4)
    for arm, weights, said in (
        ("drat", {"a": 1.0}, "did you mean 'draft'"),
        ("best-of-n", {"a": 1.0}, "trains no adapter"),
        ("draft", {"c": 1.0}, "did not train on 'c'; .*Known: a, b"),
        ("draft", {}, "trained on a, b"),
        ("draft", {"a": float("nan")}, "finite"),
    ):
        with pytest.raises(UserError, match=said):
            resolve_mix(MixConfig(arm=arm, weights=weights), plan)


# -------------------------------------------------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pipeline_directory: Path) -> Bench:
    """A run of draft-k on two rewards with two seeds, of a tiny pipeline; the adapters have alpha = 3 rank."""
    folder = tmp_path_factory.mktemp("made")
    bench = Bench(folder, plugin_file(folder / "plugins"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.benchmark.run_cells", run_inline)
        patch.setattr("harness.report.build.build_report", lambda run_dir, out=None: run_dir)
        bench.run(**changes(bench, pipeline_directory))
    return bench


@pytest.fixture
def run(made: Bench, bench: Bench) -> Path:
    """A copy of it in the test's own bench."""
    bench.plugins = made.plugins
    return Path(shutil.copytree(made.folder / "run", bench.folder / "run"))


def changes(bench: Bench, pipeline: Path) -> dict[str, Any]:
    """What the runs of these tests have."""
    return {
        "model": str(pipeline),
        "methods": ["draft-k"],
        "rewards": [bench.reward("Quadratic"), bench.reward("Brightness")],
        "seeds": [0, 1],
        "adapter": {"rank": 2, "alpha": 6.0},
        "settings": {"draft-k": {"k": 1, "batch_size": 2, "learning_rate": 0.05}},
        "budget": {"amount": 6, "curve_points": []},
    }


@pytest.fixture
def mix(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command with these words; its exit code."""

    def command(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["harness", "mix", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return command


def parameters(folder: Path) -> dict[str, Tensor]:
    """What a cell or a mix stores beside its exported adapter."""
    found: dict[str, Tensor] = load_file(folder / "adapter" / "parameters.safetensors")
    return found


def cell(run: Path, reward: str, seed: int) -> Path:
    """Directory of a cell by the last word of its reward."""
    return next(path for path in (run / "cells").iterdir() if reward in path.name and path.name.endswith(f"seed{seed}"))


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Stored pictures by name."""
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in (folder / "images" / "final").iterdir()}


def adapted(pipeline: Path, values: Mapping[str, Tensor], alpha: float | None = None) -> StableDiffusion:
    """The tiny pipeline in double precision with these factors."""
    model = StableDiffusion(str(pipeline), torch.device("cpu"), torch.float64)
    rank = next(len(p) for name, p in values.items() if ".lora_A." in name)
    model.add_adapter(AdapterConfig(rank=rank, alpha=alpha), Randomness(0))
    for name, parameter in model.adapter_parameters().items():
        parameter.data = values[name].double()
    return model


def latents(model: StableDiffusion, scale: float) -> Tensor:
    """Of two pictures."""
    batch = [noise_bank(model, Prompt(f"p{i}", text), 0) for i, text in enumerate(("cat", "a dog"))]
    return generate(model, batch, Generation(CHAIN, lora_scale=scale))


def test_one_adapter_with_weight_one_is_that_adapter(
    run: Path, bench: Bench, mix: Callable[..., int], pipeline_directory: Path
) -> None:
    """Its pictures are the cell's own, and so are its scores and what was spent on it; its latents to rounding."""
    reward = bench.reward("Brightness")
    assert mix(run, "--weights", f"{reward}=1", "--device", "cpu") == 0
    (directory,) = (run / "mixes").iterdir()
    for seed in (0, 1):
        own, mixed = cell(run, "Brightness", seed), directory / f"seed{seed}"
        expected = pictures(own)
        assert 0 < len(pictures(mixed)) < len(expected)  # those of held-out prompts
        base = pictures(run / "cells" / "base")
        for name, picture in pictures(mixed).items():
            assert abs(picture - expected[name]).max() <= 1  # a value beside a half may be rounded to the other side
            assert abs(picture - base[name]).max() > 1
        ours = adapted(pipeline_directory, parameters(mixed))
        theirs = adapted(pipeline_directory, parameters(own), alpha=6.0)
        torch.testing.assert_close(latents(ours, 1.0), latents(theirs, 1.0), rtol=0, atol=1e-5)
    keys = ["seed", "split", "prompt_id", "noise_id", "reward"]
    mixed_scores = pd.read_parquet(directory / "scores.parquet")
    assert list(mixed_scores) == list(store.SCORE_COLUMNS)
    assert set(mixed_scores["variant"]) == {"mix"}
    assert set(mixed_scores["training_reward"]) == {f"1*{reward}"}
    own_scores = pd.concat(pd.read_parquet(cell(run, "Brightness", seed) / "scores.parquet") for seed in (0, 1))
    both = mixed_scores.merge(own_scores, on=keys, suffixes=("", " own"), validate="one_to_one")
    assert len(both) == len(mixed_scores) == (own_scores["split"] == "held-out").sum()
    quality = both["reward"].str.endswith((":Quadratic", ":Brightness"))
    assert quality.sum() == 24  # two rewards, two seeds, three prompts, two latents
    np.testing.assert_allclose(both[quality]["score"], both[quality]["score own"], atol=1e-3)
    for column in ("iteration", "queries", "denoiser_rows", "train_seconds", "arm", "method", "prompt", "point"):
        assert both[column].tolist() == both[f"{column} own"].tolist(), column


def test_half_an_adapter_is_the_adapter_at_half_strength(
    run: Path, bench: Bench, mix: Callable[..., int], pipeline_directory: Path
) -> None:
    """A single weight is a LoRA scale; at the adapter's own rank nothing is left out."""
    assert mix(run, "--weights", f"{bench.reward('Quadratic')}=0.5", "--device", "cpu") == 0
    (directory,) = (run / "mixes").iterdir()
    ours = adapted(pipeline_directory, parameters(directory / "seed1"))
    theirs = adapted(pipeline_directory, parameters(cell(run, "Quadratic", 1)), alpha=6.0)
    half = latents(theirs, 0.5)
    torch.testing.assert_close(latents(ours, 1.0), half, rtol=0, atol=1e-5)
    assert (latents(theirs, 1.0) - half).abs().max() > 1e-3
    record = store.read_json(directory / "mix.json")
    assert (record["rank"], record["exact_rank"]) == (2, 2)
    assert {error["all"] for error in record["error"].values()} == {0.0}


def test_a_mix_of_two_is_exported_for_diffusers(
    run: Path, bench: Bench, mix: Callable[..., int], pipeline_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`load_lora_weights` gives the denoiser's output of the mix, whose product is the weighted sum of the cells'."""
    weights = f"{bench.reward('Quadratic')}=0.5,{bench.reward('Brightness')}=-0.25"
    assert mix(run, "--weights", weights, "--rank", 4, "--device", "cpu") == 0
    shown = capsys.readouterr().out
    (directory,) = (run / "mixes").iterdir()
    assert str(directory) in shown
    assert "seed 1: rank 4 of at most 4, error 0\n" in shown
    record = store.read_json(directory / "mix.json")
    assert record["seeds"] == [0, 1]
    assert record["left_out"] == {}
    assert all((directory / file).is_file() for file in record["files"])
    mixed = directory / "seed0"
    expected = weighted(  # alpha/rank is 3
        (1.5, parameters(cell(run, "Quadratic", 0))), (-0.75, parameters(cell(run, "Brightness", 0)))
    )
    for module, product in products(parameters(mixed)).items():
        torch.testing.assert_close(product, expected[module], rtol=0, atol=1e-6)
        assert expected[module].abs().max() > 1e-3
    model = adapted(pipeline_directory, parameters(mixed))
    x = Randomness(0).normal((2, 4, 8, 8), "x", dtype=torch.float64)
    condition = model.condition(["cat", "a dog"])
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_directory, torch_dtype=torch.float64)
    pipeline.load_lora_weights(str(mixed / "adapter"))
    with torch.no_grad():
        ours, base = (model.denoise(x, 500, condition, Adapter(scale=scale)) for scale in (1.0, 0.0))
        theirs = pipeline.unet(x, 500, **condition.tensors).sample
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert (ours - base).abs().max() > 1e-3
    spent = pd.read_parquet(directory / "scores.parquet").query("seed == 0").iloc[0]
    status = [store.read_json(cell(run, name, 0) / "status.json") for name in ("Quadratic", "Brightness")]
    assert spent["queries"] == sum(s["cost"]["queries"] for s in status) == 12
    assert spent["iteration"] == sum(s["iterations"] for s in status) == 6


def test_only_what_is_missing_is_made(
    run: Path, bench: Bench, mix: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again does nothing, or adds the seeds whose cells are there by now; weights have no order."""
    first, second = bench.reward("Quadratic"), bench.reward("Brightness")
    status = cell(run, "Brightness", 1) / "status.json"
    completed = store.read_json(status)
    store.write_json(status, {**completed, "state": "diverged"})
    command = (run, "--weights", f"{first}=0.5,{second}=0.5", "--device", "cpu")
    assert mix(*command) == 0
    assert f"seed 1 is left out: {status.parent.name} is diverged" in capsys.readouterr().out
    (directory,) = (run / "mixes").iterdir()
    before = pd.read_parquet(directory / "scores.parquet")
    assert set(before["seed"]) == {0}
    assert store.read_json(directory / "mix.json")["left_out"] == {"1": f"{status.parent.name} is diverged"}
    files = contents(run)
    assert mix(*command) == 0
    assert "is there: nothing to do" in capsys.readouterr().out
    assert contents(run) == files
    store.write_json(status, completed)
    assert mix(run, "--weights", f"{second}=0.5,{first}=0.5", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "seed 1: rank 2 of at most 4" in shown
    assert "seed 0: rank" not in shown
    assert [path.name for path in (run / "mixes").iterdir()] == [directory.name]
    record = store.read_json(directory / "mix.json")
    assert (record["seeds"], record["left_out"], list(record["error"])) == ([0, 1], {}, ["0", "1"])
    after = pd.read_parquet(directory / "scores.parquet")
    pd.testing.assert_frame_equal(after[after["seed"] == 0].reset_index(drop=True), before)
    assert set(after["seed"]) == {0, 1}
    kept = directory / "seed0"
    assert contents(kept) == {path: content for path, content in files.items() if kept in path.parents}


def contents(folder: Path) -> dict[Path, bytes]:
    """All files but the lock, which names the process that had it last."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_mistakes_are_one_line(
    run: Path, bench: Bench, mix: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 2 and what would be right; nothing is written."""
    quadratic = bench.reward("Quadratic")
    for words, said in (
        ((run, "--weights", "emoji-3d=1"), "did not train on 'emoji-3d'"),
        ((run, "--weights", f"{quadratic}=1", "--arm", "draft"), "did you mean 'draft-k'"),
        ((run, "--weights", quadratic), "is not understood"),
        ((tmp_path, "--weights", f"{quadratic}=1"), "holds no run"),
    ):
        assert mix(*words) == 2
        assert said in capsys.readouterr().err
    with store.lock(run):
        assert mix(run, "--weights", f"{quadratic}=1", "--device", "cpu") == 2
    assert "another process" in capsys.readouterr().err
    for seed in (0, 1):
        store.write_json(cell(run, "Quadratic", seed) / "status.json", {"state": "crashed"})
    assert mix(run, "--weights", f"{quadratic}=1", "--device", "cpu") == 2
    assert "seed1 is crashed" in capsys.readouterr().err
    assert not (run / "mixes").exists()


def test_a_model_without_lora_is_refused(
    bench: Bench, mix: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, and before a run that asks for a mix spends anything."""
    gaussian = bench.run(methods=["draft"])
    assert mix(gaussian, "--weights", f"{bench.reward('Quadratic')}=1", "--device", "cpu") == 2
    assert "is no LoRA (its parameters are bias, gain)" in capsys.readouterr().err
    assert not (gaussian / "mixes").exists()
    mixes = [{"arm": "draft", "weights": {bench.reward("Quadratic"): 1.0}}]
    with pytest.raises(UserError, match="no LoRA"):
        bench.run("other", methods=["draft"], mixes=mixes)
    with pytest.raises(UserError, match="did not train on"):
        bench.run("other", methods=["draft"], mixes=[{"arm": "draft", "weights": {"emoji-3d": 1.0}}])
    assert not (bench.folder / "other" / "cells").exists()


def test_a_run_makes_its_mixes_and_the_report_reads_them(run: Path, bench: Bench, pipeline_directory: Path) -> None:
    """A configured mix is there after the run, and alone is made; its gains are differences on identical pairs."""
    quadratic, brightness = bench.reward("Quadratic"), bench.reward("Brightness")
    wanted = [{"arm": "draft-k", "weights": {quadratic: 0.5, brightness: 0.5}, "rank": 1}]
    bench.run(**changes(bench, pipeline_directory), mixes=wanted)
    assert bench.ran == []
    assert '"event": "mix"' in (run / "log.jsonl").read_text(encoding="utf-8")
    scores, (mix,) = load_mixes(run)
    assert mix["rank"] == 1
    assert all(0 < error["all"] <= error["worst"] < 1 for error in mix["error"].values())
    base = pd.read_parquet(run / "cells" / "base" / "scores.parquet")
    analysis = analyse(load_run(run))
    for reward in (quadratic, brightness):
        before = base[(base["reward"] == reward) & (base["split"] == "held-out")]["score"].mean()
        expected = {
            seed: scores[(scores["reward"] == reward) & (scores["seed"] == seed)]["score"].mean() - before
            for seed in (0, 1)
        }
        found = mix_difference(analysis.gains, scores, mix, reward)
        assert found == pytest.approx(expected, abs=1e-9)
        sd = analysis.gains.sd(reward)
        assert mix_gain(analysis.gains, scores, mix, reward) == pytest.approx({s: v / sd for s, v in found.items()})
    table = mixes_table(analysis, scores, [mix])
    assert len(table.rows) == len(analysis.rewards) == len(table.data)
    row = table.data[table.data["reward"] == quadratic].iloc[0]
    assert row["mix"] == f"0.5*{quadratic}+0.5*{brightness}"
    assert row["seeds"] == 2
    own = analysis.final("draft-k", brightness, quadratic).standardised.mean()
    assert row[f"{brightness} alone"] == pytest.approx(own)
    assert mixes_table(analysis, *load_mixes(run / "cells")).rows == ()
