"""What the consistency term of SupTC and SemiTC can teach, without training: toy networks at the defaults."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_ssl.methods import nnUNetTrainerSemiTC
from nnunet_ssl.testing.tiny import TinyDataset

PATCHES = [(48, 48), (128, 128), (16, 24, 32), (32, 48, 32), (8, 48, 48)]
EXAMPLES = 16


def logits_at(places: torch.Tensor, shape, certainty: float = 1.0) -> torch.Tensor:
    """Two classes at places (B, D, *S): a softened ellipsoid off the center, with a boundary of about two voxels."""
    side = torch.tensor(shape, dtype=torch.float32).view(-1, *[1] * len(shape))
    radius = ((places - 0.45 * side) / (0.3 * side)).square().sum(1, keepdim=True).sqrt()
    surely = 0.3 * min(s for s in shape if s > 8) * (1 - radius)
    return certainty * torch.cat([-surely, surely], 1).clamp(-4, 4)


def voxels(shape) -> torch.Tensor:
    return torch.from_numpy(np.indices(shape).astype(np.float32))[None].expand(EXAMPLES, -1, *[-1] * len(shape))


@pytest.fixture
def loss():
    """Of the consistency, by default."""
    return nnUNetTrainerSemiTC.Parameters().consistency_loss


@pytest.fixture(params=PATCHES, ids=str)
def drawn(request, tmp_path, loss):
    """A trainer at its defaults but for the loss, two transforms of each example, and the patch."""
    shape, settings = request.param, {"supervised_fraction": 0.0, "consistency_loss": loss}
    trainer = TinyDataset(tmp_path, shape).initialized(nnUNetTrainerSemiTC, **settings)
    transform = trainer.transforms.draw(torch.zeros(2 * EXAMPLES, 1, *shape), torch.Generator().manual_seed(0))
    return trainer, *transform.halves(), shape


def costs(drawn) -> tuple[float, float, float]:
    """Of a network that follows the transforms, of one that follows and is unsure, and of one that ignores them."""
    trainer, t1, t2, shape = drawn
    places = voxels(shape)

    def cost(certainty=1.0, follows=True):
        moved = [logits_at(places + t.displacement * follows, shape, certainty) for t in (t1, t2)]
        return trainer.consistency(*moved, t1, t2).item()

    return cost(), cost(certainty=0.2), cost(follows=False)


def test_a_network_that_follows_the_transform_costs_less_than_one_that_ignores_it_or_is_unsure(drawn):
    """By more than a field without rotation and scaling would tell: in small 3D patches that was 0.003."""
    follows, unsure, ignores = costs(drawn)
    assert follows < ignores - 0.02
    assert follows < 0.6 * unsure


@pytest.mark.parametrize("loss", ["tanimoto"])
def test_without_entropy_unsure_networks_that_follow_cost_nothing(drawn, loss):
    trainer, t1, t2, shape = drawn
    places = voxels(shape)
    follows, unsure, ignores = costs(drawn)
    # Interpolation blurs what follows; that is all.
    assert follows < 0.15 * ignores
    # One that follows and is unsure is no worse than one that follows and is sure.
    assert unsure < 0.15 * ignores
    unmoved = [t._replace(matrix=t.matrix * 0 + torch.eye(len(shape)), elastic=t.elastic * 0) for t in (t1, t2)]
    equal = logits_at(places, shape, certainty=0.2)
    assert trainer.consistency(equal, equal, *unmoved).item() < 1e-6


def test_the_transform_moves_voxels(drawn):
    trainer, t1, t2, _ = drawn
    moved = [t.displacement.norm(dim=1).mean().item() for t in (t1, t2)]
    assert np.mean(moved) > 2 * (1 - trainer.hp.identity_probability)
    aligned, compared = trainer.transforms.align(t1, t2)
    assert aligned.norm(dim=1).mean() > 2
    assert compared.float().mean() > 0.6
