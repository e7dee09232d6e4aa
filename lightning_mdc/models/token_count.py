"""Do as many tokens reach the blocks as the anatomy says? Prompts, registers and the like that something else adds
would be ranked as if they were patches, and nothing prices them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from lightning_mdc.errors import UnsupportedModelError
from lightning_mdc.models.anatomy import Anatomy

log = logging.getLogger(__name__)


def count_probes(anatomy: Anatomy, *, ranked: bool) -> Iterator[tuple[Callable[[Any], Any], Callable[..., Any]]]:
    """Hooks for `probing` that compare what the first block, and each at which tokens can leave, is given.

    Args:
        ranked: whether tokens are scored: another count is refused then, and else said once.

    Raises:
        UnsupportedModelError: from the hooks; there are more or fewer tokens.
    """
    if anatomy.tokens_at is not None or anatomy.stages:
        return  # not all blocks see the same
    size: list[tuple[int, int]] = []  # of the images at hand, if the model is given images

    def see_images(model: nn.Module, args: Any, options: Any) -> None:
        given = [part for part in (*args, *options.values()) if isinstance(part, Tensor)]
        size[:] = [(part.shape[-2], part.shape[-1]) for part in given[:1] if part.ndim == 4]

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
    for index, block in enumerate(anatomy.blocks):
        if index == 0 or block.point is not None:
            yield block.module.register_forward_pre_hook, partial(count, block.name)


@cache
def _warn(text: str) -> None:
    log.warning(text)
