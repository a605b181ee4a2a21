"""Attention to the keys that a mask leaves: what the plain causal kernel cannot do, capped scores among it.

Knows nothing of which rows are whose, of weights or of a cache.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """What an attention knows of the layer that calls it.

    `scale` is what query-key products are multiplied by. A row sees the last `window` positions up to its own
    (None: all). With a `softcap` c, a scaled product s becomes c tanh(s / c) (Gemma 2, arXiv:2408.00118).
    """

    index: int
    scale: float
    window: int | None = None
    softcap: float | None = None


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, layer: AttentionLayer) -> Tensor:
    """`query` [N, num_heads, Q, dim] against `key` and `value` [N, num_kv_heads, K, dim]; the result as `query`.

    `visible` is bool [N, Q, K], or [1, Q, K] for all alike. Each row must see some key.
    """
    if layer.softcap is not None:
        return capped_attention(query, key, value, visible[:, None, None], layer)
    num_rows, group = query.shape[2], query.shape[1] // key.shape[1]
    # With a mask, the fused kernels want as many key heads as query heads; the heads of a group become more rows.
    rows = query.unflatten(1, (key.shape[1], group)).flatten(2, 3)
    mask = visible.unsqueeze(1).expand(-1, group, -1, -1).flatten(1, 2).unsqueeze(1)
    attended = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=layer.scale)
    return attended.unflatten(2, (group, num_rows)).flatten(1, 2)


def capped_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, layer: AttentionLayer) -> Tensor:
    """softmax(c tanh(scale q k' / c)) v over the visible keys, in fp32, c being the layer's softcap.

    `query` is [N, num_heads, Q, dim], `key` and `value` [N, num_kv_heads, K, dim], the result as `query`;
    `visible` is bool and spreads to [N, num_kv_heads, num_heads / num_kv_heads, Q, K].
    """
    assert layer.softcap is not None
    num_rows = query.shape[2]
    grouped = query.float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # the heads of a group: more rows
    products = grouped @ key.float().mT * layer.scale
    scores = (products / layer.softcap).tanh() * layer.softcap
    scores = scores.unflatten(2, (-1, num_rows)).masked_fill(~visible, float("-inf"))
    attended = scores.softmax(dim=-1).flatten(2, 3) @ value.float()
    return attended.unflatten(2, (-1, num_rows)).flatten(1, 2).to(query.dtype)
