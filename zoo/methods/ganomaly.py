"""GANomaly: Semi-Supervised Anomaly Detection via Adversarial Training (Akcay et al., ACCV 2018, arXiv 1805.06725).

Idea: an autoencoder learns to rebuild normal images, and a second encoder to find the code of the rebuilt image. What
is not normal is rebuilt as something else, so that the two codes differ.

Original code: samet-akcay/ganomaly (MIT). Same as there: DCGAN networks; the generator's loss, 1 x squared distance of
the discriminator's features, 50 x |x - x_hat|, 1 x squared distance of the codes; a discriminator whose loss collapses
starts anew; score = mean squared distance of the codes.
Deviations: input is 256 (there 32, of CIFAR), one channel; scores are raw, where there they are stretched over the test
set; images are scored by BatchNorm's running statistics (there by those of each test batch); the last batch of an epoch
is not dropped, the batches are of equal size within one image; the discriminator's loss is looked at in every tenth
step, there in each. The map, |x - x_hat|, is an extension of the zoo: the original has none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.learning import LOOK
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.dcgan import Decoder, Encoder, adversarial_loss, is_power_of_two, start
from zoo.nn.maps import resize_map
from zoo.nn.seed import seeded

COLLAPSED = 1e-5  # a discriminator's loss below it: the generator learns nothing from it any more

PRESETS = {
    "original": {"data": {"batch_size": 64}, "trainer": {"max_epochs": 15}},
    "paper224": {"data": {"batch_size": 64}, "trainer": {"max_epochs": 15}},
    "lite": {
        # A discriminator that weighs less: so small a generator loses its game in a few steps.
        "model": {"input_size": 64, "width": 16, "adversarial_weight": 0.01, "lr": 1e-3},
        "data": {"batch_size": 8},
        "trainer": {"max_steps": 2000},
    },
}


class GANomaly(AnomalyModule):
    """An autoencoder with a second encoder, trained against a discriminator.

    Args:
        input_size: images are resized to this size, a power of two.
        channels: 1 (grey) or 3 (colour) of the images that the networks see.
        latent: length of the codes.
        width: channels of the finest maps; each halving doubles them.
        adversarial_weight: of the distance of the discriminator's features in the generator's loss.
        contextual_weight: of the pixels' absolute error in it.
        latent_weight: of the codes' squared distance in it.
        lr: learning rate of Adam, for both networks.
        beta1: of Adam, its momentum.
        seed: of the first weights and the order of the images.
    """

    method = "ganomaly"

    def __init__(
        self,
        *,
        input_size: int | list[int] = 256,
        channels: int = 1,
        latent: int = 100,
        width: int = 64,
        adversarial_weight: float = 1.0,
        contextual_weight: float = 50.0,
        latent_weight: float = 1.0,
        lr: float = 2e-4,
        beta1: float = 0.5,
        seed: int = 0,
    ):
        super().__init__(input_size, seed, channels)
        self.save_hyperparameters()
        self.automatic_optimization = False
        side = self.size[0]
        if self.size != (side, side) or not is_power_of_two(side):
            raise ZooError(f"--input-size is a power of two (64, 128, 256), not {input_size}: GANomaly halves it to 4.")
        if min(adversarial_weight, contextual_weight, latent_weight) < 0:
            raise ZooError("--adversarial-weight, --contextual-weight and --latent-weight are at least 0.")
        if lr <= 0 or not 0 <= beta1 < 1 or min(latent, width) < 1:
            raise ZooError("--lr is above 0, --beta1 in [0, 1), --latent and --width are at least 1.")
        with seeded(seed, 0):
            self.generator = Generator(side, channels, width, latent)
            self.discriminator = Encoder(side, channels, width, 1)

    def training_step(self, batch: Batch, index: int) -> None:
        generator, discriminator = self.optimizers()
        x = self.prepare(batch.image)  # (B, C, S, S)
        with generator.toggle_model():
            rebuilt, code, again = self.generator(x)
            loss = self.generator_loss(x, rebuilt, code, again)
            self.descend(generator, loss)
        with discriminator.toggle_model():
            loss = adversarial_loss(self.discriminator(x), self.discriminator(rebuilt.detach()))
            self.tell(discriminator=loss)
            self.descend(discriminator, loss)
        if self.steps_taken % LOOK:  # the host waits for each look
            return
        if self.trainer.strategy.reduce_boolean_decision(bool(loss < COLLAPSED)):
            with seeded(self.hparams.seed, 1 + self.steps_taken):  # the same in all processes
                self.discriminator.apply(start)

    def generator_loss(self, x: Tensor, rebuilt: Tensor, code: Tensor, again: Tensor) -> Tensor:
        """Of images and rebuilt ones (B, C, S, S) and the codes of both (B, latent, 1, 1)."""
        h = self.hparams
        return self.total_loss(
            adversarial=h.adversarial_weight * F.mse_loss(self.discriminator.maps(rebuilt), self.discriminator.maps(x)),
            contextual=h.contextual_weight * F.l1_loss(rebuilt, x),
            latent=h.latent_weight * F.mse_loss(again, code),
        )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.generator, self.discriminator)
        return [
            torch.optim.Adam(part.parameters(), self.hparams.lr, (self.hparams.beta1, 0.999), fused=True)
            for part in parts
        ]

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        x = self.prepare(images)  # (B, C, S, S)
        rebuilt, code, again = self.generator(x)
        score = distance(code, again)
        if roi is not None:  # what lies outside is seen as it was rebuilt; a region can only take suspicion away
            inside = F.adaptive_max_pool2d(roi.float(), self.size) > 0  # (B, 1, S, S)
            _, code, again = self.generator(torch.where(inside, x, rebuilt))
            score = torch.minimum(score, distance(code, again))
        return Scores(score, resize_map((x - rebuilt).abs().float().mean(1, keepdim=True), images.shape[-2:]))


class Generator(nn.Module):
    """Images (B, C, S, S) -> rebuilt images, their codes and those of the rebuilt ones (B, latent, 1, 1)."""

    def __init__(self, size: int, channels: int, width: int, latent: int):
        super().__init__()
        self.encoder1 = Encoder(size, channels, width, latent)
        self.decoder = Decoder(size, channels, width, latent)
        self.encoder2 = Encoder(size, channels, width, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.encoder1(x)
        rebuilt = self.decoder(code)
        return rebuilt, code, self.encoder2(rebuilt)


def distance(code: Tensor, again: Tensor) -> Tensor:
    """Mean squared distance (B,) of two codes (B, latent, 1, 1), float32."""
    return (code.float() - again.float()).square().mean(dim=(1, 2, 3))
