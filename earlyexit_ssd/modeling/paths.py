"""The network up to one exit, as a module of its own: for counting operations, timing and export."""

from __future__ import annotations

from torch import Tensor, nn

from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.outputs import Router
from earlyexit_ssd.modeling.trunk import TrunkState


class PathToExit(nn.Module):
    """What a routed image pays for leaving at ``exit_index``: the trunk to there and every branch on the way.

    Args:
        model: the model; its parts are used, not copied.
        exit_index: 0 for the first exit, the number of early exits for the full path.
        router: scores every exit on the way, as it does when it decides; None leaves the scoring out.
    """

    def __init__(self, model: EarlyExitSSDLite, exit_index: int, router: Router | None = None) -> None:
        super().__init__()
        if not 0 <= exit_index <= model.num_early_exits:
            raise ValueError(f"exit_index {exit_index}: the model has exits 0 to {model.num_early_exits}")
        self.model, self.exit_index, self.router = model, exit_index, router

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [N, 3, S, S] to ``cls_logits`` [N, A, C] and ``bbox_regression`` [N, A, 4]."""
        model, state, context = self.model, TrunkState(x), None
        for index, branch in enumerate(model.branches.values()):
            state = model.trunk.run(state, index)
            head, context = branch(state.x, context)
            if self.router is not None:
                self.router.confidence(head["cls_logits"], index)
            if index == self.exit_index:
                return head["cls_logits"], head["bbox_regression"]
        state = model.trunk.run(state, model.num_early_exits)
        head = model.head(model.trunk.feature_maps(state))
        return head["cls_logits"], head["bbox_regression"]
