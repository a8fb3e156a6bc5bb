"""Training the image tokenizer: it learns, and gradients pass through the bits."""

import itertools

import pytest
import torch

from learners.image_tokenizer import ImageBatches, TokenizerTraining, learning_rate, reconstruction_loss
from tests.helpers.tiny import BITS, V1_CODES, V1_SIDES, Patches
from vargpt_rl.model.configuration import ImageTokenizerConfig
from vargpt_rl.model.families import load_model
from vargpt_rl.model.image_tokenizer import ImageTokenizer
from vargpt_rl.model.v1.image_tokenizer import PATIENCE

SIDE = 32
V1_SIDE = 16 * V1_SIDES[-1]


def tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "channel_multipliers": [1, 1, 1, 1, 1], "blocks_per_level": 1, "norm_groups": 4}
    return ImageTokenizer(ImageTokenizerConfig(bits=BITS, **sizes))


def squares(batch: int) -> torch.Tensor:
    """White images with a coloured quarter each."""
    images = torch.ones(batch, 3, SIDE, SIDE)
    for i, image in enumerate(images):
        image[i % 3, (i % 2) * 16 :][:16, :16] = -1
    return images


def test_a_few_steps_lower_the_loss():
    losses, steps = [], 30
    model = tokenizer()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    training = TokenizerTraining(model, itertools.repeat(squares(4)), steps, 3e-2)
    training.run(lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(1, steps + 1))
    assert losses[-1][1] < 0.7 * losses[0][1]
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unmoved
    assert not model.training


def test_straight_through_gradients_reach_every_weight_of_the_encoder():
    model = tokenizer()
    images = squares(2)
    reconstruction_loss(model.reconstruct(images), images).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_what_is_trained_is_what_is_decoded():
    model = tokenizer()
    images = squares(3)
    with torch.no_grad():
        trained = model.reconstruct(images)
        decoded = model.decode(model.encode(images).summed_Bdhw)
    # unit + (code - unit) rounds once more than code
    torch.testing.assert_close(trained.clamp(-1, 1), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "cancels"), [(16, False), (32, True), (48, False), (64, False)])
def test_weak_features_whose_codes_cancel_are_told_in_words(checkpoint, side, cancels):
    tokenizer = load_model(checkpoint, torch.float32).image_tokenizer
    assert cancels == (len(tokenizer.schedule_for(side)) % 2 == 0)
    batches = ImageBatches(Patches(), ["red", "#102030", "blue"], side, 2, seed=0)
    training = TokenizerTraining(tokenizer, batches, 2, 1e-3)
    if not cancels:
        training.run(lambda step, loss: None)
        return
    with torch.no_grad():
        images = next(ImageBatches(Patches(), ["red", "#102030", "blue"], side, 2, seed=0))
        assert not tokenizer.encode(images).summed_Bdhw.any()
    with pytest.raises(ValueError, match=r"^step 1: the gradient of the image tokenizer is not finite, .* odd number"):
        training.run(lambda step, loss: None)


def test_loss_weighs_objects_above_background():
    target = torch.ones(1, 3, 8, 8)
    target[..., :2, :2] = -1
    assert reconstruction_loss(target, target).item() == 0
    background, thing = target.clone(), target.clone()
    background[..., 7, 7] += 0.5
    thing[..., 0, 0] += 0.5
    ratio = reconstruction_loss(thing, target) / reconstruction_loss(background, target)
    assert ratio.item() == pytest.approx(5.0)


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [learning_rate(step, 1000, peak=2.0) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02)
    assert set(rates[99:701]) == {2.0}
    assert rates[1000] == 0
    assert all(a > b for a, b in itertools.pairwise(rates[700:]))


def test_batches_are_drawn_from_the_images_that_load():
    batches = ImageBatches(Patches(), ["red", "nothing", "black"], SIDE, 6, seed=0)
    assert [key for key, _ in batches.failures] == ["nothing"]
    images = torch.cat(list(itertools.islice(batches, 4)))
    assert images.shape == (24, 3, SIDE, SIDE)
    assert {tuple(image[:, 0, 0].tolist()) for image in images} == {(1.0, -1.0, -1.0), (-1.0, -1.0, -1.0)}
    again = torch.cat(list(itertools.islice(ImageBatches(Patches(), ["red", "nothing", "black"], SIDE, 6, 0), 4)))
    assert torch.equal(again, images), "the order is the seed's"


def test_no_loadable_image_is_an_error():
    with pytest.raises(ValueError, match="none of 1 images could be loaded"):
        ImageBatches(Patches(), ["nothing"], SIDE, 2, seed=0)


def test_images_train_features_but_not_codes(v1_checkpoint):
    tokenizer = load_model(v1_checkpoint, "auto").image_tokenizer
    images = torch.rand(2, 3, V1_SIDE, V1_SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def gradients(criterion) -> dict[str, torch.Tensor]:
        tokenizer.zero_grad(set_to_none=True)
        tokenizer.training_loss(images, criterion).backward()
        return {name: p.grad.clone() for name, p in tokenizer.named_parameters() if p.grad is not None}

    with_images, without = gradients(reconstruction_loss), gradients(lambda output, target: 0 * output.sum())
    for name in ("codebook.weight", "residual.0.weight"):
        torch.testing.assert_close(with_images[name], without[name])
        assert without[name].abs().max() > 0
    assert (with_images["to_latent.weight"] - without["to_latent.weight"]).abs().max() > 1e-6


def test_unused_codes_are_replaced_by_useful_ones(v1_checkpoint):
    tokenizer = load_model(v1_checkpoint, "auto").image_tokenizer
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tokenizer.codebook.weight[1:] = 1e3  # nothing is near these
    images = torch.rand(4, 3, V1_SIDE, V1_SIDE, generator=generator) * 2 - 1

    def used() -> int:
        with torch.no_grad():
            return len(tokenizer.encode(images).labels_BLs.unique())

    assert used() == 1
    torch.manual_seed(0)
    steps = 2 * PATIENCE + 10  # codes unused in the first round are replaced in the second
    training = TokenizerTraining(tokenizer, iter(lambda: images, None), steps, 1e-3)
    training.run(lambda step, loss: None)
    assert used() > V1_CODES // 2
    assert training.losses[-1] < training.losses[0]
