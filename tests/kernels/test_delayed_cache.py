import torch

from focus_ray.kernels.delayed_cache import after_step, processing_set


def block(*values):
    return torch.tensor([values], dtype=torch.bool)


def test_the_first_step_of_a_block_takes_all():
    uncached = block(0, 1, 0, 1)
    assert processing_set(uncached, torch.tensor([True])).all()
    assert processing_set(uncached, torch.tensor([False])).equal(uncached)


def test_a_block_with_nothing_uncached_is_taken_whole():
    assert processing_set(block(0, 0, 0), torch.tensor([False])).all()


def test_a_token_leaves_once_it_and_its_right_neighbour_were_decoded():
    decoded = block(1, 1, 0, 1, 0, 1)
    # 0: both decoded; 1: neighbour masked; 3: neighbour masked; 5: the last needs no neighbour
    assert after_step(block(1, 1, 1, 1, 1, 1), decoded).equal(block(0, 1, 1, 1, 1, 0))


def test_masked_tokens_never_leave_and_none_comes_back():
    generator = torch.Generator().manual_seed(0)
    decoded = torch.zeros(50, 16, dtype=torch.bool)
    uncached = torch.ones(50, 16, dtype=torch.bool)
    for _ in range(40):
        before = uncached
        uncached = after_step(uncached, decoded)
        assert not (~decoded & ~uncached).any()
        assert not (uncached & ~before).any()
        decoded = decoded | (torch.rand(50, 16, generator=generator) < 0.1)
    assert processing_set(uncached, torch.zeros(50, dtype=torch.bool)).any(1).all()
