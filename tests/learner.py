"""A method that learns by gradient, with all that a resume may lose: dropout, noise, momentum, a schedule."""

import torch
from torch import nn

from zoo.module import AnomalyModule, Batch, Scores


class Learner(AnomalyModule):
    method, channels = "learner", 1

    def __init__(self, *, input_size: int = 32, seed: int = 0):
        super().__init__(input_size, seed)
        self.save_hyperparameters()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Conv2d(4, 1, 1)
            )

    def training_step(self, batch: Batch, index: int):
        x = self.prepare(batch.image)
        loss = (self.layers(x + 0.1 * torch.randn_like(x)) - x).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}]

    def forward(self, images, roi=None):
        x = self.prepare(images)
        found = (self.layers(x) - x).square()
        return Scores(found.amax((1, 2, 3)), nn.functional.interpolate(found, images.shape[-2:]))
