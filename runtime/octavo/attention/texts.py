"""`TextBatch`: the texts of one step of an encoder, one behind the other, and their attention in both directions.

Made by `execute.encoder`, used by `models.bert` and `layers.pooling`. Linear layers see tokens without padding; only
attention pads, to the longest text of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from octavo.execute.transfer import tensor_to_device


class TextBatch:
    """`B` texts of `T` tokens in all. `pad_token_id`: not None for models whose positions leave out padding tokens and
    begin after its number, as RoBERTa's do, wherever such a token stands in a text."""

    def __init__(
        self, texts: Sequence[Sequence[int]], *, pad_token_id: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
        lengths = torch.tensor([len(text) for text in texts])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        text_of = torch.repeat_interleave(torch.arange(len(texts)), lengths)
        places = torch.arange(len(ids)) - starts[text_of]
        if pad_token_id is None:
            positions = places
        else:
            counted = (ids != pad_token_id).long()
            so_far = counted.cumsum(0)
            positions = counted * (so_far - (so_far - counted)[starts][text_of]) + pad_token_id
        self.count = len(texts)
        self.longest = int(lengths.max())
        self.ids = tensor_to_device(ids, device)
        """`[T]`"""
        self.positions = tensor_to_device(positions, device)
        """`[T]`: rows of the table of positions."""
        self.lengths, self.starts, self.ends = (tensor_to_device(t, device) for t in (lengths, starts, ends))
        """`[B]`"""
        self.text_of = tensor_to_device(text_of, device)
        """`[T]`: which text a token belongs to."""
        self.places = tensor_to_device(places, device)
        """`[T]`: where a token stands in its text."""
        self._padded: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        if self.count * self.longest != len(ids):
            self._padded = tensor_to_device(text_of * self.longest + places, device)
            visible = torch.arange(self.longest) < lengths[:, None]
            mask = torch.zeros(self.count, 1, 1, self.longest, dtype=dtype).masked_fill_(
                ~visible[:, None, None], float("-inf")
            )
            self._mask = tensor_to_device(mask, device)

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """`[T, W]` -> `[B * longest, W]`, zeros behind each text."""
        if self._padded is None:
            return values
        return values.new_zeros(self.count * self.longest, values.shape[1]).index_copy_(0, self._padded, values)

    def attend(
        self, qkv: torch.Tensor, heads: int, bias: torch.Tensor | None, scale: float | None = None
    ) -> torch.Tensor:
        """`[T, 3 * H * D]` -> `[T, H * D]`: each token attends to its text. `bias` `[1, H, longest, longest]` is added
        to the scores. `scale`: on `q . k`, D ** -0.5 if None."""
        width = qkv.shape[1]
        padded = self.padded(qkv)
        shaped = padded.view(self.count, self.longest, 3, heads, width // (3 * heads))
        q, k, v = shaped.permute(2, 0, 3, 1, 4).unbind(0)
        mask = self._mask if bias is None else bias if self._mask is None else bias + self._mask
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        flat = attended.transpose(1, 2).reshape(self.count * self.longest, width // 3)
        return flat if self._padded is None else flat.index_select(0, self._padded)
