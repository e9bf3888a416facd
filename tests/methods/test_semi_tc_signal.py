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


@pytest.fixture(params=PATCHES, ids=str)
def drawn(request, tmp_path):
    """A trainer at its defaults, two transforms of each example, and the patch."""
    shape = request.param
    trainer = TinyDataset(tmp_path, shape).initialized(nnUNetTrainerSemiTC, supervised_fraction=0.0)
    transform = trainer.transforms.draw(torch.zeros(2 * EXAMPLES, 1, *shape), torch.Generator().manual_seed(0))
    return trainer, *transform.halves(), shape


def test_a_network_that_follows_the_transform_costs_less_than_one_that_ignores_it(drawn):
    trainer, t1, t2, shape = drawn
    places = voxels(shape)

    def cost(certainty=1.0, follows=True):
        moved = [logits_at(places + t.displacement * follows, shape, certainty) for t in (t1, t2)]
        return trainer.consistency(*moved, t1, t2).item()

    follows, unsure, ignores = cost(), cost(certainty=0.2), cost(follows=False)
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
