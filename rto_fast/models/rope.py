"""Tables of the rotary embedding (RoPE) of a model, for all its passes."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rto_fast.models.context import VARYING, context_of


class RopeTables:
    """Cosines and sines of positions from a model's own module, [positions, 2, R] for each kind of its layers.

    `rto_fast.kernels.layer_reference.rotate` describes the layout. A table grows in powers of two and else stays where it
    is, because CUDA graphs hold its address. Rows never change, so sampling and training rotate by the same bits.

    Args:
        module: `rotary_emb` of a transformers backbone.
        names: types of layers, as the module knows them; one empty name if all layers have the same table.
    """

    def __init__(self, module: Any, names: Sequence[str]):
        self.module, self.names = module, names
        self.tables: dict[str, Tensor] = {}

    @property
    def varies(self) -> bool:
        """Whether the table depends on the longest position of a pass."""
        types = self.module.rope_type
        return not set(VARYING).isdisjoint(types.values() if isinstance(types, dict) else [types])

    def addresses(self) -> tuple[int, ...]:
        """Where the tables are now."""
        return tuple(table.data_ptr() for table in self.tables.values())

    def prepare(self, longest: int, like: Tensor) -> None:
        """Makes the tables of `longest` positions, with the dtype and device of `like`.

        The module of a type that `varies` waits for the device. So it is not asked again for a table that a pass can use:
        up to the original context all have the same frequencies, past it those of one number of positions have.
        """
        size, most = 1 << (longest - 1).bit_length(), sys.maxsize
        if self.varies:
            size, most = longest, max(longest, context_of(self.module.config) or 0)
        for name in self.names:
            table = self.tables.get(name)
            fits = table is not None and longest <= len(table) <= most
            if table is not None and (table.device, table.dtype) != (like.device, like.dtype):
                table = None
            if table is None or not fits:
                self.tables[name] = self._table(name, size, like)
                if table is not None and not self.varies:
                    # A row keeps its bits while the table grows: transformers 5.17 computes angles by cuBLAS.
                    self.tables[name][: len(table)] = table

    def rows(self, position_ids: Tensor, longest: int, like: Tensor) -> dict[str, Tensor]:
        """Cosines and sines of the positions [T] of a pass, [T, 2, R] for each name.

        Args:
            longest: the largest position plus 1, or a larger number.
            like: has the dtype and the device of the model.
        """
        self.prepare(longest, like)
        return {name: table.index_select(0, position_ids) for name, table in self.tables.items()}

    @torch.no_grad()
    def _table(self, name: str, positions: int, like: Tensor) -> Tensor:
        position_ids = torch.arange(positions, device=like.device)[None]
        cos, sin = self.module(like[:1, None], position_ids, *([name] if name else []))
        half = sin[0, :, : sin.shape[-1] // 2]
        return torch.stack([cos[0], torch.cat([-half, half], -1)], 1)
