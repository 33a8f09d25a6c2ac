"""The joint module: predicate logits from both classes and both boxes of a pair at once.

Shapes: R entities, P pairs, K entity classes, C predicates, E values per class embedding, H hidden
units, X values per contextual vector.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .predictors import SPATIAL_FEATURE_SIZE
from .training_counts import require_counts

__all__ = ["JointModule"]

SHRINKAGE_KEY = "MODEL.ROI_RELATION_HEAD.JOINT.EMBEDDING_SHRINKAGE"


class ByteDropout(nn.Dropout):
    """Dropout whose mask on the CPU takes one random byte per value; p is rounded to 1/256.

    With a random float per value, as PyTorch draws them, dropout takes 40 % of a training step of
    the joint module on the CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        dropped = min(round(256 * self.p), 255)
        # From the smallest int64: by default the sign bit is never set, and every eighth byte
        # would be below 128.
        numbers = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        kept = numbers.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * (kept.to(x.dtype) * (256 / (256 - dropped)))


class JointModule(nn.Module):
    """MLP (2E + 28)-H-H-(C + 1) on the embedded classes and the spatial features of a pair.

    The semantic and the spatial module add their logits, so a predicate cannot depend on the boxes
    in one way for a person and a horse and in another for a person and a hat. Here it can. Unlike a
    table, the embeddings share what they learn among pairs of classes, so that predicates of
    triplets that are not in the training set can score high too.

    At test time, embeddings can be shrunk toward their mean over all training relations: the fewer
    relations a class has, the more. The optimizer scales its steps to the gradients of each value,
    so it moves the embedding of a class with five relations as far as that of one with thousands,
    and most of what the former learns is chance. The buffers ``subject_relations`` and
    ``object_relations``, (K,) int64, have the number of training relations of each class in that
    role. Training fills them (:meth:`set_counts`), and checkpoints have them; all zeros mean
    unknown, as in checkpoints written before.

    With an entity context, the first layer also reads the contextual vectors of both entities. It
    is linear, so that part is computed once per entity instead of once per pair.
    """

    def __init__(
        self,
        num_classes: int,
        num_predicates: int,
        *,
        embedding_dim: int = 48,
        hidden_dim: int = 256,
        dropout: float = 0.3,
        context_size: int = 0,
        embedding_std: float = 0.1,
        shrinkage: float = 0.0,
    ):
        """
        Args:
            num_classes: K.
            num_predicates: C.
            embedding_dim: E.
            hidden_dim: H.
            dropout: share of hidden units that are dropped in training.
            context_size: X; 0 without an entity context.
            embedding_std: standard deviation of the embeddings at the start of training. If it is
                small, classes start out alike and differ only where the data say so: rare classes
                then keep to what all classes have in common. With PyTorch's 1, fewer unseen
                triplets are predicted.
            shrinkage: at test time, the embedding of a class with n relations keeps the share
                ``n / (n + shrinkage)``, and the mean has the other; 0 leaves them as they are.

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
        for key, value in (("EMBEDDING_STD", embedding_std), ("EMBEDDING_SHRINKAGE", shrinkage)):
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"MODEL.ROI_RELATION_HEAD.JOINT.{key} is {value}; expected a finite number of "
                    "0 or more."
                )
        self.shrinkage = shrinkage
        self.subject_embedding = nn.Embedding(num_classes, embedding_dim)
        self.object_embedding = nn.Embedding(num_classes, embedding_dim)
        for embedding in (self.subject_embedding, self.object_embedding):
            nn.init.normal_(embedding.weight, std=embedding_std)
        unknown = torch.zeros(num_classes, dtype=torch.int64)
        self.register_buffer("subject_relations", unknown)
        self.register_buffer("object_relations", unknown.clone())
        self.layers = nn.Sequential(
            nn.Linear(2 * embedding_dim + SPATIAL_FEATURE_SIZE, hidden_dim),
            nn.LeakyReLU(0.1),
            ByteDropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LeakyReLU(0.1),
            ByteDropout(dropout),
            nn.Linear(hidden_dim, num_predicates + 1),
        )
        self.subject_context = self.object_context = None
        if context_size:
            self.subject_context = nn.Linear(context_size, hidden_dim, bias=False)
            self.object_context = nn.Linear(context_size, hidden_dim, bias=False)

    @property
    def counts_known(self) -> bool:
        """Whether the relations of the classes are known; reads one value on the host."""
        return bool(self.subject_relations.any())

    def set_counts(self, subject_relations: Tensor, object_relations: Tensor) -> None:
        """Take the (K,) training relations of each class as a subject and as an object.

        Raises:
            ValueError: if a shape differs.
        """
        for own, counts in (
            (self.subject_relations, subject_relations),
            (self.object_relations, object_relations),
        ):
            if counts.shape != own.shape:
                raise ValueError(
                    f"There are relations of {len(counts)} classes, but the model has {len(own)}."
                )
            own.copy_(counts)

    def check_counts(self, owner: str = "this model") -> None:
        """Raise a ValueError if embeddings are to be shrunk by unknown counts.

        Args:
            owner: the model or its file, for the message.
        """
        what = "how many training relations each class has"
        require_counts(SHRINKAGE_KEY, self.shrinkage, self.subject_relations, owner, what)

    def embed(self, embedding: nn.Embedding, relations: Tensor, classes: Tensor) -> Tensor:
        """Look up the embeddings of classes, shrunk at test time: (P, E).

        Args:
            embedding: of subjects or of objects.
            relations: (K,) training relations of each class in that role.
            classes: (P,) int64 in ``[0, K)``.
        """
        if self.training or not self.shrinkage:
            return embedding(classes)
        counts, weight = relations.float(), embedding.weight.float()  # half would overflow
        mean = counts @ weight / counts.sum().clamp(min=1.0)
        own_share = (counts / (counts + self.shrinkage))[:, None]
        shrunk = own_share * weight + (1 - own_share) * mean
        return F.embedding(classes, shrunk.to(embedding.weight.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("subject_relations", "object_relations"):
            unknown = torch.zeros_like(getattr(self, name))
            state_dict.setdefault(prefix + name, unknown)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        subject_classes: Tensor,
        object_classes: Tensor,
        spatial_features: Tensor,
        context: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Score the pairs.

        Args:
            subject_classes, object_classes: (P,) int64 in ``[0, K)``.
            spatial_features: (P, 28), see :func:`.predictors.spatial_features`.
            context: (R, X) contextual vectors, (P,) subjects and (P,) objects, indices into them;
                None without an entity context.

        Returns:
            (P, C + 1) logits.
        """
        embedded = [
            self.embed(self.subject_embedding, self.subject_relations, subject_classes),
            self.embed(self.object_embedding, self.object_relations, object_classes),
        ]
        features = torch.cat([*embedded, spatial_features], dim=1)
        if context is None:
            return self.layers(features)
        vectors, subjects, objects = context
        from_subject = self.subject_context(vectors)[subjects]
        from_object = self.object_context(vectors)[objects]
        return self.layers[1:](self.layers[0](features) + from_subject + from_object)
