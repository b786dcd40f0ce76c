"""Hints that are made of images."""

from __future__ import annotations

import torch

from wuerstchen_core.training.data.hints import (
    colour_blocks,
    contours,
    draw_boxes,
    filled,
    outlines,
    silhouettes,
    widened,
)


def disc(size: int = 64) -> torch.Tensor:
    """A red disc with a blue hole and a green dot in it, on yellow: [1, 3, size, size], and its distance field."""
    axis = torch.arange(size) - size / 2 + 0.5
    radius = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt() / size
    image = torch.tensor([1.0, 1.0, 0.0])[:, None, None].repeat(1, size, size)
    image[:, radius < 0.4] = torch.tensor([[1.0], [0.0], [0.0]])
    image[:, radius < 0.2] = torch.tensor([[1.0], [1.0], [0.0]])  # the background's colour
    return image[None]


def area(shape: torch.Tensor) -> float:
    return float(shape.mean())


def test_outlines_are_edges_and_contours_only_those_to_the_outside() -> None:
    image, size = disc(), 64
    edges, outer = outlines(image), contours(image)
    assert tuple(edges.shape) == (1, 1, size, size) and set(edges.unique().tolist()) == {0.0, 1.0}
    assert area(edges) > 1.5 * area(outer) > 0 and not edges[0, 0, 32, 32] and not edges[0, 0, 2, 2]
    axis = torch.arange(size) - size / 2 + 0.5
    radius = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt() / size
    assert ((radius[outer[0, 0] > 0] - 0.4).abs() < 0.04).all()


def test_silhouettes_include_holes_and_equal_their_filled_contours() -> None:
    image = disc()
    thing = silhouettes(image)
    assert abs(area(thing) - 3.14159 * 0.4**2) < 0.01
    assert torch.equal(filled(contours(image)), thing) and torch.equal(filled(thing), thing)
    mirrored = silhouettes(torch.cat([image, 1 - image]).flip(-1))
    assert torch.equal(mirrored[0], thing[0].flip(-1)) and torch.equal(mirrored[1], mirrored[0])


def test_only_what_is_enclosed_is_filled() -> None:
    maze = torch.zeros(1, 1, 9, 9)
    maze[..., 1, 1:8] = maze[..., 7, 1:8] = maze[..., 1:8, 1] = maze[..., 1:6, 7] = 1  # a box with a door
    maze[..., 3, 3:7] = maze[..., 3:6, 3] = 1  # and walls in it
    assert torch.equal(filled(maze), maze)
    closed = maze.clone()
    closed[..., 6, 7] = 1
    assert int(filled(closed).sum()) == 49


def test_lines_are_widened_in_units_of_the_picture() -> None:
    line = torch.zeros(1, 1, 256, 256)
    line[..., 128] = 1
    assert torch.equal(widened(line, 1), line)
    assert [int(widened(line, width).sum() / 256) for width in (1.4, 2, 3, 4.6)] == [1, 2, 3, 5]
    large = torch.zeros(1, 1, 1024, 1024)
    large[..., 512] = 1
    assert int(widened(large, 3).sum() / 1024) == 9


def test_blocks_of_colour_and_boxes() -> None:
    blocks = colour_blocks(disc(64))
    assert tuple(blocks.shape) == (1, 3, 64, 64) and (blocks[..., :8, :8] == blocks[..., :1, :1]).all()
    assert abs(float(blocks.mean()) - float(disc(64).mean())) < 1e-5
    boxes = draw_boxes([[(0, 0, 4, 4), (4, 2, 3, 5)], []], (8, 8))
    assert tuple(boxes.shape) == (2, 3, 8, 8) and not boxes[1].any()
    assert boxes[0].sum((1, 2)).tolist() == [16, 15, 0] and boxes[0, :, 3, 5].tolist() == [0, 1, 0]
