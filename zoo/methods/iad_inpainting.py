"""IAD+Inpainting, re-interpreted: IC image anomaly detection (Huang et al., ICIP 2021; described in arXiv 2505.07576).

Idea: a GANomaly whose one encoder reads both the image and its rebuilt copy. It first learns to rebuild normal images,
then to rebuild the clean image from a corrupted one, so that a defect is painted over and shows in the difference.

THIS IS A RE-INTERPRETATION: neither code nor details of the original are public. Known are the shared encoder, the two
phases, adversarial training as in GANomaly, and that the second phase has pairs of abnormal and clean images. All else,
the losses' weights, corruptions and scores, is the zoo's choice and can be set by an argument. No figure of the paper
is claimed for it.
Deviations: they can't be listed, as the original's details are not known. Choices of the zoo are: where the set's own
Inpainting pairs are not given, the corruptions are made, of rectangles, strokes, patches of other images, shifts of the
image's own content and Perlin noise, with sharp or blurred outlines, several to an image; the decoder sees the
encoder's finest maps beside the code. Several corruptions to an image and these maps were clear gains on the validation
half of a synthetic set; the other defaults are a matter of taste.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.image import read_image
from zoo.learning import LOOK
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.dcgan import Decoder, Encoder, adversarial_loss, halvings, is_power_of_two
from zoo.nn.maps import gaussian_blur, masked_to_roi, resize_map
from zoo.nn.perlin import perlin_noise
from zoo.nn.seed import seeded
from zoo.nn.similarity import RESIDUALS, ssim_distances, unit
from zoo.nn.transfer import sent
from zoo.pairs import Pair, abnormal_and_clean

KINDS = ("rectangle", "stroke", "patch", "shift", "perlin")
EXTENT = (1 / 32, 1 / 4)  # sides of rectangles and patches, as shares of the image's
WIDTH = (1 / 128, 1 / 32)  # half the width of strokes
SHIFT = (1 / 40, 1 / 6)  # how far away the content of a shift is
OPACITY = 0.3  # of a corruption, at least, before its outline is blurred; 1 at most
EDGE = (1 / 320, 1 / 32)  # sigma of the blur of outlines, as a share of the image's side
FAINT = 0.01  # share of a corruption in a pixel, below which the pixel stays as it is
READERS = 8  # threads that read pairs

PRESETS = {
    "original": {"data": {"batch_size": 32}, "trainer": {"max_epochs": 30}},
    "paper224": {"data": {"batch_size": 32}, "trainer": {"max_epochs": 30}},
    "lite": {
        "model": {"input_size": 128, "width": 16, "lr": 1e-3},
        "data": {"batch_size": 8},
        "trainer": {"max_steps": 2000},
    },
}


class IADInpainting(AnomalyModule):
    """An autoencoder that rebuilds, then cleans; its one encoder judges both the image and what became of it.

    Args:
        input_size: images are resized to this size, a power of two.
        channels: 1 (grey) or 3 (colour) of the images that the networks see.
        latent: length of the codes.
        width: channels of the finest maps; each halving doubles them.
        skips: of the encoder's maps, from the finest on, so many are shown to the decoder beside the code.
        reconstruction_share: of the steps, in which images are rebuilt as they are; in the rest they are corrupted.
        inpainting_pairs: folder of pairs, `*abnormal*` and `*normal*` by otherwise equal names; None makes them.
        corruptions: kinds of what is made: rectangle, stroke, patch of another image, shift of its own content, perlin.
        corruptions_per_image: so many, each of a kind drawn anew.
        corrupted_share: of the images of a batch in the second phase, the others stay clean; without pairs.
        adversarial_weight: of the distance of the discriminator's features in the generator's loss.
        contextual_weight: of the pixels' absolute error in it.
        structure_weight: of 1 - SSIM in it.
        latent_weight: of the codes' squared distance in it.
        residual: the map's: `absolute`, |x - x_hat|; `structure`, 1 - SSIM; `gradient`, 1 - MSGMS.
        score: the image's: `latent`, squared distance of its code and the rebuilt one's; `residual`, the map's maximum.
        sigma: of the Gaussian that smooths the map, in pixels of the input size.
        collapsed: standard deviation of the codes over a batch below which the fit stops.
        lr: learning rate of Adam, for both networks.
        beta1: of Adam, its momentum.
        seed: of the first weights, the order of the images and the corruptions.
    """

    method = "iad_inpainting"
    phases = ("reconstruction", "inpainting")
    local_arguments = ("inpainting_pairs",)
    score_forms = ("latent", "residual")

    def __init__(
        self,
        *,
        input_size: int | list[int] = 256,
        channels: int = 1,
        latent: int = 100,
        width: int = 64,
        skips: int = 3,
        reconstruction_share: float = 0.1,
        inpainting_pairs: str | None = None,
        corruptions: list[str] = ["rectangle", "stroke", "patch", "shift", "perlin"],  # noqa: B006 - never changed
        corruptions_per_image: int = 4,
        corrupted_share: float = 0.9,
        adversarial_weight: float = 0.05,
        contextual_weight: float = 50.0,
        structure_weight: float = 0.0,
        latent_weight: float = 1.0,
        residual: Literal["absolute", "structure", "gradient"] = "absolute",
        score: Literal["latent", "residual"] = "residual",
        sigma: float = 2.0,
        collapsed: float = 1e-4,
        lr: float = 2e-4,
        beta1: float = 0.5,
        seed: int = 0,
    ):
        super().__init__(input_size, seed, channels)
        self.save_hyperparameters()
        self.automatic_optimization = False
        side = self.size[0]
        if self.size != (side, side) or not is_power_of_two(side):
            raise ZooError(f"--input-size is a power of two (64, 128, 256), not {input_size}: it is halved down to 4.")
        if not corruptions or set(corruptions) - set(KINDS):
            raise ZooError(f"--corruptions are some of {', '.join(KINDS)}, not {corruptions}.")
        if not (0 <= reconstruction_share < 1 and 0 < corrupted_share <= 1):
            raise ZooError(
                f"--reconstruction-share is in [0, 1), not {reconstruction_share}, or --corrupted-share in (0, 1], "
                f"not {corrupted_share}."
            )
        if min(adversarial_weight, contextual_weight, structure_weight, latent_weight, collapsed) < 0:
            raise ZooError("The four weights of the loss and --collapsed are at least 0.")
        if min(lr, sigma) <= 0 or not 0 <= beta1 < 1 or min(latent, width, corruptions_per_image) < 1:
            raise ZooError(
                "--lr and --sigma are above 0, --beta1 in [0, 1), --latent, --width and --corruptions-per-image at "
                "least 1."
            )
        if not 0 <= skips <= halvings(side):
            raise ZooError(f"--skips is 0 to {halvings(side)}, the number of halvings of --input-size, not {skips}.")
        if score not in self.score_forms:
            raise ZooError(f"--score is latent or residual, not {score}.")
        if residual not in RESIDUALS:
            raise ZooError(f"--residual is {', '.join(RESIDUALS)}, not {residual}.")
        # Of paths, or of what else `read_image` reads: a fit puts those of its data set here.
        self.pairs: list[Pair] = list(find_pairs(Path(inpainting_pairs))) if inpainting_pairs else []
        with seeded(seed, 0):
            self.encoder = Encoder(side, channels, width, latent)
            self.decoder = Decoder(side, channels, width, latent, skips)
            self.discriminator = Encoder(side, channels, width, 1)

    def phase_at(self, step: int) -> int:
        return int(step >= round(self.hparams.reconstruction_share * self.steps_planned))

    def training_step(self, batch: Batch, index: int) -> None:
        generator, discriminator = self.optimizers()
        clean = self.prepare(batch.image)  # (B, C, S, S)
        seen = clean
        if self.phases[self.phase_now] == "inpainting":
            seen, clean = self.corrupted(clean)
        with generator.toggle_model():
            rebuilt, code = self.rebuild(seen)
            # What a rebuilt image's code should be: that of the clean one.
            target = code if seen is clean else self.encoder(clean)
            loss = self.generator_loss(clean, rebuilt, target, self.encoder(rebuilt))
            self.descend(generator, loss)
        with discriminator.toggle_model():
            loss = adversarial_loss(self.discriminator(clean), self.discriminator(rebuilt.detach()))
            self.tell(discriminator=loss)
            self.descend(discriminator, loss)
        self.watch(code.detach().flatten(1))

    def further_sources(self) -> dict[str, int]:
        return {"inpainting_pairs": len(self.pairs)} if self.pairs else {}

    def corrupted(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees and what it should make of it, both (B, C, S, S)."""
        count = len(clean)
        if not self.pairs:
            chosen = torch.rand(count, 1, 1, 1, device=clean.device) < self.hparams.corrupted_share
            made = clean
            for _ in range(self.hparams.corruptions_per_image):
                made = corrupt(made, self.hparams.corruptions)
            return torch.where(chosen, made, clean), clean
        drawn = [self.pairs[i] for i in torch.randint(len(self.pairs), (count,)).tolist()]
        with ThreadPoolExecutor(READERS) as pool:
            images = list(pool.map(self.read, [image for side in zip(*drawn, strict=True) for image in side]))
        seen, clean = sent(torch.cat(images), clean.device).chunk(2)  # (B, C, S, S) each
        return seen, clean

    def read(self, image: Path | dict) -> Tensor:
        name = image["path"] if isinstance(image, dict) else image
        array = self.view.without_bar(read_image(image), image)
        return self.prepare(self.view.tensor(array, name)[None])  # (1, C, S, S)

    def rebuild(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) -> rebuilt ones, and the codes (B, latent, 1, 1) that they were rebuilt from."""
        levels = self.encoder.levels(x)
        code = self.encoder.encode(levels[-1])
        return self.decoder(code, levels), code

    def generator_loss(self, clean: Tensor, rebuilt: Tensor, code: Tensor, again: Tensor) -> Tensor:
        """Of clean and rebuilt images (B, C, S, S) and the codes of both (B, latent, 1, 1)."""
        h, maps = self.hparams, self.discriminator.maps
        parts = {
            "adversarial": h.adversarial_weight * F.mse_loss(maps(rebuilt), maps(clean)),
            "contextual": h.contextual_weight * F.l1_loss(rebuilt, clean),
            "latent": h.latent_weight * F.mse_loss(again, code),
        }
        if h.structure_weight:
            parts["structure"] = h.structure_weight * ssim_distances(unit(clean), unit(rebuilt)).mean()
        return self.total_loss(**parts)

    def watch(self, codes: Tensor) -> None:
        """Stop where the codes (B, latent) of a batch have become one: the shared encoder makes that easy."""
        if len(codes) < 2:
            return
        spread = codes.float().std(0).mean()
        self.tell(code_std=spread)
        if self.steps_taken % LOOK:  # codes that have become one stay so, and the host waits for each look
            return
        if self.trainer.strategy.reduce_boolean_decision(bool(spread < self.hparams.collapsed)):
            raise ZooError(
                f"All images have the same code at step {self.steps_taken + 1} (standard deviation {spread:.2g}); "
                "lower --latent-weight or --lr."
            )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        rebuilding = [*self.encoder.parameters(), *self.decoder.parameters()]
        parts = (rebuilding, self.discriminator.parameters())
        return [torch.optim.Adam(part, self.hparams.lr, (self.hparams.beta1, 0.999), fused=True) for part in parts]

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        x = self.prepare(images)  # (B, C, S, S)
        rebuilt, latent = self.judge(x)
        differences = RESIDUALS[self.hparams.residual](unit(x.float()), unit(rebuilt.float()))
        maps = gaussian_blur(differences, self.hparams.sigma)  # (B, 1, S, S)
        if self.hparams.score == "residual":
            score = masked_to_roi(maps, roi).amax(dim=(1, 2, 3))
        elif roi is None:
            score = latent
        else:  # what lies outside is seen as it was rebuilt; a region can only take suspicion away
            inside = F.adaptive_max_pool2d(roi.float(), self.size) > 0  # (B, 1, S, S)
            score = torch.minimum(latent, self.judge(torch.where(inside, x, rebuilt))[1])
        return Scores(score, resize_map(maps, images.shape[-2:]))

    def judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) -> rebuilt ones, and the mean squared distances (B,) of the codes of both."""
        rebuilt, code = self.rebuild(x)
        return rebuilt, (code.float() - self.encoder(rebuilt).float()).square().mean(dim=(1, 2, 3))


def corrupt(x: Tensor, kinds: list[str]) -> Tensor:
    """Images (B, C, S, S) in [-1, 1], each with something of one kind on it that is not as it should be."""
    count, device = len(x), x.device
    kind = torch.randint(len(kinds), (count,), device=device)[:, None, None, None]
    opacity = OPACITY + (1 - OPACITY) * torch.rand(count, 1, 1, 1, device=device)
    low, high = (x.shape[-1] * share for share in EDGE)
    sigma = low * (high / low) ** float(torch.rand(()))
    made = x
    for i, name in enumerate(kinds):
        where, what = paint(name, x)
        share = opacity * gaussian_blur(where, sigma)  # (B, 1, S, S)
        made = torch.where((kind == i) & (share > FAINT), x + share * (what - x), made)
    return made


def paint(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where a corruption lies, (B, 1, S, S) bool, and what is there, (B, C or 1, S, S)."""
    count, _, side, _ = x.shape
    if kind == "rectangle":
        return rectangles(count, side, x.device), colours(x)
    if kind == "stroke":
        return strokes(count, side, x.device), colours(x)
    if kind == "patch":  # of the next image, from elsewhere
        down, across = (int(torch.randint(side, ())) for _ in range(2))
        return rectangles(count, side, x.device), x.roll((1, down, across), (0, 2, 3))
    if kind == "shift":  # of the image itself, from near by: along, across or both
        low, high = (round(side * share) for share in SHIFT)
        moves = torch.randint(low, high + 1, (2,)) * (2 * torch.randint(2, (2,)) - 1)
        down, across = (moves * torch.tensor([[1, 1], [1, 0], [0, 1]])[torch.randint(3, ())]).tolist()
        return rectangles(count, side, x.device), x.roll((down, across), (2, 3))
    cells = 2 ** torch.randint(1, 5, (2 * count, 2))
    noise = perlin_noise(cells, (side, side), x.device)[:, None]  # (2B, 1, S, S)
    return noise[:count] > 0.4, (colours(x) + noise[count:]).clamp(-1, 1)


def colours(x: Tensor) -> Tensor:
    """One for each image (B, C, S, S), (B, C, 1, 1): any grey, or that of one of its own pixels."""
    count, channels, side, _ = x.shape
    place = torch.randint(side * side, (count, 1, 1), device=x.device).expand(-1, channels, 1)
    own = x.flatten(2).gather(2, place)[..., None]
    grey = 2 * torch.rand(count, 1, 1, 1, device=x.device) - 1
    return torch.where(torch.rand(count, 1, 1, 1, device=x.device) < 0.5, own, grey)


def rectangles(count: int, side: int, device: torch.device) -> Tensor:
    """One in each of so many images, (N, 1, S, S) bool."""
    low, high = EXTENT
    extent = side * low * (high / low) ** torch.rand(count, 2, 1, device=device)  # log-uniform, down and across
    centre = side * torch.rand(count, 2, 1, device=device)
    inside = (torch.arange(side, device=device) + 0.5 - centre).abs() <= extent / 2  # (N, 2, S)
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def strokes(count: int, side: int, device: torch.device) -> Tensor:
    """A line with one bend in each of so many images, (N, 1, S, S) bool."""
    low, high = WIDTH
    half = side * (low + (high - low) * torch.rand(count, 1, 1, device=device))
    points = side * torch.rand(count, 3, 2, 1, 1, device=device)  # (y, x) of both ends and the bend between them
    grid = torch.arange(side, device=device) + 0.5
    y, x = grid[None, :, None], grid[None, None, :]
    near = torch.zeros(count, side, side, dtype=torch.bool, device=device)
    for (y0, x0), (y1, x1) in ((points[:, i].unbind(1), points[:, i + 1].unbind(1)) for i in (0, 1)):  # (N, 1, 1) each
        dy, dx = y1 - y0, x1 - x0
        along = (((y - y0) * dy + (x - x0) * dx) / (dy**2 + dx**2 + 1e-6)).clamp(0, 1)  # of the nearest point
        near |= (y - y0 - along * dy) ** 2 + (x - x0 - along * dx) ** 2 <= half**2
    return near[:, None]


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Abnormal images and their clean versions, which have "normal" in their names instead.

    Raises:
        ZooError: there is no such folder, or no pair in it.
    """
    if not folder.is_dir():
        raise ZooError(f"--inpainting-pairs {folder} is not a folder; give one of pairs of images.")
    if not (pairs := abnormal_and_clean(folder)):
        raise ZooError(f"--inpainting-pairs {folder} has no pair such as train_abnormal_1.jpg and train_normal_1.jpg.")
    return pairs
