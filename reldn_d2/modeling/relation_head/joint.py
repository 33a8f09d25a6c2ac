"""The joint module: predicate logits from both classes and both boxes of a pair at once.

Shapes: P pairs, K entity classes, C predicates, E values per class embedding, H hidden units.
"""

import torch
from torch import Tensor, nn

from .predictors import SPATIAL_FEATURE_SIZE

__all__ = ["JointModule"]


class JointModule(nn.Module):
    """MLP (2E + 28)-H-H-(C + 1) on the embedded classes and the spatial features of a pair.

    The semantic and the spatial module add their logits, so a predicate cannot depend on the boxes
    in one way for a person and a horse and in another for a person and a hat. Here it can. Unlike a
    table, the embeddings share what they learn among pairs of classes, so that predicates of
    triplets that are not in the training set can score high too.
    """

    def __init__(
        self,
        num_classes: int,
        num_predicates: int,
        *,
        embedding_dim: int = 48,
        hidden_dim: int = 256,
        dropout: float = 0.3,
    ):
        """
        Args:
            num_classes: K.
            num_predicates: C.
            embedding_dim: E.
            hidden_dim: H.
            dropout: share of hidden units that are dropped in training.

        Raises:
            ValueError: if an option has an invalid value.
        """
        super().__init__()
        for key, value in (("EMBEDDING_DIM", embedding_dim), ("HIDDEN_DIM", hidden_dim)):
            if value < 1:
                raise ValueError(
                    f"MODEL.ROI_RELATION_HEAD.JOINT.{key} is {value}; expected 1 or more."
                )
        if not 0 <= dropout < 1:
            raise ValueError(
                f"MODEL.ROI_RELATION_HEAD.JOINT.DROPOUT is {dropout}; expected 0 to below 1."
            )
        self.subject_embedding = nn.Embedding(num_classes, embedding_dim)
        self.object_embedding = nn.Embedding(num_classes, embedding_dim)
        self.layers = nn.Sequential(
            nn.Linear(2 * embedding_dim + SPATIAL_FEATURE_SIZE, hidden_dim),
            nn.LeakyReLU(0.1),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LeakyReLU(0.1),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, num_predicates + 1),
        )

    def forward(
        self, subject_classes: Tensor, object_classes: Tensor, spatial_features: Tensor
    ) -> Tensor:
        """Score the pairs.

        Args:
            subject_classes, object_classes: (P,) int64 in ``[0, K)``.
            spatial_features: (P, 28), see :func:`.predictors.spatial_features`.

        Returns:
            (P, C + 1) logits.
        """
        embedded = [self.subject_embedding(subject_classes), self.object_embedding(object_classes)]
        return self.layers(torch.cat([*embedded, spatial_features], dim=1))
