"""The order in which data is visited: a fresh permutation each epoch, restorable by two numbers."""

import torch


class ShuffledIndices:
    """Endless batches of indices into `size` items; each epoch visits every item once, in an order fixed by the seed."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError("there is no data to draw from")
        self.size, self.seed = size, seed
        self.epoch = self.position = 0
        self._order = self._permutation()

    def _permutation(self):
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return torch.randperm(self.size, generator=generator).tolist()

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if self.position == self.size:
                self.epoch += 1
                self.position = 0
                self._order = self._permutation()
            run = self._order[self.position : self.position + count - len(taken)]
            taken += run
            self.position += len(run)
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()
