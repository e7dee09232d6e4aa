"""Is a model given images it can take, and do as many tokens reach its blocks as the anatomy says? Prompts, registers
and the like that something else adds would be ranked as if they were patches, and nothing prices them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from lightning_mdc.errors import CalibrationError, UnsupportedModelError
from lightning_mdc.models.anatomy import Anatomy

log = logging.getLogger(__name__)


def count_probes(anatomy: Anatomy, *, ranked: bool) -> Iterator[tuple[Callable[[Any], Any], Callable[..., Any]]]:
    """Hooks for `probing` that compare what the first block, and each at which tokens can leave, is given.

    Args:
        ranked: whether tokens are scored: another count is refused then, and else said once.

    Raises:
        CalibrationError: from the hooks; images that the model cannot take.
        UnsupportedModelError: likewise; images of another size than it takes, or more or fewer tokens.
    """
    size: list[tuple[int, int]] = []  # of the images at hand, if the model is given images

    def see_images(model: nn.Module, args: Any, options: Any) -> None:
        given = [part for part in (*args, *options.values()) if isinstance(part, Tensor)]
        size[:] = [_size_of(anatomy, part) for part in given[:1] if part.ndim == 4]

    def count(name: str, block: nn.Module, args: Any) -> None:
        if not size or not args or args[0].ndim != 3:
            return
        height, width = anatomy.grid_of(size[0])
        if args[0].shape[1] == anatomy.num_prefix_tokens + height * width:
            return
        said = (
            f"{anatomy.name}: {name} is given {args[0].shape[1]} tokens, but of images of {size[0][0]}x{size[0][1]} "
            f"there are {anatomy.num_prefix_tokens} prefix tokens and {height}x{width} patches; something adds tokens "
            "or takes some away, and "
        )
        if ranked:
            raise UnsupportedModelError(
                f"{said}they would be taken for patches; pass dimensions=('heads', 'neurons'), or register a family "
                "that counts them (num_prefix_tokens, grid_of)"
            )
        _warn(f"{said}prices are without them")

    yield partial(anatomy.model.register_forward_pre_hook, with_kwargs=True), see_images
    if anatomy.tokens_at is not None or anatomy.stages:
        return  # not all blocks see the same
    for index, block in enumerate(anatomy.blocks):
        if index == 0 or block.point is not None:
            yield block.module.register_forward_pre_hook, partial(count, block.name)


def _size_of(anatomy: Anatomy, images: Tensor) -> tuple[int, int]:
    """(height, width) of images that the model can take."""
    channels, shape = anatomy.input_size[0], tuple(images.shape)
    if not images.is_floating_point():
        raise CalibrationError(
            f"images are {images.dtype}; {anatomy.name} takes floating-point ones, as it was trained on"
        )
    if images.shape[1] != channels:
        order = "; channels come first: images.permute(0, 3, 1, 2)" if images.shape[3] == channels else ""
        raise CalibrationError(f"images are {shape}; {anatomy.name} takes (n, {channels}, height, width){order}")
    size = (images.shape[-2], images.shape[-1])
    if anatomy.tokens_at is None:
        anatomy.grid_of(size)  # says if the model cannot take it
    return size


@cache
def _warn(text: str) -> None:
    log.warning(text)
