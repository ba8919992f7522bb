"""The box-level contrastive loss of AlignDet (paper section 3.2, equations 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aligndet.boxes import BACKGROUND, BoxPredictions, rows_of

MOST_SIMILARITIES = 2**25
"""Held at a time (128 MiB in float32); more are made part by part, which takes time and spares memory."""


def box_contrastive_loss(
    online: BoxPredictions,
    momentum: BoxPredictions,
    temperature: float = 0.5,
    elsewhere: BoxPredictions | None = None,
) -> Tensor:
    """Pulls boxes of the same proposal together and pushes all others apart.

    A query is an online box that stands for a proposal. Its positives are the momentum boxes of the same
    proposal (equation 3 prints the online view there; algorithm 1 compares with the momentum one); its
    negatives are the boxes of other proposals and of the background in both views, the online
    ones detached. With cosine similarities s divided by the temperature, one (query, positive) pair costs

        -log( exp(s+) / (exp(s+) + sum over negatives of exp(s-)) )  =  softplus( logsumexp(s-) - s+ ).

    Pairs are averaged within a proposal, then over proposals, so that a large proposal with many boxes counts
    as much as a small one (equation 4 sums; the mean makes the loss independent of the number of boxes).
    Proposals that one of the views misses are skipped.

    Args:
        online: M boxes of the online detector's view; embeddings (M, D), proposal_ids (M,).
        momentum: N boxes of the momentum detector's view; no gradient flows into them.
        temperature: Divides the cosine similarities (0.5 in the paper, section 3.2); at least 0.025.
        elsewhere: More boxes of the background, those of other processes; no gradient flows into them.

    Returns:
        A float32 scalar; zero, and still part of the graph, if no proposal occurs in both views.
    """
    with torch.autocast(online.embeddings.device.type, enabled=False):
        boxes = F.normalize(online.embeddings.float(), dim=1)  # (M, D)
        keys = F.normalize(momentum.embeddings.detach().float(), dim=1)  # (N, D)

        in_both = torch.isin(online.proposal_ids, momentum.proposal_ids)
        is_query = in_both & (online.proposal_ids != BACKGROUND)
        queries, ids = boxes[is_query], online.proposal_ids[is_query]  # (Q, D), (Q,)
        if len(queries) == 0:
            return boxes.sum() * 0.0

        query, key = (ids[:, None] == momentum.proposal_ids).nonzero(as_tuple=True)  # the P pairs
        rows = max(1, MOST_SIMILARITIES // boxes.shape[1])
        positives = _in_parts(_similarities, rows, (query, key), queries, keys) / temperature  # (P,)
        keys = torch.cat([keys, boxes.detach()])  # (N + M, D)
        key_ids = torch.cat([momentum.proposal_ids, online.proposal_ids])
        if elsewhere is not None:
            keys = torch.cat([keys, F.normalize(elsewhere.embeddings.detach().float(), dim=1)])
            key_ids = torch.cat([key_ids, elsewhere.proposal_ids])
        rows = max(1, MOST_SIMILARITIES // len(keys))
        negatives = _in_parts(_negatives, rows, (queries, ids), keys, key_ids, temperature)  # (Q,)
        pair_losses = F.softplus(rows_of(negatives[:, None], query)[:, 0] - positives)  # (P,)
        _, proposal, pairs = ids[query].unique(return_inverse=True, return_counts=True)
        return (pair_losses / pairs[proposal]).sum() / len(pairs)


def _in_parts(
    compute: Callable[..., Tensor], rows: int, split: tuple[Tensor, ...], *whole: Tensor | float
) -> Tensor:
    """Computes many rows part by part; on the way back once more, rather than to keep all."""
    if len(split[0]) <= rows:
        return compute(*split, *whole)
    parts = zip(*(tensor.split(rows) for tensor in split), strict=True)
    return torch.cat([checkpoint(compute, *part, *whole, use_reentrant=False) for part in parts])


def _similarities(query: Tensor, key: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines of P pairs, (P,)."""
    return (rows_of(queries, query) * keys[key]).sum(1)


def _negatives(queries: Tensor, ids: Tensor, keys: Tensor, key_ids: Tensor, temperature: float) -> Tensor:
    """logsumexp(s-) of each query, (Q,)."""
    # similarities are at most 1: less that bound, exp() stays finite at any temperature; what is 87 times the
    # temperature below it is 0, which is nothing from 0.023 on
    bound = torch.full((), 1.0 / temperature, device=keys.device)
    below = torch.addmm(-bound, queries / temperature, keys.T).exp()  # (Q, K)
    others = below.masked_fill(ids[:, None] == key_ids, 0.0).sum(1)
    return others.clamp(min=torch.finfo(torch.float32).tiny).log() + bound
