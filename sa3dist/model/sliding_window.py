"""Sliding-window attention in linear memory: queries in blocks, each against its own block of keys plus a halo.

Legend: B batch, H heads, N sequence, D head width, Q queries per block, K keys per block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_PER_BLOCK = 128


class SlidingWindow:
    """The band ``-left <= key - query <= right`` over ``length`` positions; built once, used by every layer.

    The largest tensor has N x K elements, with K = 128 + left + right rounded up to 8 for the fused kernels.
    """

    def __init__(self, length: int, left: int, right: int, device: torch.device):
        self.length, self.left = length, left
        self.queries = min(max(QUERIES_PER_BLOCK, left + right), length)
        self.blocks = -(-length // self.queries)
        self.keys = -(-(self.queries + left + right) // 8) * 8
        starts = torch.arange(self.blocks, device=device)[:, None, None] * self.queries
        query = starts + torch.arange(self.queries, device=device)[:, None]
        key = starts - left + torch.arange(self.keys, device=device)
        band = (key >= query - left) & (key <= query + right) & (key >= 0) & (key < length)
        # Padding rows of the last block attend to everything: a row without keys would be NaN.
        self.mask_QK = (band | (query >= length))[None]

    def attend(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
        """Attention inside the band, (B, H, N, D)."""
        batch_heads = q_BHND.shape[:2]
        padded = self.blocks * self.queries
        q = F.pad(q_BHND, (0, 0, 0, padded - self.length)).flatten(0, 1).unflatten(1, (self.blocks, self.queries))
        out = F.scaled_dot_product_attention(q, self._halo(k_BHND), self._halo(v_BHND), attn_mask=self.mask_QK)
        return out.flatten(1, 2)[:, : self.length].unflatten(0, batch_heads)

    def _halo(self, x_BHND: Tensor) -> Tensor:
        """Overlapping blocks of keys, (B * H, blocks, K, D), without copying the overlap."""
        reach = (self.blocks - 1) * self.queries + self.keys
        x = F.pad(x_BHND, (0, 0, self.left, reach - self.left - self.length)).flatten(0, 1)
        return x.unfold(1, self.keys, self.queries).transpose(2, 3)
