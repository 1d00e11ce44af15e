"""The pictures are drawn from the real schedule and routes."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from flux_ext import pictures
from flux_ext.evaluation.frontier import LINES
from flux_ext.operators.patterns import Full, Streaming


def test_schedule_shows_every_block_once(tmp_path):
    """And each tile's own cost, with which all workers have the same, up to a block at either end and rounding."""
    core = pytest.importorskip("flux_ext._C")
    figure = pictures.schedule([300, 40], [300, 40], [[0, 1], [1, 0]], sparse=Streaming(16, 64), num_workers=5)
    bars = figure.axes[0].patches
    starts = [bar for bar in bars if to_hex(bar.get_facecolor()) == pictures._START]
    drawn = sum(bar.get_width() for bar in bars) - len(starts)
    ends = [max(bar.get_x() + bar.get_width() for bar in bars if round(bar.get_y() + 0.425) == w) for w in range(5)]
    assert all(abs(end - (drawn + len(starts)) / 5) < 2 for end in ends)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[1] == "sequence 0 (300 tokens), KV head 1: sparse" and "workers share" in names[-2]
    one = core.plan(
        np.array([300, 40], np.int32), np.array([300, 40], np.int32), np.array([[0, 1], [1, 0]], np.int32), 4,
        Full().numbers(), Streaming(16, 64).numbers(), 32, 128, 1,
    )  # fmt: skip
    assert drawn == one[:, 6].sum() > 0 and len(starts) == len(one)
    figure.savefig(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 1000


def test_routes(tmp_path):
    figure = pictures.routes({"retrieval": [1, 0.5, 0], "continuation": [0, 0, 0]})
    assert [t.get_text() for t in figure.axes[0].texts] == ["1.00", "0.50", "0.00", "0.00", "0.00", "0.00"]
    figure.savefig(tmp_path / "routes.png")
    assert (tmp_path / "routes.png").stat().st_size > 1000


@pytest.mark.parametrize("tasks", (1, 8))
def test_the_legend_of_all_ways_to_route_is_on_the_picture(tasks):
    marks = {name: [pictures.Mark(0.5, 0.9)] for name in LINES.values()}
    panels = {f"task {i}": pictures.Panel(marks, 1.0, True, True) for i in range(tasks)}
    figure = pictures.quality(marks, panels, list(LINES.values()))
    figure.draw_without_rendering()
    box, room = figure.legends[0].get_window_extent(), figure.bbox
    assert len(figure.legends[0].get_texts()) == len(LINES) + 1
    assert room.x0 <= box.x0 and box.x1 <= room.x1 and box.y1 <= room.y1
