"""Parameters of every preset, counted on meta, against what its paper or its checkpoint has: the table of the page."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from vidit.config import PRESETS, Model
from vidit.model.dit import DiT
from vidit.model.flops import parameter_count

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


class Row(NamedTuple):
    """How a preset is counted, and the number it is compared with: 0 where none is printed."""

    published: float
    channels: int
    text_width: int
    grid: tuple[int, int, int] = (1, 1, 1)
    changes: dict[str, Any] | None = None
    tolerance: float = 0.001
    note: str = ""
    second_width: int = 0


UCF: dict[str, Any] = {"grid": (5, 16, 16), "changes": {"cross_attention": "none"}, "tolerance": 0.01}
IMAGES = {"temporal_attention": False, "relative_position": "none", "rope_split": "quarter"}
PAIRED = "text to image, with T5-XXL and CLIP-L; the layers are taken to read their features as they are"
# As tests/unit/export/test_diffusers.py counts it, one tensor after the other.
CLASS = "the class of diffusers with its checkpoint's config"
ROWS: dict[str, Row] = {
    "S": Row(0, 8, 2048, (5, 16, 16), note="DiT's size; no W.A.L.T. of it is printed"),
    "B": Row(0, 8, 2048, (5, 16, 16), note="DiT's size; no W.A.L.T. of it is printed"),
    "L": Row(313e6, 8, 1, **UCF, note="the model for UCF-101, without text"),
    "XL": Row(460e6, 8, 1, **UCF, note="the model for UCF-101, without text"),
    "SR1": Row(1.3e9, 8, 2048, (5, 16, 28), tolerance=0.05, note="two digits are printed"),
    "SR2": Row(419e6, 8, 2048, (5, 16, 28), tolerance=0.01),
    "3B": Row(
        3e9, 8, 2048, (5, 16, 16), tolerance=0.04, note="its printed width, 9216, would make 50B; taken for the MLP's"
    ),
    "7B": Row(0, 8, 4096, (5, 16, 16), note="a size of this project"),
    "dit-XL-2": Row(675e6, 4, 0, tolerance=0.005, note="theirs embeds 1001 labels, 1.2M"),
    "wan-1.3B": Row(1_418_996_800, 16, 4096, tolerance=0, note=CLASS),
    "wan-14B": Row(14_288_491_584, 16, 4096, tolerance=0, note=CLASS),
    "cogvideox-2B": Row(1_693_783_872, 16, 4096, tolerance=0, note=CLASS + ", with 30 heads; the paper has 32"),
    "cogvideox-5B": Row(5_570_283_072, 16, 4096, tolerance=0, note=CLASS),
    "cogvideox-1.5-5B": Row(5_570_676_352, 16, 4096, tolerance=0, note=CLASS),
    "latte-1": Row(1_057_246_880, 4, 4096, tolerance=0, note=CLASS + "; the paper's 674M has no text"),
    "hunyuanvideo": Row(12_821_012_544, 16, 4096, tolerance=0, note=CLASS + "; the paper says 13B"),
    "opensora-2": Row(
        11e9, 16, 4096, tolerance=0.085, note="the paper says 11B of FLUX.1's backbone, of which 12B is said"
    ),
    "gentron-XL": Row(930.0e6, 4, 4096, changes=IMAGES, tolerance=0.03, note=PAIRED, second_width=768),
    "gentron-G": Row(3083.8e6, 4, 4096, changes=IMAGES, tolerance=0.01, note=PAIRED, second_width=768),
    "opensora-plan-1.3": Row(2.7e9, 8, 4096, tolerance=0.03, note="two digits are printed"),
    "opensora-1.2": Row(1.1e9, 4, 4096, tolerance=0.1, note="28 + 28 blocks with attention to text in both make 1.2B"),
}


def counted(name: str) -> int:
    row, c = ROWS[name], Model.preset(name, **(ROWS[name].changes or {}))
    with torch.device("meta"):
        model = DiT(c, row.channels, row.grid, row.text_width, row.second_width)
    found = sum(p.numel() for p in model.parameters())
    assert found == parameter_count(c, row.grid, row.channels, row.text_width, row.second_width)
    return found


def line(name: str) -> str:
    row, found = ROWS[name], counted(name)
    printed = f"{row.published / 1e6:,.1f} M" if row.published else ""
    off = (
        f"{100 * (found / row.published - 1):+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")
        if row.published
        else ""
    )
    text = f"{row.text_width} + {row.second_width}" if row.second_width else row.text_width
    return f"| `{name}` | {found / 1e6:,.1f} M | {printed} | {off} | {row.channels}, {text} | {row.note} |"


@pytest.mark.parametrize("name", ROWS)
def test_published(name: str) -> None:
    row = ROWS[name]
    if row.published:
        assert counted(name) == pytest.approx(row.published, rel=row.tolerance)


def test_the_table_of_the_page() -> None:
    assert set(ROWS) == set(PRESETS) - {"demo"}, "every preset has a row"
    table = "\n".join(line(name) for name in ROWS)
    assert table in PAGE.read_text(), f"docs/models.md lacks:\n{table}"


def test_files_of_the_model_stay_short() -> None:
    """One block of parts, not a copy of it for each family: no file is long, and the families add few."""
    sizes = {
        path.name: len(path.read_text().splitlines()) for path in (PAGE.parents[1] / "vidit" / "model").glob("*.py")
    }
    assert max(sizes.values()) <= 400, sizes
    del sizes["dit.py"]  # what all of them are
    assert not [name for name in PRESETS if any(f"{name.split('-')[0]}.py" == file for file in sizes)]
