"""Two processes distil as one does: the same loss at every step, and no teacher in the checkpoint."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_mdc as mdc
from lightning_mdc.distillation import DistillationModule
from tests.kinds import everyday
from tests.processes import two_ranks

STEPS, BATCH = 8, 8  # images per step, over all processes


def network(seed: int, depth: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=5, embed_dim=128, depth=depth, num_heads=4
    )


class Losses(L.Callback):
    """Loss of each step on this process's images."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(outputs["loss"].item())


def train(rank: int, root: Path, devices: int, average: bool) -> None:
    """Writes the losses of each process, and a checkpoint."""
    dense = network(1)
    torch.manual_seed(2)
    images, labels = torch.randn(STEPS * BATCH, 1, 16, 16), torch.randint(0, 5, (STEPS * BATCH,))
    scores = mdc.score(dense, [images[:8]])
    student = mdc.slim(dense, mdc.make_plan(dense, scores, mdc.Policy(heads=0.5, neurons=0.5, tokens=0.7))).train()
    module = DistillationModule(
        student,
        mdc.Teacher(dense, precision="32"),
        hidden_weight=0.5,
        optimizer={"lr": 1e-3},
        schedule={"warmup_epochs": 0},
    )
    losses = Losses()
    run = L.Trainer(
        accelerator="cpu",
        strategy="ddp" if devices > 1 else "auto",
        devices=devices,
        use_distributed_sampler=False,
        max_epochs=1,
        callbacks=[losses, *([EMAWeightAveraging(decay=0.9)] if average else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    data = TensorDataset(images, labels)
    share = DistributedSampler(data, devices, rank, shuffle=False)  # Lightning's own would shuffle
    run.fit(module, DataLoader(data, BATCH // devices, sampler=share))
    run.save_checkpoint(root / f"{devices}.ckpt")
    (root / f"losses-{devices}-{rank}.json").write_text(json.dumps(losses.seen))


@pytest.mark.parametrize("average", everyday(True, False))
def test_two_processes_are_as_good_as_one(tmp_path, average):
    two_ranks(train, tmp_path, 2, average)
    train(0, tmp_path, 1, average)
    alone, first, second = (json.loads((tmp_path / f"losses-{of}.json").read_text()) for of in ("1-0", "2-0", "2-1"))
    assert len(alone) == STEPS
    np.testing.assert_allclose((np.array(first) + second) / 2, alone, rtol=0, atol=1e-4)
    assert first != second

    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2))
    assert set(one) == set(two)
    for name, value in one.items():
        # No loss depends on the biases of keys, so that their steps are rounding, at the length of all others.
        parts = zip(*(weights[name].chunk(3) for weights in (one, two)), strict=True) if "qkv.bias" in name else []
        queries, _, values = list(parts) or [(value, two[name])] * 3
        for alone, together in (queries, values):
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-4, msg=name)

    checkpoint = torch.load(tmp_path / "2.ckpt", weights_only=True)
    networks = [two, checkpoint["current_model_state"]] if average else [two]  # Lightning keeps both
    student = sum(value.nbytes for weights in networks for value in weights.values())
    state = checkpoint["optimizer_states"][0]["state"].values()
    moments = sum(value.nbytes for values in state for value in values.values() if torch.is_tensor(value))
    teacher = sum(value.nbytes for value in network(1).state_dict().values())
    size = (tmp_path / "2.ckpt").stat().st_size
    assert moments > 1.9 * student / len(networks)
    assert teacher > 0.05 * (student + moments)  # else its absence could not be seen
    assert student + moments < size < 1.05 * (student + moments)
