"""Who holds what and how busy it is, packed, and unpacked as the page does."""

from __future__ import annotations

import base64

import numpy as np

from model.placement import Placement
from serving.engine.expert_load import ExpertLoad
from serving.ingress.http.ui.heat_map import LOAD_STEPS, MAX_CELLS, holder_map, load_map


def load_of(rows_LE: list[list[float]]) -> ExpertLoad:
    rows = np.array(rows_LE, dtype=np.float32)
    return ExpertLoad(*rows.shape, rows.tobytes())


def test_each_cell_names_the_ranks_that_hold_the_expert() -> None:
    holders = (((0,), (1,), (0, 1)), ((1,), (1,), (2,)))
    packed = holder_map(Placement(3, holders))
    assert packed is not None and (packed.num_layers, packed.num_experts) == (2, 3)
    cells = np.frombuffer(base64.b64decode(packed.cells), dtype="<u2").reshape(2, 3)
    assert tuple(tuple(packed.sets[cell] for cell in layer) for layer in cells) == holders


def test_a_large_model_fits_into_a_message() -> None:
    layer = tuple((expert % 16,) for expert in range(128))
    packed = holder_map(Placement(16, (layer,) * 94))
    assert packed is not None and len(packed.cells) == 32_088 and len(packed.sets) == 16
    assert holder_map(Placement(1, (((0,),) * (MAX_CELLS + 1),))) is None
    assert holder_map(Placement(1, ())) is None


def test_load_is_told_over_the_mean_of_its_layer() -> None:
    packed = load_map(load_of([[1, 1, 1, 1], [0, 0, 0, 8], [0, 0, 0, 0]]))
    assert packed is not None and packed.is_counted
    cells = np.frombuffer(base64.b64decode(packed.cells), dtype=np.uint8).reshape(3, 4)
    assert cells.tolist() == [[LOAD_STEPS] * 4, [0, 0, 0, 4 * LOAD_STEPS], [0] * 4]
    hot = load_map(load_of([[1000.0] + [0.0] * 99]))
    assert hot is not None and base64.b64decode(hot.cells)[0] == 255


def test_what_was_not_counted_says_so() -> None:
    packed = load_map(load_of([[0, 0]]))
    assert packed is not None and not packed.is_counted
    assert load_map(ExpertLoad(0, 0, b"")) is None
