"""Dropped channels: which, how many, against a pass put together by hand, and nothing in any other pass."""

from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from nnunet_ssl.blocks.perturbation import FeatureDropout
from nnunet_ssl.errors import UserError

FEATURES = [4, 8, 16]


def network(dims: int, residual: bool = False) -> torch.nn.Module:
    kind, blocks = (ResidualEncoderUNet, "n_blocks_per_stage") if residual else (PlainConvUNet, "n_conv_per_stage")
    convolution = getattr(torch.nn, f"Conv{dims}d")
    return kind(
        1, 3, FEATURES, convolution, 3, [1, 2, 2], num_classes=3, n_conv_per_stage_decoder=1, deep_supervision=True,
        norm_op=getattr(torch.nn, f"InstanceNorm{dims}d"), norm_op_kwargs={"affine": True}, nonlin=torch.nn.LeakyReLU,
        **{blocks: 1},
    )  # fmt: skip


def images_of(dims: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, *[8] * dims, generator=torch.Generator().manual_seed(1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bottleneck_alone", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_pass_equals_encoder_masks_and_decoder_one_after_the_other(dims, residual, bottleneck_alone):
    net = network(dims, residual)
    dropout = FeatureDropout(net, 0.25, bottleneck_alone)
    images = images_of(dims)
    found = dropout(images, generator())
    drawn = generator()
    skips = net.encoder(images)
    for level in range(len(skips)):
        if bottleneck_alone and level < len(skips) - 1:
            continue
        kept = torch.rand((3, FEATURES[level], *[1] * dims), generator=drawn) >= 0.25
        skips[level] = skips[level] * kept / 0.75
    expected = net.decoder(skips)
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(found[0], net(images)[0]), "nothing was dropped"


def test_other_passes_are_untouched_and_there_are_no_further_weights():
    net = network(2)
    plain, names = [o.clone() for o in net(images_of(2))], list(net.state_dict())
    dropout = FeatureDropout(net, 0.5)
    dropout(images_of(2), generator())
    assert all(torch.equal(a, b) for a, b in zip(net(images_of(2)), plain))
    assert list(net.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(FeatureDropout(net, 0.0)(images_of(2), generator()), plain))


def test_a_pass_that_fails_leaves_nothing_behind():
    net = network(2)
    plain = net(images_of(2))[0].clone()
    dropout = FeatureDropout(net, 0.5)
    with pytest.raises(RuntimeError):
        dropout(torch.zeros(1, 7, 8, 8), generator())
    assert torch.equal(net(images_of(2))[0], plain)


def test_part_and_mean_of_the_channels_and_a_draw_per_image():
    net = network(2)
    seen: list[torch.Tensor] = []
    dropout = FeatureDropout(net, 0.3)
    net.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][-1]))
    images = images_of(2, 1).repeat(500, 1, 1, 1)
    dropout(images, generator())
    clean = net.encoder(images)[-1]
    dropped = (seen[0] == 0).flatten(2).all(2)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(seen[0][~dropped], clean[~dropped] / 0.7)
    torch.testing.assert_close(seen[0].mean(0), clean.mean(0), atol=0.15, rtol=0.15)
    assert len({tuple(row.tolist()) for row in dropped}) > 100
    again = dropout(images_of(2), generator(0))[0], dropout(images_of(2), generator(0))[0]
    assert torch.equal(*again)
    assert not torch.equal(again[0], dropout(images_of(2), generator(1))[0])


def test_gradient_reaches_the_encoder_through_what_is_left():
    net = network(2)
    sum(o.square().sum() for o in FeatureDropout(net, 0.5)(images_of(2), generator())).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in net.named_parameters() if "conv.weight" in n)


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"not found in Linear; expected encoder.output_channels"):
        FeatureDropout(torch.nn.Linear(2, 2))
