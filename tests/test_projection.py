"""The pulls against their closed forms."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ato_optim.projection import halfspace, masked_shares, proximal, timed

vectors = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6)
thresholds = st.floats(0, 20, width=32)


@given(vectors, thresholds)
def test_proximal_is_the_minimiser(values, threshold):
    """No point is better for 1/2 |x - w|^2 + t |x|: not the origin, not a neighbour; zero stays zero."""
    w = torch.tensor(values, dtype=torch.float64)
    x = proximal(w.norm()[None], torch.tensor([threshold], dtype=torch.float64)) * w

    def objective(point):
        return 0.5 * (point - w).square().sum() + threshold * point.norm()

    best = objective(x)
    assert best <= objective(torch.zeros_like(w)) + 1e-9
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(5):
            step = scale * torch.randn(w.shape, generator=generator, dtype=torch.float64)
            assert best <= objective(x + step) + 1e-9


def test_zero_groups_stay_zero_without_nan():
    norm = torch.tensor([0.0, 0.0, 2.0])
    threshold = torch.tensor([0.0, 1.0, 0.0])
    assert proximal(norm, threshold).tolist() == [0.0, 0.0, 1.0]
    assert halfspace(norm, threshold, 0.5).tolist() == [0.0, 0.0, 1.0]


@given(vectors, thresholds, st.floats(0, 0.99))
def test_halfspace_by_its_definition(values, threshold, epsilon):
    w = torch.tensor(values, dtype=torch.float64)
    norm = w.norm()
    stepped = w - threshold * w / norm if norm > 0 else w
    if norm == 0 or abs(stepped @ w - epsilon * norm**2) < 1e-9 * norm**2:
        return
    expected = torch.zeros_like(w) if stepped @ w < epsilon * norm**2 else stepped
    factor = halfspace(norm[None], torch.tensor([threshold], dtype=torch.float64), epsilon)
    torch.testing.assert_close(factor * w, expected)


def test_timed_pull_is_a_straight_line_to_exact_zero_whatever_else_happens():
    w, left = torch.tensor([3.0, -4.0]), 10
    for k in range(10):
        w = w * timed(left - k)
        torch.testing.assert_close(w.norm().item(), 5.0 * (9 - k) / 10)
    w = torch.tensor([3.0, -4.0])
    for k in range(10):
        w = (w + 7.0) * timed(left - k)
    assert w.tolist() == [0.0, 0.0]


def test_masked_shares():
    mask = torch.tensor([True, False, False, False, True])
    layer = torch.tensor([0, 0, 1, 1, 2])
    assert masked_shares(mask, layer, 3).tolist() == torch.tensor([1 / 3, 1 / 3, 2 / 3, 2 / 3, 0]).tolist()
    assert masked_shares(torch.ones(5, dtype=torch.bool), layer, 3).tolist() == [0.0] * 5
