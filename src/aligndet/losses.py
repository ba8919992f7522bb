"""The box-level contrastive loss of AlignDet (paper section 3.2, equations 3 and 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet.boxes import BACKGROUND, BoxPredictions

_NO_NEGATIVE = -1e4  # far below any similarity / temperature, yet finite: exp() is 0 and so are its gradients


def box_contrastive_loss(
    online: BoxPredictions, momentum: BoxPredictions, temperature: float = 0.5
) -> Tensor:
    """Pulls boxes of the same proposal together and pushes all others apart.

    A query is an online box that stands for a proposal. Its positives are the momentum boxes of the same
    proposal; its negatives are the boxes of other proposals and of the background in both views, the online
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

        is_query = torch.isin(online.proposal_ids, momentum.proposal_ids) & (
            online.proposal_ids != BACKGROUND
        )
        queries, ids = boxes[is_query], online.proposal_ids[is_query]  # (Q, D), (Q,)
        if len(queries) == 0:
            return online.embeddings.sum() * 0.0

        positive = ids[:, None] == momentum.proposal_ids  # (Q, N)
        to_momentum = queries @ keys.T / temperature  # (Q, N)
        to_online = queries @ boxes.detach().T / temperature  # (Q, M)
        to_online = to_online.masked_fill(ids[:, None] == online.proposal_ids, _NO_NEGATIVE)
        negatives = torch.logaddexp(
            to_momentum.masked_fill(positive, _NO_NEGATIVE).logsumexp(1), to_online.logsumexp(1)
        )  # (Q,)

        query, key = positive.nonzero(as_tuple=True)  # the P pairs: usually far fewer than Q x N
        pair_losses = F.softplus(negatives[query] - to_momentum[query, key])  # (P,)
        _, proposal, pairs = ids[query].unique(return_inverse=True, return_counts=True)
        return (pair_losses / pairs[proposal]).sum() / len(pairs)
