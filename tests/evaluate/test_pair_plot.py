"""The plot of a preference table shows the table's numbers."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.data.test_pair_statistics import ORIGIN, ROWS
from vargpt_rl.data.preferences import read_table, write_table
from vargpt_rl.evaluate.pair_plot import plot_pairs


@pytest.mark.parametrize("rewarded", [True, False])
def test_plots_a_table(tmp_path, monkeypatch, rewarded):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: figures.append(figure) or save(figure, *args, **kw)
    )
    rows = [row | ({} if rewarded else {"chosen_reward": None}) for row in ROWS]
    write_table(tmp_path / "t.parquet", rows, ORIGIN if rewarded else None)
    plot_pairs(read_table(tmp_path / "t.parquet"), tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as image:
        assert image.size == (1000, 650) and len(image.convert("L").getcolors()) > 10
    reward, reference, scales, sources = figures[0].axes
    title, counts = figures[0].get_suptitle().splitlines()
    assert title == "4 pairs of 2 prompts at 256 px"
    assert counts.startswith("repeated: prompt 3, chosen image 2, rejected image 1, ")
    assert counts.endswith("; prompts without chosen image: 1") == rewarded
    assert [patch.get_data().values.sum() for patch in reward.patches] == ([2] if rewarded else [])
    assert [text.get_text() for text in reward.texts] == ([] if rewarded else ["no rewards"])
    assert reference.patches[0].get_data().values.sum() == 4
    assert [bar.get_height() for bar in scales.patches] == [9.0, -5.5]
    labels = [label.get_text() for label in sources.get_yticklabels()]
    assert labels == ["rejected: step-10", "rejected: step-90", "chosen: crisp", "chosen: sft/final", "chosen: shapes"]
    assert [text.get_text() for text in sources.texts] == ["75%", "25%", "50%", "25%", "25%"]
