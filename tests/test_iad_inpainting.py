"""IAD+Inpainting, re-interpreted: corruptions, pairs, both phases and both scores, against formulas and by hand."""

import copy
import json

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, label
from skimage.metrics import structural_similarity

from zoo.cards import render_card
from zoo.cli import main
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.hub import from_pretrained, model_place
from zoo.methods import create_model
from zoo.methods.iad_inpainting import KINDS, IADInpainting, colours, corrupt, find_pairs, paint, rectangles, strokes
from zoo.nn.similarity import msgms_map

DATA = "synthetic:train=60,good=9,defect=14,size=64"
CPU = torch.device("cpu")


def build(**arguments):
    return IADInpainting(**({"input_size": 64, "width": 4, "latent": 5} | arguments))


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Note(L.Callback):
    """What each step was given, told, and changed."""

    def __init__(self, save=None, at=None):
        self.phases, self.told, self.batches, self.states, self.save, self.at = [], [], [], [], save, at

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append(batch.image.clone())

    def on_train_batch_end(self, trainer, module, *_):
        self.phases.append(int(module.phase))
        self.told.append({name: float(value) for name, value in module.told.items()})
        self.states.append(copy.deepcopy(module.state_dict()))
        if module.steps_taken == self.at:
            trainer.save_checkpoint(self.save)
            raise KeyboardInterrupt


def train(model, note=None, epochs=1, **options):
    data = AnomalyDataModule(load_data(DATA), input_size=model.size, batch_size=10)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[note] if note else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, **options)
    return model


# ---- corruptions -----------------------------------------------------------------------------------------------------


def test_rectangles_are_whole_and_of_the_stated_extent():
    torch.manual_seed(0)
    masks = rectangles(200, 128, CPU)[:, 0].numpy()
    sides = []
    for mask in masks:
        rows, columns = mask.any(1), mask.any(0)
        assert np.array_equal(mask, rows[:, None] & columns[None])
        for line in (rows, columns):
            assert label(line)[1] <= 1
            if line.any() and not line[0] and not line[-1]:  # not cut by the edge
                sides.append(line.sum())
    assert 3 <= min(sides) <= 8 and 25 <= max(sides) <= 33  # 128 / 32 to 128 / 4, up to a pixel
    assert np.median(sides) == pytest.approx(128 * (1 / 32 * 1 / 4) ** 0.5, rel=0.25)  # log-uniform


def test_strokes_are_lines_of_the_stated_width_in_one_piece():
    torch.manual_seed(0)
    masks = strokes(60, 128, CPU)[:, 0].numpy()
    for mask in masks:
        assert label(mask, np.ones((3, 3)))[1] == 1
    # Pixels from the middle line are at most half a width away: nothing is thicker than 2 x 128 / 32 and the bend.
    from scipy.ndimage import distance_transform_edt

    thick = [distance_transform_edt(np.pad(mask, 1)).max() for mask in masks]
    assert max(thick) <= 128 / 32 * 2 and np.median(thick) == pytest.approx(128 * (1 / 32 + 1 / 128) / 2, rel=0.5)


def test_a_stroke_by_the_distance_to_its_segments():
    torch.manual_seed(3)
    mask = strokes(1, 32, CPU)[0, 0].numpy()
    torch.manual_seed(3)  # the same draws: half the width, then the points
    half = 32 * (1 / 128 + (1 / 32 - 1 / 128) * float(torch.rand(1, 1, 1)))
    points = 32 * torch.rand(1, 3, 2, 1, 1)[0, :, :, 0, 0].numpy()
    for y, x in np.ndindex(32, 32):
        near = min(
            np.linalg.norm(np.array([y + 0.5, x + 0.5]) - (a + t * (b - a)))
            for a, b in zip(points, points[1:], strict=False)
            for t in np.linspace(0, 1, 400)
        )
        if abs(near - half) > 0.05:
            assert mask[y, x] == (near <= half), (y, x)


def test_patches_come_from_another_image():
    torch.manual_seed(0)
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 64, 64) / 2 - 0.75  # each image has its own grey
    where, what = paint("patch", x)
    assert all(torch.equal(what[i], x[i - 1]) for i in range(4)) and where.any()


def test_perlin_blobs_are_textured_and_within_the_range():
    torch.manual_seed(0)
    where, what = paint("perlin", torch.zeros(40, 1, 64, 64))
    assert what.min() >= -1 and what.max() <= 1
    assert 0.01 < where.float().mean() < 0.25
    assert (torch.stack([w[0][m[0]].std() for w, m in zip(what, where, strict=True) if m.sum() > 50]) > 0.01).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions_change_a_part_visibly_and_leave_the_rest(kind, channels):
    torch.manual_seed(1)
    x = 2 * random(30, channels, 64, 64) - 1
    made = corrupt(x, [kind])
    assert made.shape == x.shape and made.min() >= -1 and made.max() <= 1
    changed = (made != x).any(1).float().mean((1, 2))
    assert 0.0005 < changed.mean() < 0.25 and (changed > 0).float().mean() > 0.85
    torch.manual_seed(2)
    assert not torch.equal(corrupt(x, [kind]), made)
    torch.manual_seed(2)
    one = corrupt(x, [kind])
    torch.manual_seed(2)
    assert torch.equal(corrupt(x, [kind]), one)


def test_each_kind_is_drawn():
    """On an image without texture, a rectangle's blurred outline is a product of rows and columns; a blob's is not.

    A rectangle in the image's own colour does not show: these are half of them.
    """
    torch.manual_seed(0)
    made = corrupt(torch.zeros(400, 1, 64, 64), ["rectangle", "perlin"])
    values = np.linalg.svd(made[:, 0].numpy(), compute_uv=False)
    share = (values[:, 1] < 0.1 * values[:, 0]).mean()
    assert 0.15 < share < 0.35


def test_shifts_are_of_the_images_own_content_from_near_by():
    """Each pixel of a ramp tells where it comes from."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij")
    moves = set()
    for _ in range(60):
        _, what = paint("shift", torch.stack([y, x])[None, :, :, :])
        moves.add(tuple(int(what[0, i, 40, 40] - 40) for i in (0, 1)))
    assert {abs(d) for move in moves for d in move} <= {0, *range(2, 14)}  # 80 / 40 to 80 / 6
    signs = {tuple(np.sign(move).tolist()) for move in moves}
    assert signs == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} - {(0, 0)}


def test_colours_are_of_the_image_or_any():
    torch.manual_seed(0)
    x = torch.tensor([0.25, -0.5, 0.75]).view(1, 3, 1, 1).expand(400, 3, 8, 8)
    found = colours(x)
    assert found.shape == (400, 3, 1, 1)
    own = (found == x[:, :, :1, :1]).all(1).flatten()
    assert 0.4 < own.float().mean() < 0.6
    grey = found[~own][:, :, 0, 0]
    assert (grey == grey[:, :1]).all() and grey.min() < -0.9 and grey.max() > 0.9


def test_several_corruptions_cover_more():
    x = torch.zeros(40, 1, 64, 64)
    share = {}
    for n in (1, 4):
        torch.manual_seed(0)
        model = build(corruptions_per_image=n, corrupted_share=1.0, corruptions=["stroke"])
        share[n] = np.mean([float((model.corrupted(x)[0] != 0).float().mean()) for _ in range(30)])
    assert 2.5 < share[4] / share[1] < 5  # four times, less the overlap, in the mean over many


def test_a_share_stays_clean():
    model, x = build(corrupted_share=0.3), 2 * random(300, 1, 64, 64) - 1
    torch.manual_seed(0)
    seen, clean = model.corrupted(x)
    assert torch.equal(clean, x)
    share = float((seen != x).flatten(1).any(1).float().mean())
    assert 0.2 < share < 0.36  # of 0.3, less the few whose corruption lies outside


# ---- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three pairs of grey images, brighter where abnormal, and what has no partner."""
    root = tmp_path / "Inpainting_train"
    root.mkdir()
    for i in range(3):
        Image.fromarray(np.full((80, 80), 40 * i, np.uint8)).save(root / f"train_normal_{i:05d}.png")
        Image.fromarray(np.full((80, 80), 40 * i + 100, np.uint8)).save(root / f"train_abnormal_{i:05d}.png")
    Image.fromarray(np.zeros((80, 80), np.uint8)).save(root / "train_abnormal_00009.png")
    (root / "readme.txt").write_text("x")
    return root


def test_pairs_are_images_of_one_folder_by_name(folder):
    (folder / "other").mkdir()
    (folder / "train_normal_00009.txt").write_text("x")
    Image.fromarray(np.zeros((80, 80), np.uint8)).save(folder / "other" / "train_normal_00009.png")
    pairs = find_pairs(folder)
    assert [(a.name, b.name) for a, b in pairs] == [
        (f"train_abnormal_{i:05d}.png", f"train_normal_{i:05d}.png") for i in range(3)
    ]


def test_pairs_are_learned_from_in_place_of_corruptions(folder):
    model = build(inpainting_pairs=str(folder))
    torch.manual_seed(0)
    seen, clean = model.corrupted(torch.zeros(50, 1, 64, 64))
    assert seen.shape == clean.shape == (50, 1, 64, 64)
    torch.testing.assert_close(seen - clean, torch.full_like(seen, 200 / 255))  # [-1, 1] has twice the range
    assert len({round(float(image.mean()), 3) for image in clean}) == 3


def test_the_folder_of_pairs_stays_private(folder, tmp_path):
    data = "synthetic:train=40,good=3,defect=3,size=64"
    arguments = {"width": 2, "inpainting_pairs": str(folder)}
    model, record = fit("iad_inpainting", data, "pairs", "lite", arguments, trainer_options={"max_steps": 4})
    place = model_place("pairs")
    assert json.loads((place / "config.json").read_text())["arguments"]["inpainting_pairs"] is None
    assert all(str(tmp_path / "Inp").encode() not in p.read_bytes() for p in place.iterdir() if p.is_file())
    assert from_pretrained("pairs").hparams.inpainting_pairs is None
    assert record["train_data"]["inpainting_pairs"] == 3
    assert "and 3 pairs of abnormal and clean ones" in (place / "README.md").read_text()


def test_no_pairs_is_told(tmp_path, capsys):
    with pytest.raises(ZooError, match="none is not a folder"):
        find_pairs(tmp_path / "none")
    options = ["--data", DATA, "--name", "x", "--preset", "lite", "--inpainting-pairs", str(tmp_path)]
    assert main(["fit", "iad-inpainting", *options]) == 2
    error = capsys.readouterr().err
    assert "--inpainting-pairs" in error and "train_abnormal_1.jpg" in error and error.count("\n") == 1


# ---- learning --------------------------------------------------------------------------------------------------------


def test_first_rebuild_then_inpaint():
    """In the first phase it sees what it should make; in the second one something else."""
    note, model = Note(), build(reconstruction_share=0.5)
    pairs, maps = [], model.encoder.maps[0].forward
    model.encoder.maps[0].forward = lambda images: pairs.append(images) or maps(images)
    train(model, note, epochs=2)  # 8 steps
    assert note.phases == [0] * 4 + [1] * 4
    assert len(pairs) == 4 * 2 + 4 * 3  # (image, rebuilt) a step; then (corrupted, clean, rebuilt)
    for i in range(4):
        assert torch.equal(pairs[2 * i], 2 * note.batches[i] - 1)
    for i in range(4):
        corrupted, clean, _ = pairs[8 + 3 * i : 11 + 3 * i]
        assert torch.equal(clean, 2 * note.batches[4 + i] - 1) and not torch.equal(corrupted, clean)


def test_a_fit_too_short_for_inpainting_is_refused():
    with pytest.raises(ZooError, match="^4 steps leave none for the phase inpainting; take more of them, or give"):
        train(build(reconstruction_share=0.99))


def test_generators_loss_by_its_formula():
    model = build(adversarial_weight=2.0, contextual_weight=3.0, latent_weight=5.0).eval()
    parts = {}
    model.total_loss = lambda **given: parts.update(given) or sum(given.values())
    x = 2 * random(3, 1, 64, 64) - 1
    with torch.no_grad():
        rebuilt, code = model.rebuild(x)
        again = model.encoder(rebuilt)
        model.generator_loss(x, rebuilt, code, again)
        a, b = (model.discriminator.maps(v).double().numpy() for v in (x, rebuilt))
    assert float(parts["adversarial"]) == pytest.approx(2 * np.mean((a - b) ** 2), rel=1e-5)
    assert float(parts["contextual"]) == pytest.approx(3 * np.abs((x - rebuilt).double().numpy()).mean(), rel=1e-5)
    assert float(parts["latent"]) == pytest.approx(5 * np.mean((code - again).double().numpy() ** 2), rel=1e-5)


def test_one_encoder_learns_with_the_decoder_and_the_discriminator_apart():
    model = build()
    rebuilding, judging = model.configure_optimizers()
    held = [{id(p) for g in o.param_groups for p in g["params"]} for o in (rebuilding, judging)]
    assert held[0] == {id(p) for part in (model.encoder, model.decoder) for p in part.parameters()}
    assert held[1] == {id(p) for p in model.discriminator.parameters()}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"encoder", "decoder", "discriminator"}
    note = Note()
    before = copy.deepcopy(model.state_dict())
    train(model, note)
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"encoder", "decoder", "discriminator"}
    assert all(told["code_std"] > 0 and told["discriminator"] > 0 for told in note.told)
    assert all(
        told["loss"] == pytest.approx(sum(told[f"loss_{part}"] for part in ("adversarial", "contextual", "latent")))
        for told in note.told
    )


def test_equal_codes_stop_the_fit():
    with pytest.raises(ZooError, match="same code at step 1 .standard deviation .*lower --latent-weight or --lr"):
        train(build(collapsed=1e9))


def test_spread_is_the_mean_standard_deviation_over_the_batch():
    model, codes = build(collapsed=0.0), random(7, 5)
    told = {}
    model.tell = lambda **values: told.update(values)
    model._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model.watch(codes)
    assert float(told["code_std"]) == pytest.approx(np.std(codes.numpy(), axis=0, ddof=1).mean(), rel=1e-5)


@pytest.mark.parametrize("at", [2, 4, 5])
def test_resume_in_each_phase_and_at_the_switch(at, tmp_path):
    whole = train(build(), epochs=2)
    with pytest.raises(SystemExit):
        train(build(), Note(tmp_path / "x.ckpt", at), epochs=2)
    resumed = train(build(), epochs=2, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert int(resumed.phase) == 1
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_both_scores_by_their_formulas():
    images = random(3, 1, 80, 50)
    latent, residual = (build(score=score, sigma=1.5).eval() for score in ("latent", "residual"))
    with torch.no_grad():
        x = latent.prepare(images)
        rebuilt, code = latent.rebuild(x)
        again = latent.encoder(rebuilt)
        a, b = latent(images), residual(images)
    np.testing.assert_allclose(a.image.numpy(), ((code - again) ** 2).mean((1, 2, 3)).numpy(), rtol=1e-4)
    smooth = [gaussian_filter(np.abs(d[0]), 1.5) / 2 for d in (x - rebuilt).numpy().astype(float)]  # of [0, 1]
    np.testing.assert_allclose(b.image.numpy(), [s.max() for s in smooth], rtol=1e-4)
    assert torch.equal(a.map, b.map) and a.map.shape == (3, 1, 80, 50)


def test_residuals_by_their_formulas():
    """SSIM is scikit-image's; MSGMS is tested with RIAD."""
    images = random(2, 1, 64, 64)
    models = {kind: build(residual=kind, sigma=1.5).eval() for kind in ("structure", "gradient")}
    with torch.no_grad():
        x = models["structure"].prepare(images)
        rebuilt, _ = models["structure"].rebuild(x)
        found = {kind: model(images).map[:, 0].numpy() for kind, model in models.items()}
    options = dict(win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, full=True)
    pairs = [
        ((a[0] + 1) / 2, (b[0] + 1) / 2) for a, b in zip(x.double().numpy(), rebuilt.double().numpy(), strict=True)
    ]
    for i, (a, b) in enumerate(pairs):
        a, b = (np.pad(image, 5, mode="reflect") for image in (a, b))
        expected = 1 - structural_similarity(a, b, **options)[1][5:-5, 5:-5]
        np.testing.assert_allclose(found["structure"][i], gaussian_filter(expected, 1.5), atol=2e-4)
    expected = [gaussian_filter(m[0], 1.5) for m in msgms_map((x + 1) / 2, (rebuilt + 1) / 2).numpy()]
    np.testing.assert_allclose(found["gradient"], expected, atol=1e-5)


@pytest.mark.parametrize("skips", [0, 2, 4])
def test_skips_show_the_finest_maps_to_the_decoder(skips):
    """With so many skips, a decoder without a code depends on so many of the encoder's levels."""
    model = build(skips=skips)
    levels = [level.detach().requires_grad_() for level in model.encoder.levels(2 * random(2, 1, 64, 64) - 1)]
    assert [tuple(level.shape) for level in levels] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]
    model.decoder(torch.zeros(2, 5, 1, 1), levels).square().sum().backward()
    assert [level.grad is not None for level in levels] == [i < skips for i in range(4)]


def test_structure_enters_the_loss_where_it_has_a_weight():
    """Against scikit-image, for three channels."""
    parts = {}
    model = build(structure_weight=2.0, channels=3).eval()
    model.total_loss = lambda **given: parts.update(given) or sum(given.values())
    x = 2 * random(2, 3, 64, 64) - 1
    rebuilt, code = model.rebuild(x)
    model.generator_loss(x, rebuilt, code, code)
    options = dict(win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, full=True)
    found = []
    for pair in zip((x + 1) / 2, (rebuilt.detach() + 1) / 2, strict=True):
        for channel in range(3):
            a, b = (np.pad(image[channel].double().numpy(), 5, mode="reflect") for image in pair)
            found.append(1 - structural_similarity(a, b, **options)[1][5:-5, 5:-5])
    assert float(parts["structure"]) == pytest.approx(2 * np.mean(found), abs=1e-4)


def test_both_scores_are_reported(capsys):
    """The record, the card and the command line name what the other one would have given."""
    options = ["--data", DATA, "--preset", "lite", "--name", "both", "--width", "4", "--max-steps", "4"]
    assert main(["fit", "iad-inpainting", *options]) == 0
    assert main(["evaluate", "both", "--data", DATA]) == 0
    out = capsys.readouterr().out
    record = json.loads((model_place("both") / "results.json").read_text())
    (other,) = record["other_scores"]
    assert other == "latent" and record["configuration"]["model"]["score"] == "residual"
    model = from_pretrained("both")
    model.hparams.score = "latent"
    expected = evaluate(model, DATA)["metrics"]
    found = record["other_scores"]["latent"]
    assert found == {key: value for key, value in expected.items() if key.startswith("image")} and len(found) == 3
    assert f"{found['image_auroc']:.4f}" in out and "latent" in out and "residual" in out
    card = (model_place("both") / "README.md").read_text()
    assert "re-interpretation" in card and f"image ROC {found['image_auroc']:.4f}" in card


def test_only_it_says_that_it_is_a_re_interpretation():
    assert "RE-INTERPRETATION" in __import__("zoo.methods.iad_inpainting", fromlist=["x"]).__doc__
    assert "re-interpretation" not in render_card(create_model("ganomaly", "lite").config(), None)


@pytest.mark.parametrize("score", ["latent", "residual"])
def test_region_of_interest(score):
    model, batch = build(score=score).eval(), random(8, 1, 64, 64)
    roi = torch.zeros(8, 1, 64, 64, dtype=torch.bool)
    roi[..., :20] = True
    with torch.no_grad():
        whole, part, everything = model(batch), model(batch, roi), model(batch, torch.ones_like(roi))
    assert torch.equal(whole.image, everything.image)
    assert (part.image <= whole.image).all() and (part.image < whole.image).any()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"input_size": 224}, "--input-size is a power of two .64, 128, 256., not 224"),
        ({"corruptions": ["dust"]}, "--corruptions are some of rectangle, stroke, patch, shift, perlin"),
        ({"corruptions": []}, "--corruptions"),
        ({"reconstruction_share": 1.0}, "--reconstruction-share"),
        ({"corrupted_share": 0.0}, "--corrupted-share"),
        ({"latent_weight": -1.0}, "four weights"),
        ({"sigma": 0.0}, "--sigma"),
        ({"skips": 5}, "--skips is 0 to 4, the number of halvings of --input-size, not 5"),
        ({"corruptions_per_image": 0}, "--corruptions-per-image"),
        ({"residual": "square"}, "--residual is absolute, structure, gradient, not square"),
        ({"score": "both"}, "--score is latent or residual, not both"),
    ],
)
def test_mistakes_get_a_sentence(wrong, match):
    with pytest.raises(ZooError, match=match):
        IADInpainting(**({"input_size": 64} | wrong))


@pytest.mark.slow  # test_registry.py fits it as long, and asks it to find defects
def test_training_teaches_to_paint_over_and_finds_defects(mvtec):
    """A bright square is found untrained too, by a map that is the image itself: what counts is what becomes of it."""
    untrained = create_model("iad_inpainting", "lite", input_size=64).eval()
    arguments, steps = {"input_size": 64}, {"max_steps": 200}
    trained, _ = fit("iad_inpainting", str(mvtec), preset="lite", arguments=arguments, trainer_options=steps)
    metrics = evaluate(trained, str(mvtec))["metrics"]
    assert metrics["image_auroc"] > 0.9 and metrics["pixel_ap"] > 0.9
    image = np.tile(np.where(np.arange(96) % 16 < 8, 150, 70), (96, 1)).astype(np.uint8)
    image[40:58, 40:58] = 230
    x = trained.prepare(torch.from_numpy(image)[None, None] / 255)
    with torch.no_grad():
        before, after = ((x - m.rebuild(x)[0]).abs()[0, 0] for m in (untrained, trained))
    inside, outside = after[28:37, 28:37].mean(), after[:20].mean()
    assert inside > 3 * outside  # the square is gone, the stripes are not
    assert outside < 0.5 * before[:20].mean()
