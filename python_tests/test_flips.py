"""Which layers a step flips."""

import pytest
import torch
from tiny_training import trainer

from flux_ext.training import Recipe
from flux_ext.training.flips import FlipChances


def noted(sizes, flips, times=50):
    chances = FlipChances(len(sizes), flips)
    for layer, size in enumerate(sizes):
        chances.note(layer, torch.tensor([size, -size] * times))
    return chances


def test_all_start_alike():
    chances = FlipChances(5, 2)
    assert torch.equal(chances.chances(), torch.full((5,), 0.4))
    for layer in range(4):  # the fifth was not seen yet
        chances.note(layer, torch.ones(10) * layer)
    assert torch.equal(chances.chances(), torch.full((5,), 0.4))
    chances.note(4, torch.zeros(10))
    assert not torch.equal(chances.chances(), torch.full((5,), 0.4))
    assert torch.equal(noted([0.0] * 5, 2).chances(), torch.full((5,), 0.4)), "where nothing is worth anything"


def test_chances_follow_the_worth_and_a_part_stays_even():
    got = noted([0.1, 0.2, 0.3, 0.4], 1).chances()
    assert torch.allclose(got, 0.7 * torch.tensor([0.1, 0.2, 0.3, 0.4]) + 0.3 / 4)


@pytest.mark.parametrize("flips", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", [[9.0, 0.1, 0.2, 0.1], [9.0, 9.0, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]])
def test_each_layer_is_drawn_with_its_chance(sizes, flips):
    chances = noted(sizes, flips)
    want = chances.chances()
    assert want.sum().item() == pytest.approx(flips, abs=1e-5) and want.min() > 0 and want.max() <= 1
    generator, drawn = torch.Generator().manual_seed(1), torch.zeros(4)
    for _ in range(500):
        layers = chances.draw(want, 4, generator)
        assert layers.shape == (4, flips) and all(len(set(row)) == flips for row in layers.tolist())
        drawn += layers.flatten().bincount(minlength=4)
    assert torch.allclose(drawn / 2000, want, atol=0.03)


def test_earlier_flips_are_forgotten():
    chances = noted([1.0, 1.0], 1)
    for _ in range(20):
        chances.note(0, torch.full((64,), 0.01))
    assert chances.chances()[0] < 0.3


def test_a_checkpoint_has_them_and_the_choice_cannot_change(tmp_path):
    recipe = Recipe(flip_choice="by_worth", budget=0.05)
    through = trainer(tmp_path / "one", recipe=recipe, max_steps=6)
    through.train()
    assert through.objective.chances.count.min() > 0
    trainer(tmp_path / "two", recipe=recipe, max_steps=6, save_strategy="steps", save_steps=3).train()
    folder = str(tmp_path / "two" / "checkpoint-3")
    resumed = trainer(tmp_path / "two", recipe=recipe, max_steps=6)
    resumed.train(resume_from_checkpoint=folder)
    for a, b in zip(through.routers.parameters(), resumed.routers.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(through.objective.chances.square, resumed.objective.chances.square)
    with pytest.raises(ValueError, match="was trained with flip_choice 'by_worth', not 'evenly'"):
        trainer(tmp_path / "two", recipe=Recipe(budget=0.05)).train(resume_from_checkpoint=folder)
