"""Pictures and plots that the report and the training callbacks show."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.evaluation import plot_usage, reconstruction_grid
from vistok.evaluation.pictures import ERROR_GAIN, error_map, to_rgb
from vistok.evaluation.plots import LIGHT, draw_usage, figure_png


def pixels(grid):
    return np.asarray(grid).astype(int)


def test_the_grid_has_three_rows_and_a_column_per_image():
    images = torch.zeros(4, 3, 128, 160)
    assert reconstruction_grid(images, images).size == (4 * 162 - 2, 3 * 130 - 2)


def test_rows_are_original_reconstruction_and_error_with_its_gain():
    originals, ours = torch.zeros(1, 3, 128, 128), torch.full((1, 3, 128, 128), 20 / 127.5)
    grid = pixels(reconstruction_grid(originals, ours))
    assert [grid[row, 0, 0] for row in (0, 130, 260)] == [128, 148, ERROR_GAIN * 20]


def test_small_images_are_magnified_without_smoothing():
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    grid = pixels(reconstruction_grid(images, images))
    expected = images[0].mul(127.5).add(127.5).round().int().movedim(0, -1).numpy()
    assert np.array_equal(grid[:128:16, :128:16], expected)
    assert np.array_equal(grid[15:128:16, 15:128:16], expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_number_of_channels_gives_an_rgb_picture(channels):
    images = torch.zeros(2, channels, 16, 16)
    assert reconstruction_grid(images, images).mode == "RGB"


def test_transparency_is_laid_over_grey():
    image = torch.zeros(4, 2, 2, dtype=torch.uint8)
    assert to_rgb(image).unique().tolist() == [128]


def test_large_errors_are_white():
    black, white = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert error_map(black, white).unique().tolist() == [255]


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        reconstruction_grid(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8))


@pytest.mark.parametrize(
    "counts",
    [
        torch.tensor([5, 0, 2]),
        [torch.arange(4), torch.arange(9)],
        torch.zeros(4, dtype=torch.int64),
        torch.arange(5000),
    ],
    ids=["one", "several", "unused", "many"],
)
def test_usage_plots_are_pictures(counts, tmp_path):
    plot_usage(counts, tmp_path / "usage.png")
    with Image.open(tmp_path / "usage.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 500


def test_usage_falls_by_rank_on_a_logarithmic_axis():
    seen = []
    figure_png(lambda axes, theme: (draw_usage(axes, theme, torch.tensor([1, 0, 50, 7])), seen.append(axes)), LIGHT)
    line = seen[0].lines[0]
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == [50, 7, 1]
    assert seen[0].get_yscale() == "log"


def test_plots_leave_the_state_of_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    plot_usage(torch.tensor([1, 2]), tmp_path / "usage.png")
    assert plt.get_fignums() == []


def test_figures_in_a_page_are_transparent():
    png = figure_png(lambda axes, theme: draw_usage(axes, theme, torch.tensor([3, 1])), LIGHT)
    assert Image.open(io.BytesIO(png)).getpixel((0, 0))[3] == 0
