"""Head importance: the equations, what chance does, and intervals."""

import numpy as np
import pytest

from hawk_trt.apps.evaluate.importance import importance
from hawk_trt.errors import InvalidInput


def test_weights_are_the_equations_of_the_method():
    rng = np.random.default_rng(3)
    tables = [rng.integers(0, 2, (40, 5)).astype(float), rng.random((25, 5))]
    expected = np.zeros(4)
    for table in tables:
        d = [table[:, 0].mean() - table[:, 1 + head].mean() for head in range(4)]
        above = [value - min(d) for value in d]
        expected += [value / sum(above) / len(tables) for value in above]
    found = importance(tables)
    np.testing.assert_allclose(list(found.weights), expected, rtol=1e-12)
    assert sum(found.weights) == pytest.approx(1.0)
    assert all(low <= high for low, high in found.intervals)


def test_a_data_set_in_which_no_head_matters_has_no_say():
    matters = np.ones((30, 4))
    matters[:10, 2] = 0.0
    flat = np.ones((50, 4))
    found = importance([flat, matters])
    assert list(found.weights) == [0.0, 1.0, 0.0]
    assert found.by_dataset == (None, (0.0, 1.0, 0.0))
    with pytest.raises(InvalidInput, match="no head matters more than another"):
        importance([flat, flat])


def test_chance_is_not_taken_for_importance_and_importance_not_for_chance():
    rng = np.random.default_rng(0)
    chance = [rng.random((60, 9)) < 0.8 for _ in range(20)]
    told = sum(importance([table.astype(float)]).differs_from_uniform for table in chance)
    assert told <= 4  # 1 of 20 is expected at 5 %
    real = (rng.random((60, 9)) < 0.8).astype(float)
    real[:, 4] = rng.random(60) < 0.4
    assert importance([real]).differs_from_uniform


def test_intervals_shrink_with_more_questions():
    rng = np.random.default_rng(1)
    table = (rng.random((800, 5)) < [0.9, 0.9, 0.5, 0.7, 0.9]).astype(float)
    few, many = importance([table[:40]]), importance([table])
    widths = [np.diff(found.intervals[1:3]).ravel() for found in (few, many)]
    assert (widths[1] < widths[0]).all()
    assert many.intervals[1][0] > 1 / 4
