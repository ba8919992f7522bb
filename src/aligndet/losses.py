"""The box-level contrastive loss of AlignDet (paper section 3.2, equations 3 and 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet.boxes import BACKGROUND, BoxPredictions


def box_contrastive_loss(
    online: BoxPredictions, momentum: BoxPredictions, temperature: float = 0.5
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
        temperature: Divides the cosine similarities (0.5 in the paper, section 3.2).

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
            return online.embeddings.sum() * 0.0

        keys = torch.cat([keys, boxes.detach()])  # (N + M, D)
        same = ids[:, None] == torch.cat([momentum.proposal_ids, online.proposal_ids])  # (Q, N + M)
        query, key = same[:, : len(momentum.proposal_ids)].nonzero(as_tuple=True)  # the P pairs: few
        positives = (queries[query] * keys[key]).sum(1) / temperature  # (P,)
        # similarities are at most 1: less that bound, exp() stays finite at any temperature
        bound = torch.full((), 1.0 / temperature, device=boxes.device)
        below = torch.addmm(-bound, queries / temperature, keys.T).exp()  # (Q, N + M)
        negatives = below.masked_fill(same, 0.0).sum(1).clamp(min=torch.finfo(torch.float32).tiny)  # (Q,)
        pair_losses = F.softplus(negatives.log()[query] + bound - positives)  # (P,)
        _, proposal, pairs = ids[query].unique(return_inverse=True, return_counts=True)
        return (pair_losses / pairs[proposal]).sum() / len(pairs)
