"""A family of one's own, in one file: a transformer that no library has, and what makes it prunable."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_mdc as mdc
from lightning_mdc.models import FAMILIES
from lightning_mdc.models import anatomy as parts
from lightning_mdc.tokens import Evidence
from lightning_mdc.tokens.block import stage_of, through
from tests.family_suite import FamilySuite
from tests.kinds import SIZE, randomised

PATCH, WIDTH = 8, 6
SIDE = SIZE // PATCH


class ToyAttention(nn.Module):
    """Separate q, k, v without biases; a table says how much each head likes class and patch tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * WIDTH, bias=False) for _ in range(3))
        self.liking = nn.Parameter(torch.zeros(2, heads))
        self.back = nn.Linear(heads * WIDTH, dim)

    def attend(self, x: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        makers = (self.to_q, self.to_k, self.to_v)
        q, k, v = (maker(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for maker in makers)
        is_patch = (torch.arange(x.shape[1], device=x.device) > 0).long()
        logits = q @ k.transpose(-2, -1) + self.liking[is_patch].T[:, None] + bias
        return self.back((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)), q, k


class ToyBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = ToyAttention(dim, heads)
        self.wide, self.narrow = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention.attend(self.before(x))[0]
        return x + self.narrow(self.wide(self.after(x)).relu())


class Toy(nn.Module):
    def __init__(self, dim: int = 24, depth: int = 4, heads: int = 4, hidden: int = 60) -> None:
        super().__init__()
        self.dim, self.stem = dim, nn.Linear(3 * PATCH**2, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, SIDE**2, dim))
        self.layer = nn.ModuleList(ToyBlock(dim, heads, hidden) for _ in range(depth))
        self.head = nn.Linear(dim, 5)

    def embed(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, PATCH, stride=PATCH).transpose(1, 2)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), self.stem(patches) + self.positions], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layer:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)[:, 0])


# --- the family -------------------------------------------------------------------------------------------------------


class ToyHalves:
    """Its block in two halves."""

    def attend(self: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Evidence]:
        y, q, k = self.attention.attend(self.before(x), 0.0 if bias is None else bias)
        return x + y, Evidence(q, k, 1.0)

    def finish(self: Any, x: Tensor) -> Tensor:
        return x + self.narrow(self.wide(self.after(x)).relu())


class ToyReader:
    """Its way through the blocks while tokens leave."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        return through(self.layer, self.embed(x), 1, self.plan.restore)


class ToyFamily(parts.Family):
    name, description = "toy", "the transformer of this test"

    def accepts(self, module: nn.Module) -> bool:
        return isinstance(module, Toy)

    def anatomy(self, model: Toy) -> parts.Anatomy:
        blocks = tuple(self.block(index, layer, model.dim) for index, layer in enumerate(model.layer))
        outside = SIDE**2 * model.stem.weight.numel() + model.head.weight.numel()
        return parts.Anatomy(
            model=model, name="Toy", family=self, blocks=blocks, dim=model.dim, num_prefix_tokens=1, class_rows=(0,),
            grid=(SIDE, SIDE), input_size=(3, SIZE, SIZE), grid_of=lambda size: (size[0] // PATCH, size[1] // PATCH),
            fixed_macs=lambda size, tokens: outside, reader=ToyReader,
            no_tokens="tokens left already" if any(block.stage for block in blocks) else None,
        )  # fmt: skip

    def block(self, index: int, layer: Any, dim: int) -> parts.Block:
        attention, name, hidden = layer.attention, f"layer.{index}", layer.narrow.in_features
        makers = (attention.to_q, attention.to_k, attention.to_v)
        of_heads = [*(parts.rows_of(maker)[0] for maker in makers), parts.columns_of(attention.back)[0]]
        heads = parts.Units(
            "heads", index, f"{name}.attention", attention.heads, WIDTH,
            slices=(*sum(of_heads, ()), parts.Slice(attention, "liking", dim=1, width=1)),
            sizes=(parts.Size(attention, "heads", lambda kept: kept),),
            reader=attention.back,
            macs=lambda kept, tokens: kept * (4 * tokens * dim * WIDTH + 2 * tokens**2 * WIDTH),
        )  # fmt: skip
        neurons = parts.Units(
            "neurons", index, name, hidden, 1,
            slices=parts.rows_of(layer.wide)[0] + parts.columns_of(layer.narrow)[0],
            sizes=parts.columns_of(layer.narrow)[1],
            reader=layer.narrow,
            macs=lambda kept, tokens: 2 * tokens * dim * kept,
            after_point=True,
        )  # fmt: skip
        point = parts.TokenPoint(ToyHalves, heads, parts.Channels(attention.to_v, 0, attention.to_v.weight.shape[0]))
        return parts.Block(name, layer, {"heads": heads, "neurons": neurons}, point=point, stage=stage_of(layer))

    def describe(self, model: Toy, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {"dim": model.dim, "depth": len(model.layer), "heads": sizes["heads"][0], "hidden": sizes["neurons"][0]}

    def build(self, spec: Mapping[str, Any]) -> nn.Module:
        return Toy(**spec)


class TestToy(FamilySuite):
    @pytest.fixture
    def dense(self) -> Iterator[nn.Module]:
        known = list(FAMILIES)
        mdc.models.register(ToyFamily())
        yield randomised(Toy())
        FAMILIES[:] = known
