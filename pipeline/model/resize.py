"""Bilinear resizing in the two conventions for where a pixel is.

Half-pixel (PyTorch's `align_corners=False`): pixel i covers i to i + 1. Aligned corners
(TensorFlow's DeepLab): pixel i is the point i, and the first and last points of two grids meet.
"""

import torch
from torch.nn import functional

Size = tuple[int, int]
"""Height and width."""


def resize(images: torch.Tensor, size: Size, *, align_corners: bool) -> torch.Tensor:
    """Return images (n, c, h, w) at `size`, without antialiasing, as all references do."""
    if tuple(images.shape[-2:]) == size:
        return images
    return functional.interpolate(images, size, mode="bilinear", align_corners=align_corners)


def resize_rows(images: torch.Tensor, size: Size, rows: slice) -> torch.Tensor:
    """Return `rows` (start, stop) of `resize(..., align_corners=False)`, except for rounding."""
    if tuple(images.shape[-2:]) == size:
        return images[..., rows, :]
    # torch itself computes a row's position in fp32
    centers = torch.arange(rows.start, rows.stop, device=images.device, dtype=torch.float32)
    step = torch.tensor(images.shape[-2], dtype=torch.float32) / size[0]
    positions = ((centers + 0.5) * step.item() - 0.5).clamp_(min=0)
    sampled = _sample(images, positions, dim=-2)
    return resize(sampled, (len(positions), size[1]), align_corners=False)


def resize_aligned(
    logits: torch.Tensor,
    *,
    stride: Size,
    image_size: Size,
    size: Size,
    rows: slice = slice(None),
) -> torch.Tensor:
    """Return logits (n, k, fh, fw) at `size`, or `rows` of it; feature f is at pixel f x stride.

    Pixel p of the result is at pixel p x (image_size - 1) / (size - 1) of the image, so padding
    beyond `image_size` is left out.
    """
    down = _positions(image_size[0], size[0], stride[0], logits)[rows]
    across = _positions(image_size[1], size[1], stride[1], logits)
    return _sample(_sample(logits, down, dim=-2), across, dim=-1)


def _positions(image: int, size: int, stride: int, like: torch.Tensor) -> torch.Tensor:
    step = (image - 1) / (size - 1) / stride if size > 1 else 0.0
    return torch.arange(size, device=like.device, dtype=torch.float32) * step


def _sample(maps: torch.Tensor, positions: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Return the maps, linearly interpolated at `positions` along `dim`."""
    last = maps.shape[dim] - 1
    low = positions.floor().clamp(0, last)
    weight = (positions - low).clamp(0, 1).to(maps.dtype)
    if dim == -2:
        weight = weight[:, None]
    below = maps.index_select(dim, low.long())
    above = maps.index_select(dim, (low.long() + 1).clamp(max=last))
    return torch.lerp(below, above, weight)
