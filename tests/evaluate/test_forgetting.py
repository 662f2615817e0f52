"""A budget of general loss: where a run ends, what it exports, how it resumes; the curves and what they suggest."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

import launch
from fastft import config as configuration
from fastft import track
from fastft.errors import UserError
from fastft.evaluate.forgetting import curves, suggest, write
from fastft.tasks.base import Metric
from fastft.train import checkpoint, loop
from fastft.train.observers._standard import Best
from fastft.train.observers.base import Save, Stop
from fastft.train.observers.forgetting import Forgetting, ForgettingSettings


def both(domain, general):
    return {"domain": {"loss": domain}, "general": {"loss": general}}


def watching(budget, best_by="domain.loss"):
    """The observer and the one that knows the best, as a run has them."""
    task = SimpleNamespace(metric=lambda name, key: Metric("loss", lower_is_better=True))
    config = SimpleNamespace(checkpoint=SimpleNamespace(best_by=best_by))
    observers = {}
    log = SimpleNamespace(warn=lambda text: said.append(text))
    said = []
    view = SimpleNamespace(job=SimpleNamespace(task=task, config=config), observers=observers, log=log, said=said)
    observers["best"] = Best(None, view)
    observers["forgetting"] = Forgetting(ForgettingSettings(budget=budget), view)
    return observers["forgetting"], observers["best"], said


@pytest.mark.parametrize(
    "budget, values, stop, saved",
    [
        (0.1, [(3, 2.05), (2, 2.09), (2.5, 1.9), (1, 2.2)], 4, [1, 2]),  # the best domain loss is beyond the budget
        (0.1, [(3, 2.05), (1, math.nan)], 2, [1]),
        (0.0, [(3, 2.0), (2, 1.9), (1, 2.01)], 3, [1, 2]),
        (None, [(3, 5), (2, 9)], None, []),
        (9.0, [(3, 5), (3, 6), (2, 9)], None, [1, 3]),
    ],
)
def test_when_it_stops_and_what_is_the_best(budget, values, stop, saved):
    watch, best, said = watching(budget)
    watch.at_start(both(4, 2))
    saves, stopped = [], None
    for step, losses in enumerate(values, 1):
        best.after_evaluation(step, both(*losses))
        actions = watch.after_evaluation(step, both(*losses))
        if budget is not None and best.saved(step):
            saves.append(step)
            assert Save() in actions
        stopped = stopped or (step if any(isinstance(a, Stop) for a in actions) else None)
        again, _, _ = watching(budget)
        again.load_state(watch.state())
        watch = again
        best.view.observers["forgetting"] = again
    assert (stopped, saves) == (stop, saved) and not said
    assert watch.exports_best == (budget is not None)


def test_nothing_within_the_budget_is_told():
    watch, best, said = watching(0.1)
    watch.at_start(both(4, 2))
    best.after_evaluation(1, both(3, 2.5))
    assert isinstance(watch.after_evaluation(1, both(3, 2.5))[0], Stop) and not best.saved(1)
    assert "no evaluation was within" in said[0]


def test_a_run_that_was_begun_without_it_cannot_go_on_with_it():
    watch, best, _ = watching(0.1)
    watch.load_state({"sets": {"domain": "other", "general": "general"}, "start": 1.0, "best": None, "latest": {}})
    with pytest.raises(UserError, match="this run was begun without it, or with other sets"):
        best.after_evaluation(1, both(3, 2.5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus, tiny_llama):
    """Three runs: with a budget; without replay and with much, to the same step."""
    folder = tmp_path_factory.mktemp("runs")
    digits = [" ".join(str((i * 7919 + j * j * 31) % 9973) for j in range(40)) for i in range(60)]
    for name, rows in (("general", digits[:50]), ("held_out", digits[50:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = {
        "task": "causal_lm",
        "model": {"path": str(tiny_llama)},
        "data": {
            "train": str(corpus / "train.jsonl"),
            "eval": {"domain": str(corpus / "eval.jsonl"), "general": str(folder / "held_out.jsonl")},
            "max_length": 64,
            "truncation": "split",
            "cache": str(folder / "cache"),
        },
        "batch": {"size": 8},
        "optim": {"lr": 3e-3},
        "train": {"steps": 12, "eval_every": 3, "forgetting": {"budget": 0.05}},
        "run": {"offline": True, "device": "cpu", "threads": 1},
    }
    sources = [{"path": str(corpus / "train.jsonl"), "weight": 1}, {"path": str(folder / "general.jsonl"), "weight": 0}]
    for name in ("budget", "none", "half"):
        config["run"]["dir"] = str(folder / name)
        loop.train(configuration.validate(config))
        config["train"]["forgetting"] = True
        sources[1]["weight"] = 1 if name == "none" else 0
        config["data"]["train"] = sources
        config["data"]["cache"] = str(folder / "mixed")
    return folder


def test_a_run_ends_at_its_budget_and_exports_the_best_within(runs):
    records = track.read(runs / "budget")
    evals = [r for r in records if r["kind"] == "eval"]
    general = {r["step"]: r["loss"] for r in evals if r["set"] == "general"}
    end = records[-1]
    assert min(general) == 0 and "general.loss rose by" in end["stopped"]
    assert general[end["step"]] - general[0] > 0.05, "this evaluation ended it"
    within = [step for step in general if step and general[step] - general[0] <= 0.05]
    if not within:
        pytest.fail(f"the run is of no use for this test: {general}")
    domain = {r["step"]: r["loss"] for r in evals if r["set"] == "domain"}
    best = min(within, key=domain.get)
    assert end["exported_step"] == best != end["step"] and end["eval"]["domain"]["loss"] == domain[best]
    assert end["forgetting"]["general_rise"] == pytest.approx(general[end["step"]] - general[0])
    path, manifest, _ = checkpoint.find(runs / "budget" / "checkpoints", best)
    stored = dict(checkpoint.stored(path, manifest).weights())
    exported = load_file(runs / "budget" / "model" / "model.safetensors")
    assert all(stored[name].equal(tensor) for name, tensor in exported.items())


def test_the_curves_and_the_weight_that_they_suggest(runs, tmp_path):
    pytest.importorskip("matplotlib")
    folders = [runs / "none", runs / "half"]
    _, said = launch.fastft("forgetting", *folders, "--out", tmp_path / "out", "--json", "--budget", 0.1)
    found = json.loads(said[said.index("{") :])
    for name, points in found["runs"].items():
        losses = [r for r in track.read(runs / name) if r["kind"] == "eval" and r["set"] == "domain"]
        assert [p["step"] for p in points] == [0, 3, 6, 9, 12] == [r["step"] for r in losses]
        assert [p["domain_perplexity"] for p in points] == [r["perplexity"] for r in losses]
        assert points[0]["domain_gain"] == points[0]["general_rise"] == 0
    rises = {name: points[-1]["general_rise"] for name, points in found["runs"].items()}
    assert rises["none"] > 0.1 > rises["half"]
    share = (rises["none"] - 0.1) / (rises["none"] - rises["half"])
    assert found["suggestion"]["weight"] == pytest.approx(0.5 * share) and found["suggestion"]["step"] == 12
    every = [point for points in found["runs"].values() for point in points]
    assert json.loads((tmp_path / "out" / "forgetting.json").read_text())["points"] == every
    rows = (tmp_path / "out" / "forgetting.csv").read_text().splitlines()
    assert len(rows) == 11 and rows[0].startswith("run,step,domain_loss")
    for name in ("forgetting.png", "pareto.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    front = [p for p in every if p["pareto"]]
    better = [(p, q) for p in front for q in every if q["domain_gain"] > p["domain_gain"]]
    assert front and all(q["general_rise"] > p["general_rise"] for p, q in better)


def test_runs_of_other_texts_or_tokens_are_not_compared(runs, tmp_path, caplog):
    """By what they recorded; and a loss that is no number is JSON."""
    for name in ("none", "other", "old"):
        shutil.copytree(runs / "none", tmp_path / name)
    for name, keep in (("other", True), ("old", False)):
        path = tmp_path / name / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if record["kind"] == "run":
                keys = record.pop("eval_keys")
                record |= {"eval_keys": {**keys, "general": "0" * 32}} if keep else {}
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace("held_out.jsonl", "held_in.jsonl"))
    said = r"none and .*other: their general sets are not the same: data\.eval\.general .*held_out\.jsonl and .*held_in"
    with pytest.raises(UserError, match=said):
        curves([tmp_path / "none", tmp_path / "other"], None, None)
    found = curves([tmp_path / "none", tmp_path / "old"], None, None)
    assert "old: does not say what its domain set was" in caplog.text
    path = tmp_path / "old" / "metrics.jsonl"
    text = path.read_text().splitlines()
    lines = [
        line.replace('"loss": ', '"loss": null, "was": ') if '"eval"' in line and '"step": 12' in line else line
        for line in text
    ]
    path.write_text("\n".join(lines) + "\n")
    found = curves([tmp_path / "old"], None, None)
    assert math.isnan(found["old"][-1].general_loss) and not found["old"][-1].pareto
    write(found, tmp_path / "out", None, False)

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    points = json.loads((tmp_path / "out" / "forgetting.json").read_text(), parse_constant=no_constant)["points"]
    assert points[-1]["general_perplexity"] is None and points[-2]["general_loss"] > 0


def test_what_cannot_be_drawn_or_suggested(runs, tmp_path, monkeypatch):
    folders = [runs / "none", runs / "half"]
    found = curves(folders, None, None)
    with pytest.raises(UserError, match="every of the weights tried keeps it"):
        suggest(folders, found, "general", 99)
    with pytest.raises(UserError, match="none of the weights tried keeps it"):
        suggest(folders, found, "general", -99)
    with pytest.raises(UserError, match=r"has no source 'wiki' but train, general"):
        suggest(folders, found, "wiki", 0.1)
    with pytest.raises(UserError, match=r"have one weight of 'general'"):
        suggest(folders[:1], curves(folders[:1], None, None), "general", 0.1)
    with pytest.raises(UserError, match=r"has no evaluation set 'genral'; data.eval has domain, general"):
        curves(folders, None, "genral")
    with pytest.raises(UserError, match="the same run twice"):
        curves([runs / "none", runs / "none"], None, None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        write(found, tmp_path / "out", None, pictures=True)
    assert not (tmp_path / "out").exists()
    write(found, tmp_path / "out", None, pictures=False)
    lines = (runs / "half" / "metrics.jsonl").read_text().splitlines()
    (runs / "half" / "metrics.jsonl").write_text("".join(f"{x}\n" for x in lines if '"step": 0' not in x))
    with pytest.raises(UserError, match="was not evaluated on domain and general before its first step"):
        curves(folders, None, None)


def test_what_a_configuration_may_not_say(lm_config):
    lm_config["train"]["forgetting"] = {"budget": 0.1}
    with pytest.raises(UserError, match=r"train.forgetting needs train.eval_every"):
        configuration.validate(lm_config)
    lm_config["train"]["eval_every"] = 2
    with pytest.raises(UserError, match=r"train.forgetting.domain: domain.loss is not measured"):
        loop.train(configuration.validate(lm_config))
    lm_config["checkpoint"] = {"best_by": "eval.loss"}
    with pytest.raises(UserError, match=r"checkpoint.best_by: eval.loss contradicts forgetting"):
        configuration.validate(lm_config)
