"""RandAugment and mixup: what they do, and that they depend on counters alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sam_repro.config.checks import validate
from sam_repro.config.compose import compose_config
from sam_repro.config.schema import AugmentConfig, DataConfig
from sam_repro.data.images.augment import OPERATIONS, cutout, mixup, rand_augment
from sam_repro.data.loaders.build import build_loader
from sam_repro.errors import UserError
from sam_repro.models.objective import loss_of

CPU = torch.device("cpu")


def image(seed=0, side=48):
    ramp = np.linspace(0, 255, side)
    return (
        np.stack([ramp[None] + 0 * ramp[:, None], ramp[:, None] + 0 * ramp, 99 + 0 * np.add.outer(ramp, ramp)], 2)
    ).astype(np.uint8)


def augmented(magnitude=10, **counters):
    pixels = image()
    rand_augment(pixels, magnitude, **({"seed": 0, "epoch": 0, "index": 0} | counters))
    return pixels


def test_randaugment_is_a_function_of_seed_epoch_and_index():
    assert np.array_equal(augmented(), augmented())
    for key in ("seed", "epoch", "index"):
        others = [augmented(**{key: i}) for i in range(1, 12)]
        assert sum(not np.array_equal(other, augmented()) for other in others) >= 9


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [1.0, 1.5])
def test_every_operation(name, level):
    from PIL import Image

    source = Image.fromarray(image())
    for sign in (-1.0, 1.0):
        result = OPERATIONS[name](source, level, sign, (0.3, 0.6))
        assert result.size == source.size and result.mode == "RGB"
        if name not in ("autocontrast", "equalize", "sharpness", "solarize"):  # little to do on a smooth ramp
            assert np.abs(np.asarray(result).astype(int) - image()).mean() > 0.5
    assert np.array_equal(np.asarray(source), image())


def test_the_loader_applies_it_in_training_only():
    data = DataConfig(name="synthetic", num_classes=5, image_size=32, eval_resize=32, workers=2)
    none, strong = (
        AugmentConfig(name="a", crop="none", flip=False),
        AugmentConfig(name="b", crop="none", flip=False, randaugment=10),
    )

    def batch(augment, training=True, workers=2):
        data.workers = workers
        options = {"split": "train", "training": training, "batch_size": 32, "seed": 3, "device": CPU}
        loader = build_loader(data, augment, **options)
        images, labels = next(iter(loader.epoch(1)))
        loader.close()
        return images, labels

    assert torch.equal(batch(none)[1], batch(strong)[1])
    assert (batch(none)[0] != batch(strong)[0]).flatten(1).any(1).float().mean() > 0.8
    assert torch.equal(batch(strong)[0], batch(strong, workers=1)[0])
    assert torch.equal(batch(none, training=False)[0], batch(strong, training=False)[0])


def mixed(images, labels, **changes):
    return mixup(images, labels, **({"p": 0.2, "classes": 4, "m": 4, "seed": 1, "step": 7} | changes))


def test_mixup_mixes_neighbours_within_groups():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 5, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8) % 4
    x, y = mixed(images, labels)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    for group in (slice(0, 4), slice(4, 8)):
        share = y[group].max(1).values
        assert torch.allclose(share, share[:1].expand(4)) and 0.5 <= share[0] <= 1
        own = images[group].float()
        expected = share[0] * own + (1 - share[0]) * own.roll(-1, 0)
        assert torch.allclose(x[group], expected, atol=1e-3)
    assert torch.allclose(y.sum(1), torch.ones(8))
    assert not torch.equal(mixed(images, labels, step=8)[0], x) and torch.equal(mixed(images, labels)[0], x)


def test_two_ranks_mix_as_one_process():
    images, labels = torch.randint(0, 256, (16, 3, 4, 4), dtype=torch.uint8), torch.arange(16) % 4
    whole = mixed(images, labels)
    halves = [mixed(images[8 * r : 8 * r + 8], labels[8 * r : 8 * r + 8], rank=r) for r in range(2)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([half[i] for half in halves]))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_losses_take_targets(loss):
    cfg = compose_config(["augment=strong", f"recipe.loss={loss}"])
    validate(cfg)
    function, z, y = loss_of(cfg), torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.allclose(function(z, F.one_hot(y, 4).double()), function(z, y))
    other = F.one_hot(y.roll(1), 4).double()
    between = 0.3 * F.one_hot(y, 4).double() + 0.7 * other
    assert torch.allclose(function(z, between), 0.3 * function(z, y) + 0.7 * function(z, y.roll(1)))


def test_files():
    medium, strong = compose_config(["augment=medium"]).augment, compose_config(["augment=strong"]).augment
    assert (medium.mixup, medium.randaugment, strong.mixup, strong.randaugment) == (0.2, 10, 0.2, 15)
    assert medium.scale == [0.05, 1.0] and medium.flip


def test_cutout_hides_a_square_of_the_mean_colour():
    images = torch.full((400, 3, 32, 20), 7, dtype=torch.uint8).to(memory_format=torch.channels_last)
    choice = {"side": 9, "mean": [0.4, 0.5, 0.6], "seed": 3, "step": 5}
    out = cutout(images, **choice)
    assert out.dtype == torch.uint8 and out.stride() == images.stride() and (images == 7).all()
    hidden = (out != 7).any(1)
    assert (out.movedim(1, -1)[hidden] == torch.tensor([102, 128, 153])).all()
    rows, columns = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), rows * columns)  # a full rectangle
    assert rows.max() == columns.max() == 9 and rows.min() == columns.min() == 5  # cut at the edges
    share = hidden.float().mean(0)
    assert share[4:-4, 4:-4].mean() == pytest.approx(81 / 640, rel=0.1)  # centres are uniform
    assert not torch.equal(cutout(images, **choice | {"step": 6}), out)
    halves = [cutout(images[i : i + 200], **choice, first=i) for i in (0, 200)]
    assert torch.equal(torch.cat(halves), out)  # two ranks hide what one does


def test_cutout_is_off_unless_asked_for():
    cfg = compose_config(["model=vit_b32", "optim=gsam", "augment=cifar"])
    assert cfg.augment.cutout == 0
    validate(compose_config(["model=vit_b32", "optim=gsam", "augment=cifar", "augment.cutout=16"]))
    with pytest.raises(UserError, match="augment.cutout=-1"):
        validate(compose_config(["model=vit_b32", "optim=gsam", "augment.cutout=-1"]))
