"""f-AnoGAN: Fast Unsupervised Anomaly Detection with GANs (Schlegl et al., MedIA 2019; its WGAN-GP: arXiv 1704.00028).

Idea: a generator learns to make normal images out of noise, against a critic; then an encoder learns to find the noise
that a given image comes from. What is not normal has none, and differs from what the generator makes instead of it.

Original code: tSchlegl/f-AnoGAN (MIT). Same as there: residual networks and their first weights, 64 x 64 grey pixels,
Wasserstein loss with gradient penalty, encoder izi_f on frozen networks; score = mean squared distance of the images +
kappa x that of the critic's features. The encoder ends in tanh, as in the paper (the code leaves the choice).
Deviations: input may be 128, by one more block before the others, of half as many channels; the generator's step comes
after the critic's fifth, not before its first, and its BatchNorm sees the critic's noise too; running statistics move
by a tenth a step (there a hundredth) and RMSprop's mean square starts at 0 (there 1), for short fits; no batch is
dropped; no image is flipped in tests. The critic's features in scores, and its penalty, are float32 throughout. The map
is |x - G(E(x))|.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.fast import infer
from zoo.nn.maps import resize_map
from zoo.nn.precision import full_precision
from zoo.nn.seed import seeded

SMALLEST = 4  # positions a side of the smallest maps
WIDTHS = {64: (2, 4, 8, 16, 16), 128: (1, 2, 4, 8, 16, 16)}  # halves of `width`, of the finest maps to the smallest

PRESETS = {
    "original": {"data": {"batch_size": 64}, "trainer": {"max_steps": 52_618}},  # 7 epochs of 374, then 50,000
    "paper224": {  # 128 is the size next to 224 that the networks know; steps of MIIC as above
        "model": {"input_size": 128},
        "data": {"batch_size": 64},
        "trainer": {"max_steps": 52_618},
    },
    "lite": {
        # The encoder's rate is low: its tanh saturates at 3e-4 and learns nothing more.
        "model": {"width": 8, "critic_steps": 2, "gan_share": 0.7, "gan_lr": 1e-3, "encoder_lr": 1e-4},
        "data": {"batch_size": 8},
        "trainer": {"max_steps": 1200},
    },
}


class FAnoGAN(AnomalyModule):
    """A generator of normal images, and an encoder that finds the noise which an image is made from.

    Args:
        input_size: images are resized to this size, 64 or 128.
        channels: 1 (grey) or 3 (colour) of the images that the networks see.
        latent: length of the noise.
        width: channels of the maps of 64 x 64; those of the smallest maps are 8 times as many.
        critic_steps: of the critic for each one of the generator.
        penalty_weight: of the gradient penalty in the critic's loss.
        kappa: weight of the features in the encoder's loss and in the score.
        gan_share: of the fit's steps, before the encoder's begin; by default 7 epochs of MIIC out of 52,618 steps.
        flip: probability that an image is mirrored left to right in training.
        gan_lr: learning rate of Adam, for generator and critic.
        encoder_lr: learning rate of RMSprop, for the encoder.
        seed: of the first weights, the noise and the order of the images.
    """

    method = "fanogan"
    phases = ("gan", "encoder")

    def __init__(
        self,
        *,
        input_size: int | list[int] = 64,
        channels: int = 1,
        latent: int = 128,
        width: int = 64,
        critic_steps: int = 5,
        penalty_weight: float = 10.0,
        kappa: float = 1.0,
        gan_share: float = 0.04975,
        flip: float = 0.5,
        gan_lr: float = 1e-4,
        encoder_lr: float = 5e-5,
        seed: int = 0,
    ):
        super().__init__(input_size, seed, channels)
        self.save_hyperparameters()
        self.automatic_optimization = False
        side = self.size[0]
        if self.size != (side, side) or side not in WIDTHS:
            raise ZooError(f"--input-size is 64 or 128, not {input_size}: f-AnoGAN's networks are made for these.")
        if width < 2 or width % 2 or min(latent, critic_steps) < 1:
            raise ZooError("--width is even and at least 2, --latent and --critic-steps are at least 1.")
        if not 0 < gan_share < 1 or not 0 <= flip <= 1:
            raise ZooError("--gan-share is above 0 and below 1, --flip in [0, 1].")
        if min(penalty_weight, kappa) < 0 or min(gan_lr, encoder_lr) <= 0:
            raise ZooError("--penalty-weight and --kappa are at least 0, --gan-lr and --encoder-lr above 0.")
        wide = [part * width // 2 for part in WIDTHS[side]]
        with seeded(seed, 0):
            self.generator = Generator(latent, wide, channels)
            self.critic = Critic(channels, wide)
            self.encoder = Encoder(channels, wide, latent)

    def phase_at(self, step: int) -> int:
        return int(step >= round(self.hparams.gan_share * self.steps_planned))

    def on_train_start(self) -> None:
        if not self.phase_at(self.steps_planned - 1) or self.phase_at(self.hparams.critic_steps - 1):
            raise ZooError(
                f"--gan-share {self.hparams.gan_share} of {self.steps_planned} steps leaves generator or encoder none; "
                f"the generator's first comes after {self.hparams.critic_steps} of the critic (--critic-steps)."
            )
        super().on_train_start()

    def train(self, mode: bool = True) -> "FAnoGAN":
        super().train(mode)
        if int(self.phase):  # the encoder learns; what it learns from stays as it is
            self.generator.eval()
            self.critic.eval()
        return self

    def training_step(self, batch: Batch, index: int) -> None:
        generator, critic, encoder = self.optimizers()
        x = self.mirrored(self.prepare(batch.image))  # (B, C, S, S)
        if self.phase_now:
            with encoder.toggle_model():
                self.descend(encoder, self.encoder_loss(x))
            return
        with critic.toggle_model():
            self.descend(critic, self.critic_loss(x))
        if (self.steps_taken + 1) % self.hparams.critic_steps == 0:
            with generator.toggle_model():
                self.descend(generator, self.generator_loss(x))

    def mirrored(self, x: Tensor) -> Tensor:
        """Images (B, C, S, S), some of them mirrored left to right."""
        chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < self.hparams.flip
        return torch.where(chosen, x.flip(-1), x)

    def fakes(self, x: Tensor) -> Tensor:
        """As many new images as x has, float32."""
        return self.generator(torch.randn(len(x), self.hparams.latent, device=x.device)).float()

    def critic_loss(self, x: Tensor) -> Tensor:
        fake = self.fakes(x).detach()
        return self.total_loss(
            wasserstein=self.critic(fake).mean() - self.critic(x).mean(),
            penalty=self.hparams.penalty_weight * gradient_penalty(self.critic, x, fake),
        )

    def generator_loss(self, x: Tensor) -> Tensor:
        loss = -self.critic(self.fakes(x)).mean()
        self.tell(generator=loss)
        return loss

    def encoder_loss(self, x: Tensor) -> Tensor:
        residual, features = self.distances(x, self.rebuilt(x))
        return self.total_loss(residual=residual.mean(), features=self.hparams.kappa * features.mean())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        h = self.hparams
        return [
            torch.optim.Adam(self.generator.parameters(), h.gan_lr, (0.0, 0.9), fused=True),
            torch.optim.Adam(self.critic.parameters(), h.gan_lr, (0.0, 0.9), fused=True),
            # TensorFlow adds its 1e-10 within the root.
            torch.optim.RMSprop(self.encoder.parameters(), h.encoder_lr, alpha=0.9, eps=1e-5),
        ]

    def rebuilt(self, x: Tensor) -> Tensor:
        """What the generator makes of the noise found in images (B, C, S, S), float32."""
        return infer(self.generator, infer(self.encoder, x)).float()

    def distances(self, x: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared distances (B,) of pairs of images (B, C, S, S) float32, and of the critic's features of them."""
        with full_precision(x):
            features = self.critic.features(x) - self.critic.features(rebuilt)  # (B, 16 * 8 * width)
        return (x - rebuilt).square().mean(dim=(1, 2, 3)), features.square().mean(dim=1)

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        x = self.prepare(images)  # (B, C, S, S)
        rebuilt = self.rebuilt(x)
        residual, features = self.distances(x, rebuilt)
        if roi is not None:  # what lies outside is seen as it was rebuilt; a region can only take suspicion away
            inside = F.adaptive_max_pool2d(roi.float(), self.size) > 0  # (B, 1, S, S)
            residual, part = self.distances(torch.where(inside, x, rebuilt), rebuilt)
            features = torch.minimum(features, part)
        maps = (x - rebuilt).abs().mean(1, keepdim=True)  # (B, 1, S, S)
        return Scores(residual + self.hparams.kappa * features, resize_map(maps, images.shape[-2:]))


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Mean of (|gradient of the critic| - 1)^2 over points between images (B, C, S, S), a random one a pair, float32.

    (Gulrajani et al. 2017, arXiv 1704.00028, section 4)
    """
    with full_precision(real):
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        between = (real + share * (fake - real)).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)  # (B, C, S, S)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class Residual(nn.Module):
    """The sum of two paths."""

    def __init__(self, main: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.main, self.shortcut = main, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.shortcut(x)


def down(before: int, after: int, norm: Callable[[int], nn.Module]) -> Residual:
    """Maps (B, before, h, w) -> (B, after, h / 2, w / 2)."""
    main = nn.Sequential(
        *(norm(before), nn.ReLU(), conv(before, before, 3, bias=False)),
        *(norm(before), nn.ReLU(), conv(before, after, 3), nn.AvgPool2d(2)),
    )
    return Residual(main, nn.Sequential(nn.AvgPool2d(2), conv(before, after, 1, gain=1)))


def up(before: int, after: int) -> Residual:
    """Maps (B, before, h, w) -> (B, after, 2 h, 2 w)."""
    main = nn.Sequential(
        *(batch_norm(before), nn.ReLU(), nn.Upsample(scale_factor=2), conv(before, after, 3, bias=False)),
        *(batch_norm(after), nn.ReLU(), conv(after, after, 3)),
    )
    return Residual(main, nn.Sequential(nn.Upsample(scale_factor=2), conv(before, after, 1, gain=1)))


def trunk(channels: int, wide: list[int], norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Images (B, C, S, S) -> features (B, 16 * wide[-1])."""
    blocks = [down(before, after, norm) for before, after in pairwise(wide)]
    return nn.Sequential(conv(channels, wide[0], 3, gain=1), *blocks, nn.Flatten())


class Generator(nn.Sequential):
    """Noise (B, latent) -> images (B, C, S, S) in [-1, 1]."""

    def __init__(self, latent: int, wide: list[int], channels: int):
        first = [linear(latent, wide[-1] * SMALLEST**2), nn.Unflatten(1, (wide[-1], SMALLEST, SMALLEST))]
        blocks = [up(before, after) for before, after in pairwise(wide[::-1])]
        super().__init__(*first, *blocks, batch_norm(wide[0]), nn.ReLU(), conv(wide[0], channels, 3), nn.Tanh())


class Critic(nn.Module):
    """Images (B, C, S, S) -> how real they look (B,), float32, unbounded; each by itself."""

    def __init__(self, channels: int, wide: list[int]):
        super().__init__()
        self.features = trunk(channels, wide, layer_norm)
        self.last = linear(wide[-1] * SMALLEST**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)  # (B, 16 * wide[-1])
        with full_precision(x):
            return self.last(features.float())[:, 0]


class Encoder(nn.Sequential):
    """Images (B, C, S, S) -> noise (B, latent) in [-1, 1]."""

    def __init__(self, channels: int, wide: list[int], latent: int):
        super().__init__(trunk(channels, wide, batch_norm), linear(wide[-1] * SMALLEST**2, latent), nn.Tanh())


def layer_norm(channels: int) -> nn.Module:
    """Over all channels and positions of one image; each channel has its own scale and shift."""
    return nn.GroupNorm(1, channels)


def batch_norm(channels: int) -> nn.Module:
    """With TensorFlow's epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3)


def conv(before: int, after: int, kernel: int, bias: bool = True, gain: float = 2**0.5) -> nn.Module:
    """A convolution that keeps the size; its weights start with variance 2 gain^2 / (inputs + outputs) of a value."""
    return start(nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=bias), gain)


def linear(before: int, after: int) -> nn.Module:
    """A linear layer that starts likewise."""
    return start(nn.Linear(before, after), 1)


def start(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
