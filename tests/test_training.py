"""How methods that learn by gradient are trained: steps, losses, what is not finite, which weights are kept."""

import json
import math
import re
import shutil

import lightning as L
import numpy as np
import pytest
import torch
from bench import learning
from kinds import over
from PIL import Image
from sklearn.metrics import roc_auc_score

from zoo import checkpoint
from zoo.callbacks import Finite, KeepBest, Losses, MaxSteps, NotFinite
from zoo.cards import render_card
from zoo.cli import main
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.halves import halves, kind_of
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.hub import from_pretrained, model_place, unfinished_place
from zoo.methods import create_model, list_methods, presets, signature
from zoo.nn.seed import seeded
from zoo.run import RunOptions, plan_training

GRADIENT = [m for m in list_methods() if "trainer" in presets(m, "lite")]
DATA = "synthetic:train=60,good=9,defect=14,size=64"


def trainer_of(epochs, *callbacks):
    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(method, max_steps=4, data=DATA, name=None, arguments=None, lines=None, **options):
    run = RunOptions(say=(lines if lines is not None else []).append, precision=options.pop("precision", "32-true"))
    return fit(
        method,
        data,
        name,
        "lite",
        {"input_size": 64} | (arguments or {}),
        {"batch_size": 10},
        {"max_steps": max_steps} | options,
        run,
    )


@over("stfpm", "fanogan", "supersimplenet", among=GRADIENT)
def test_steps_are_counted_said_and_recorded(method):
    lines = []
    model, record = train(method, 6, lines=lines)  # 40 images: 4 batches an epoch
    training = record["training"]
    assert training["steps"] == 6 and training["epochs"] == 1.5 and training["images_a_step"] == 10
    assert record["configuration"]["trainer"] == {"max_epochs": None, "max_steps": 6, "accumulate": 1, "select": "last"}
    assert [entry["step"] for entry in training["losses"]] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for entry in training["losses"] for value in entry.values())
    for entry in training["losses"]:  # each phase has parts of its own
        parts = [name for name in entry if name.startswith("loss_")]
        assert sum(entry[name] for name in parts) == pytest.approx(entry["loss"], rel=1e-4, abs=1e-5)
    told = [line for line in lines if line.startswith("Step ")]
    phase = model.phases[model.phase_at(2)] + " " if model.phases else ""
    assert len(told) == 6 and told[2].startswith(f"Step 3 of 6: {phase}loss ")
    assert "steps/s" in told[2] and "left" in told[2]
    assert all(name.removeprefix("loss_") in told[0] for name in training["losses"][0] if name.startswith("loss_"))


def test_epochs_and_steps_of_preset_and_caller():
    assert plan_training("stfpm", "paper224", {}).max_epochs == 100
    asked = plan_training("stfpm", "paper224", {"max_steps": 7})
    assert (asked.max_steps, asked.max_epochs) == (7, None)
    asked = plan_training("stfpm", "lite", {"max_epochs": 2, "max_steps": None})
    assert (asked.max_steps, asked.max_epochs) == (None, 2)
    _, record = train("stfpm", None, max_epochs=2)
    assert record["training"]["steps"] == 8 and record["training"]["epochs"] == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["padim", "--max-steps", "3"], "padim learns in one pass.*--max-steps"),
        (["stfpm", "--max-steps", "0"], "at least 1"),
        (["stfpm", "--select", "best"], "--select is one of last, normal, image_auroc"),
    ],
)
def test_mistakes_get_a_sentence(options, match, capsys):
    assert main(["fit", *options, "--data", DATA, "--name", "x", "--preset", "lite"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(match, error)


class Poison(L.Callback):
    """Makes a parameter's gradient, or the input, infinite from a step on."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, module, batch, index):
        if module.steps_taken == self.step and self.what == "loss":
            batch.image.fill_(float("nan"))

    def on_after_backward(self, trainer, module):
        if module.steps_taken == self.step and self.what == "gradient":
            next(p for p in module.learned_parameters() if p.grad is not None).grad.fill_(float("inf"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@over("stfpm", "ganomaly", among=GRADIENT)
def test_what_is_not_finite_stops_the_fit_and_the_state_before_it_is_kept(method, what, tmp_path):
    def go(steps, *callbacks):
        model = create_model(method, "lite", input_size=64)
        data = AnomalyDataModule(load_data(DATA), input_size=(64, 64), batch_size=10)
        options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[MaxSteps(steps), Finite(4), *callbacks], **options
        )
        try:
            trainer.fit(model, datamodule=data)
        except NotFinite as error:
            return model, error
        return model, None

    after, error = go(4, Poison(2, what))
    assert "step 3" in str(error) and "lower --" in str(error) and what in str(error)
    assert error.step in (1, 2)  # of two tenths that were whole, the second may have the higher loss
    before, none = go(error.step)
    assert none is None
    for (name, a), (_, b) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("what", "at", "steps", "found"),
    [("loss", 3, 40, 10), ("gradient", 3, 40, 10), ("gradient", 13, 14, 14), ("loss", 25, 40, 30)],
)
def test_it_is_found_in_the_next_tenth_step_or_at_the_end(what, at, steps, found):
    """The step is named in which it came about; the state is that of the last tenth of the fit, here the first one."""
    model, taken = create_model("stfpm", "lite", input_size=64), []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            taken.append(module.steps_taken)

    data = AnomalyDataModule(load_data(DATA), input_size=(64, 64), batch_size=10)
    watches = [Count(), MaxSteps(steps), Finite(400), Poison(at, what)]
    with pytest.raises(NotFinite, match=f"The {what} is not finite at step {at + 1}; ") as caught:
        trainer_of(20, *watches).fit(model, datamodule=data)
    assert caught.value.step == 0 and taken[-1] == found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_finite_is_in_no_checkpoint(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.steps_taken == 5:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    model = create_model("stfpm", "lite", input_size=64)
    data = AnomalyDataModule(load_data(DATA), input_size=(64, 64), batch_size=10)
    with pytest.raises(NotFinite, match="step 4"):
        trainer_of(20, Finite(400), Poison(3, "loss"), Save()).fit(model, datamodule=data)
    assert not (tmp_path / "x.ckpt").exists()


def test_a_fit_that_diverges_leaves_a_model_to_look_at(capsys):
    """A real one: a learning rate of 1e30."""
    arguments = ["--preset", "lite", "--input-size", "64", "--lr", "1e30", "--max-steps", "50"]
    assert main(["fit", "stfpm", "--data", DATA, "--name", "wild", *arguments]) == 2
    error = capsys.readouterr().err
    kept = unfinished_place("wild").with_name("last-good")
    assert str(kept) in error and "lower --lr" in error and error.count("\n") == 1
    model = from_pretrained(kept)
    assert all(p.isfinite().all() for p in model.parameters()) and not model_place("wild").exists()
    assert "of step 0 is kept" in error  # the first step has ruined the weights, though its loss was finite
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    assert math.isfinite(model.predict(noise).score) and float(max(p.abs().max() for p in model.parameters())) < 100


def test_where_the_best_is_kept_it_survives_what_is_not_finite():
    model = create_model("stfpm", "lite", input_size=64)
    data = AnomalyDataModule(load_data(DATA), input_size=(64, 64), batch_size=10)
    keeper = KeepBest("normal", data.holdout_dataloader, 1, lambda line: None)
    with pytest.raises(NotFinite) as caught:
        trainer_of(2, keeper, Finite(8), Poison(6, "loss")).fit(model, datamodule=data)
    assert keeper.step > 0 and caught.value.step == keeper.step
    for name, value in keeper.state.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_record_tells_fastflows_gain():
    _, record = train("fastflow", 4, arguments={"norm_log_det": False})
    gains = [entry["gain"] for entry in record["training"]["losses"]]
    assert gains[0] == 1 and sorted(gains, reverse=True) == gains and gains[-1] < 1


def seeded_loss(model, part):
    with seeded(model.hparams.seed, 1):
        return float(model.training_step(part, 0))


@over("stfpm", "fanogan", "supersimplenet", among=GRADIENT)
def test_normals_choose_the_step_that_is_kept(method):
    """What is kept has the lowest mean map (or loss) of all that was measured, by an independent mean."""
    noted = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            (keeper,) = [c for c in trainer.callbacks if isinstance(c, KeepBest)]
            if keeper.last == module.steps_taken:
                if not module.phases or int(module.phase) == len(module.phases) - 1:
                    noted.append((module.steps_taken, {k: v.clone() for k, v in module.state_dict().items()}))

    model = create_model(method, "lite", input_size=64)
    data = AnomalyDataModule(load_data(DATA), input_size=(64, 64), batch_size=10)
    keeper = KeepBest("normal", data.holdout_dataloader, 2, lambda line: None)
    trainer_of(2, keeper, Note()).fit(model, datamodule=data)
    values = []
    for _, state in noted:
        other = create_model(method, "lite", input_size=64)
        other.load_state_dict(state)
        other.eval()
        held = [part for parts in data.holdout_dataloader() for part in parts]
        with torch.no_grad():
            if method == "supersimplenet":
                values.append(sum(len(part.name) * seeded_loss(other, part) for part in held) / 20)
            else:
                values.append(torch.cat([other(part.image).map for part in held]).double().mean().item())
    last = max(len(model.phases) - 1, 0)  # only what belongs to the last phase is measured
    assert len(values) == sum(model.phase_at(step - 1) == last for step in (2, 4, 6, 8)) > 0
    assert keeper.value == pytest.approx(min(values), rel=1e-5)
    step, best = noted[int(np.argmin(values))]
    assert keeper.step == step
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())


def test_a_metric_chooses_on_one_half_and_the_other_is_reported():
    model, record = train("stfpm", 6, name="chosen", select="image_auroc")
    selection = record["training"]["selection"]
    assert selection["rule"] == "image_auroc" and selection["images"] == 4 + 7
    private = model_place("chosen") / "private"
    seen = set((private / "selection.csv").read_text().split()[1:])
    loaded = from_pretrained("chosen")
    result = evaluate(loaded, DATA, record)
    reported = {name for name, _, _ in loaded.scored}
    assert not seen & reported and len(seen) == 11 and len(seen | reported) == 23
    assert result["test_data"]["half"] and result["test_data"]["normal"] == 5 and result["test_data"]["anomalous"] == 7
    # the kept value is that metric on the validation half, by scikit-learn
    rows = [row for row in load_data(DATA)["test"] if row["path"] in seen]
    scores = [loaded.predict(row["image"]).score for row in rows]
    assert selection["value"] == pytest.approx(roc_auc_score([row["label"] for row in rows], scores), abs=1e-6)
    lines = []
    other = "synthetic:train=60,good=8,defect=7,size=64"  # all of it, with a warning
    whole = evaluate(loaded, other, run=RunOptions(say=lines.append))
    assert "half" not in whole["test_data"] and len(loaded.scored) == 15
    assert whole["test_data"]["seen"] and "too good" in lines[0]
    assert checkpoint.read_config(model_place("chosen"))["selection"]["metric"] == "image_auroc"


def test_a_store_and_its_source_have_the_same_halves(mvtec, tmp_path):
    prepare = ["data", "prepare", str(mvtec), "--size", "64", "--out", str(tmp_path / "store")]
    assert main(prepare) == 0
    model, record = train("stfpm", 2, str(tmp_path / "store"), select="pixel_ap")
    assert evaluate(model, str(mvtec), record)["test_data"]["half"] and len(model.scored) == 6

    data = tmp_path / "broken"  # a test image that a store leaves out: the half that has chosen is another one there
    shutil.copytree(mvtec, data)
    (data / "test/good/002.png").write_bytes(b"no image")
    assert main(["data", "prepare", str(data), "--size", "64", "--out", str(tmp_path / "part"), "--skip-broken"]) == 0
    steps = {"max_steps": 2, "select": "pixel_ap"}
    model, _ = fit("stfpm", str(data), None, "lite", {"input_size": 64}, {"skip_broken": True}, steps)
    with pytest.raises(ZooError, match="11 test images, where half of 12 chose"):
        evaluate(model, str(tmp_path / "part"))


def test_a_resume_needs_the_same_plan(tmp_path):
    def go(plan, *extra, **options):
        model = create_model("stfpm", "lite", input_size=64)
        model.plan = plan
        data = AnomalyDataModule(load_data(DATA), input_size=(64, 64), batch_size=10)
        trainer_of(1, *extra).fit(model, datamodule=data, **options)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.save_checkpoint(tmp_path / "x.ckpt")
            trainer.should_stop = True

    go({"max_steps": 4}, Save())
    go({"max_steps": 4}, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(ZooError, match="max_steps differs"):
        go({"max_steps": 5}, ckpt_path=tmp_path / "x.ckpt", weights_only=True)


def test_halves_are_stratified_disjoint_and_independent_of_the_order():
    names = [f"test/{kind}/{i:03d}.png" for kind, n in (("good", 21), ("dent", 8), ("hole", 1)) for i in range(n)]
    labels = [int("good" not in name) for name in names]
    validation, reported = halves(labels, names)
    lots = [f"test/good/lot{i}/a.png" for i in range(6)] + [f"test/kind{i}/a.png" for i in range(4)]
    assert [int("kind" in lots[i]) for i in halves([int("kind" in n) for n in lots], lots)[0]] == [0, 0, 0, 1, 1]
    assert sorted(validation + reported) == list(range(30))
    count = [sum(f"/{kind}/" in names[i] for i in validation) for kind in ("good", "dent", "hole")]
    assert count == [10, 4, 0]
    order = np.random.default_rng(1).permutation(30)
    again, _ = halves([labels[i] for i in order], [names[i] for i in order])
    assert {names[order[i]] for i in again} == {names[i] for i in validation}
    assert halves(labels, names, seed=1)[0] != validation
    for i in range(30):  # one that is missing moves one other at most
        kept = [j for j in range(30) if j != i]
        part = {names[kept[j]] for j in halves([labels[j] for j in kept], [names[j] for j in kept])[0]}
        assert len(part & {names[j] for j in reported}) <= 1
    named = [("test/scratch/3.png", "scratch"), ("bad/3.png", "bad"), ("test/good/lot7/3.png", "good")]
    named += [("Anomaly_test/abnormal_img/test_abnormal_00002.jpg", "abnormal_img")]
    assert all(kind_of(name) == kind for name, kind in named)


@over("stfpm", "ganomaly", among=GRADIENT)
def test_accumulated_batches_make_one_step(method):
    if not create_model(method, "lite", input_size=64).automatic_optimization:
        with pytest.raises(ZooError, match="leave --accumulate out"):
            train(method, 2, accumulate=2)
        return
    _, record = train(method, 2, accumulate=2)
    assert record["training"]["steps"] == 2 and record["training"]["images_a_step"] == 20
    assert record["training"]["epochs"] == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "fast"])
@over("stfpm", "ganomaly", among=GRADIENT)
def test_lower_precision(method, precision):
    model, record = train(method, 3, precision=precision)
    _, full = train(method, 3)
    assert record["precision"] == precision
    ours, theirs = ([entry["loss"] for entry in r["training"]["losses"]] for r in (record, full))
    near = 0.05 if model.automatic_optimization else 0.25  # what two networks make of a difference in a game grows
    assert ours != theirs and ours == pytest.approx(theirs, rel=near)
    assert np.isfinite(model.predict(np.zeros((64, 64), np.uint8)).score)


@pytest.mark.parametrize("method", GRADIENT)
def test_only_what_is_learned_is_optimised(method):
    model = create_model(method, "lite", input_size=64)
    model.trainer = trainer_of(1)  # schedules ask it for the planned epochs
    frozen = {id(p) for p in model.features.parameters()} if hasattr(model, "features") else set()
    found = model.configure_optimizers()
    optimizers = found[0] if isinstance(found, tuple) else found["optimizer"] if isinstance(found, dict) else found
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} - frozen
    assert len(held) == len({id(p) for p in held})
    assert all(p.requires_grad for p in held)


def test_labelled_defects_are_left_out_unless_a_method_uses_them(mvtec, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(mvtec, root)
    (root / "train/square").mkdir()
    for i in range(3):
        Image.fromarray(np.full((96, 96), 200, np.uint8)).save(root / "train/square" / f"{i}.png")
    lines = []
    _, record = train("stfpm", 2, str(root), lines=lines)
    assert record["train_data"]["images"] == 15
    assert any("3 labelled defects are left out." in line for line in lines)
    assert record["train_data"]["defects"] == 0
    model, record = train("supersimplenet", 1, str(root), lines=lines)
    assert any("left out; --supervised true" in line for line in lines) and record["train_data"]["defects"] == 0
    model, record = train("supersimplenet", 2, str(root), arguments={"supervised": True}, lines=lines)
    with pytest.raises(ZooError, match="train/<kind>"):
        train("supersimplenet", 2, str(mvtec), arguments={"supervised": True})
    assert (record["train_data"]["images"], record["train_data"]["defects"]) == (15, 3)
    assert any("15 normal images (15 held out) and 3 labelled defects" in line for line in lines)
    assert "learned from normal images and 3 labelled defects" in render_card(model.config(), record)
    data = load_data(str(root))
    assert AnomalyDataModule(data).num_train_images == 15 and AnomalyDataModule(data).num_defects == 3
    module = AnomalyDataModule(data, use_defects=True)
    (batch,) = module.train_dataloader()
    assert sorted(batch.label.tolist()) == [0] * 15 + [1] * 3
    assert all("good" in name for parts in module.holdout_dataloader() for part in parts for name in part.name)


def test_an_interrupted_fit_goes_on_with_losses_and_selection(tmp_path):
    """The record of a resumed fit tells the same losses and choice as that of one that never stopped."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                raise KeyboardInterrupt

    def go(*extra, **options):
        model = create_model("stfpm", "lite", input_size=64)
        data = AnomalyDataModule(load_data(DATA), input_size=(64, 64), batch_size=10)
        losses, keeper = Losses(9, lambda line: None), KeepBest("normal", data.holdout_dataloader, 2, lambda line: None)
        trainer = trainer_of(3, MaxSteps(9), losses, keeper, *extra)
        try:
            trainer.fit(model, datamodule=data, **options)
        except SystemExit:
            pass
        return model, losses.history, (keeper.step, keeper.value)

    model, history, best = go()
    go(Stop())
    resumed, again, other = go(ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert history == again and best == other and len(history) == 9
    assert json.dumps(history)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", [m for m in GRADIENT if "backbone" in signature(m)])
def test_trained_beats_untrained(method, seed, tmp_path):
    """Long form: tests/bench/learning.py, whose record is learning.json."""
    run = learning.compare(method, seed, tmp_path)
    for key in ("image_auroc", "pixel_ap"):
        assert run["trained"][key] >= run["untrained"][key] + 0.05, run
    for name, (first, last) in run["loss"].items():
        if (method, name) == ("cfa", "loss_repulsion"):
            assert first == last == 0  # as in the original: the radius starts at 1e-5, and alpha is 0.1
        else:
            assert last < first, (name, run)


# What compares an image with its rebuilt copy.
RECONSTRUCTION = {
    "fanogan": "loss_residual",
    "ganomaly": "loss_contextual",
    "iad_inpainting": "loss_contextual",
    "riad": "loss_squared",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", RECONSTRUCTION)
def test_rebuilding_is_learned_and_finds_defects(method, tmp_path):
    """Long form, and where the margin comes from: as above."""
    runs = [learning.compare(method, seed, tmp_path / str(seed)) for seed in (0, 1, 2)]
    for run in runs:
        first, last = run["loss"][RECONSTRUCTION[method]]
        assert last < first, run
        assert run["trained"]["image_auroc"] > run["untrained"]["image_auroc"], run
    mean = np.mean([run["trained"]["image_auroc"] for run in runs])
    assert mean > 0.5 + 2 * runs[0]["chance_deviation"] / 3**0.5, runs
