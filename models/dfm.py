"""Deep feature modelling: what of an image can combinations of good images not explain?

DFM (Ahuja et al., 2019): a PCA of an encoder's map, pooled and flattened, and the length of what it cannot
reconstruct. It sees what is wrong with an image as a whole if parts lie at the same positions in all images.
Closed form, beyond the paper (docs/beyond.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import resize
from models.constants import MAP_SIZE
from models.statistics import folds, map_range

POOLING = 2  # positions of the map at 1/16 of the 256 view that are averaged, in each direction
SIDE = 8  # of the pooled map
VARIANCE = 0.97  # of the training images, which the components explain
MAX_IMAGES = 1000  # training images to fit to: the fit is quadratic in them


class DeepFeatureModel(nn.Module):
    """Pooled maps in, reconstruction errors out.

    Args:
        channels: C of the map at 1/16.
        count: K, of the components.
    """

    mean: Tensor  # (1, C * 64), of the training images' pooled maps
    components: Tensor  # (K, C * 64), of their PCA, orthonormal rows
    # (1, 8, 8), mean error at each position of training images that the PCA was not fitted to.
    baseline: Tensor
    # Quantiles of the validation maps.
    q_start: Tensor
    q_end: Tensor

    def __init__(self, channels: int, count: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels * SIDE**2))
        self.register_buffer("components", torch.zeros(count, channels * SIDE**2))
        self.register_buffer("baseline", torch.zeros(1, SIDE, SIDE))
        self.register_buffer("q_start", torch.tensor(0.0))
        self.register_buffer("q_end", torch.tensor(1.0))

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled maps (B, C, 8, 8) -> reconstruction error at each position (B, 8, 8)."""
        return _errors(pooled, self.mean, self.components)

    def score(self, errors: Tensor) -> Tensor:
        """Errors (B, 8, 8) -> that of the whole image, (B,)."""
        return errors.square().sum((1, 2)).sqrt()

    def anomaly_map(self, errors: Tensor) -> Tensor:
        """Errors (B, 8, 8), less those of good images at the same position -> (B, 64, 64), not scaled."""
        return resize((errors - self.baseline)[:, None], (MAP_SIZE, MAP_SIZE))[:, 0]

    def scaled(self, errors: Tensor) -> Tensor:
        """Errors (B, 8, 8) -> (B, 64, 64), comparable between images and branches."""
        return (self.anomaly_map(errors) - self.q_start) / (self.q_end - self.q_start)

    def fit_map_normalisation(self, validation: Tensor) -> None:
        """Set the quantiles from the errors of all validation images (N, 8, 8)."""
        start, end = map_range(self.anomaly_map(validation))
        self.q_start.copy_(start)
        self.q_end.copy_(end)


def pool(maps: tuple[Tensor, ...]) -> Tensor:
    """The encoder's maps of the 256 view, of which that at 1/16 counts -> (B, C, 8, 8)."""
    return F.avg_pool2d(maps[2], POOLING)


def fit(pooled: Tensor, channels: int) -> DeepFeatureModel:
    """Fit to training images' pooled maps (N, C, 8, 8); all but the quantiles of the validation maps."""
    mean, components = fit_pca(pooled)
    model = DeepFeatureModel(channels, len(components)).to(pooled.device)
    model.mean.copy_(mean)
    model.components.copy_(components)
    model.baseline.copy_(held_out_errors(pooled).mean(0, keepdim=True))
    return model


def fit_pca(pooled: Tensor) -> tuple[Tensor, Tensor]:
    """PCA of (N, C, 8, 8), by the N x N matrix of the images' products, in float64.

    Returns:
        Mean (1, D) and components (K, D), the fewest that explain `VARIANCE`; D = C * 64.
    """
    # MPS has neither float64 nor eigh.
    device = torch.device("cpu") if pooled.device.type == "mps" else pooled.device
    features = pooled.flatten(1).to(device).double()
    mean = features.mean(0, keepdim=True)
    centred = features - mean
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    explained = values.cumsum(0) / values.sum().clamp(min=1e-12)
    count = min(int((explained < VARIANCE).sum()) + 1, len(values))
    components = vectors[:, :count].T @ centred
    # Images that are all alike have no directions: rows of zeros.
    lengths = components.norm(dim=1, keepdim=True)
    components = torch.where(lengths > 1e-6, components / lengths.clamp(min=1e-6), 0)
    return mean.float().to(pooled.device), components.float().to(pooled.device)


def held_out_errors(pooled: Tensor) -> Tensor:
    """Errors (N, 8, 8) of training images (N, C, 8, 8), each by a PCA of the other folds.

    The errors of the images that a PCA was fitted to are far smaller than those of any other good image.
    Zeros for a single image.
    """
    held_out = torch.zeros(len(pooled), SIDE, SIDE, device=pooled.device)
    for others, left_out in folds(len(pooled)):
        held_out[left_out] = _errors(pooled[left_out], *fit_pca(pooled[others]))
    return held_out


def _errors(pooled: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    centred = pooled.flatten(1) - mean
    residual = centred - (centred @ components.T) @ components
    return residual.unflatten(1, (-1, SIDE, SIDE)).square().sum(1).sqrt()
