"""Testing models on a device that has room for one of them."""

import torch
from torch import Tensor, nn

from lightning_mdc.app.evaluation import outcomes


class Watched(nn.Module):
    """Answers with one class, and notes when it is moved to the device and away."""

    def __init__(self, name: str, answer: int, moves: list[str]) -> None:
        super().__init__()
        self.name, self.answer, self.moves = name, answer, moves

    def to(self, device: torch.device) -> "Watched":
        self.moves.append(f"{self.name} to {device}")
        return self

    def cpu(self) -> "Watched":
        self.moves.append(f"{self.name} away")
        return self

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), self.answer), 3).float()


def test_models_are_on_the_device_one_at_a_time() -> None:
    moves: list[str] = []
    models = {name: Watched(name, number, moves) for number, name in enumerate(("dense", "slim"))}
    batches = [(torch.zeros(2, 1), torch.tensor([0, 1])), (torch.zeros(1, 1), torch.tensor([2]))]
    found = outcomes(models, batches, torch.device("cpu"), ("cat", "dog", "fox"))
    assert moves == ["dense to cpu", "dense away", "slim to cpu", "slim away"]
    assert found.labels.tolist() == [0, 1, 2]
    assert {name: classes.tolist() for name, classes in found.predicted.items()} == {
        "dense": [0, 0, 0],
        "slim": [1, 1, 1],
    }
