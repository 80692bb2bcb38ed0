"""Which tokens selections share, against counting in plain Python; and what is read off a run's records."""

import random

import numpy as np
import pytest

from pipeline.experiment.results import _enrichment
from pipeline.experiment.selections import overlap, select


def test_a_selection_is_the_top_of_each_pool_and_head_and_an_overlap_a_share_of_pairs() -> None:
    draw = random.Random(0)
    shape, k_percent, rows_a_pool = (6, 9, 3), 0.4, 2
    valid = np.array([draw.random() < 0.8 for _ in range(162)]).reshape(shape)
    chosen = []
    for seed in (1, 2):
        # Few values, so that there are ties.
        compared = np.random.default_rng(seed).integers(0, 5, shape).astype(np.float32)
        expected = set()
        for pool in range(3):
            for head in range(3):
                places = [(row, t, head) for row in (2 * pool, 2 * pool + 1) for t in range(9) if valid[row, t, head]]
                count = int(k_percent * len(places) + 0.5)
                expected |= set(sorted(places, key=lambda place: (-compared[place], place))[:count])
        selected = select(compared, valid, rows_a_pool, k_percent)
        assert {tuple(place) for place in np.argwhere(selected).tolist()} == expected
        chosen.append((selected, expected))
    (one, of_one), (other, of_other) = chosen
    for head, share in enumerate(overlap(one, other)):
        both, either = ({place for place in places if place[2] == head} for places in (of_one & of_other, of_one | of_other))
        assert share == pytest.approx(len(both) / len(either))
    assert overlap(one, one) == [1.0] * 3


def test_enrichment_over_time_is_a_sources_share_of_the_selected_over_its_share_of_all() -> None:
    steps = [
        {
            "tokens": 100 * number,
            "selected_ratio_head_1": 0.5,
            "selected_ratio_head_1_source_code": 0.5 + number / 100,
            "selected_ratio_head_1_source_random": None,
        }
        for number in range(1, 21)
    ]
    found = _enrichment(steps, num_heads=2)
    assert [point["tokens"] for point in found] == [100 * number for number in range(2, 21, 2)]
    assert [point["code"] for point in found] == pytest.approx([1 + (2 * number - 0.5) / 50 for number in range(1, 11)])
    assert not any("random" in point for point in found)
    assert _enrichment([{"tokens": 1, "selected_ratio_head_0": 1.0}], num_heads=1) == []
