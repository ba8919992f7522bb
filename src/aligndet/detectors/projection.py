"""The projection head: two linear layers with a ReLU, in the classifier's slot (paper section 3.2, after
MoCo v2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Embeds the features of boxes for the contrastive loss.

    A classifier of several anchors at a location has weights of its own for each; so has this head: the
    hidden layer is shared, the output layer has one slice an anchor. The slices start alike: a proposal's
    anchors differ between views, and unrelated slices would first have to learn to agree.
    """

    def __init__(self, in_channels: int, embedding_dim: int = 128, num_anchors: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_channels, in_channels)
        self.output = nn.Linear(in_channels, num_anchors * embedding_dim)
        self.num_anchors = num_anchors
        # RetinaNet's towers start with features so small that random biases would dominate the embeddings
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.output.bias)
        with torch.no_grad():
            self.output.weight.copy_(self.output.weight[:embedding_dim].repeat(num_anchors, 1))

    def forward(self, features: Tensor, anchors: Tensor | None = None) -> Tensor:
        """Projects box features.

        Args:
            features: (M, C).
            anchors: (M,) which of the location's anchors each box belongs to; None if there is one only.

        Returns:
            Embeddings (M, D), not normalised.
        """
        hidden = torch.relu(self.hidden(features))
        embeddings = self.output(hidden).unflatten(1, (self.num_anchors, -1))  # (M, A, D)
        if anchors is None:
            return embeddings[:, 0]
        return embeddings[torch.arange(len(anchors), device=anchors.device), anchors]
