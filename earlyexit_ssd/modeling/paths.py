"""The network up to one exit, as a module of its own: for counting operations, timing and export."""

from __future__ import annotations

from torch import Tensor, nn

from earlyexit_ssd.modeling.early_exit_ssd import EarlyExitSSDLite
from earlyexit_ssd.modeling.outputs import ExitSignals, Head, Router, pool_tap
from earlyexit_ssd.modeling.trunk import TrunkState


class PathToExit(nn.Module):
    """What a routed image pays for leaving at ``exit_index``: the trunk to there and every branch on the way.

    Args:
        model: the model; its parts are used, not copied.
        exit_index: 0 for the first exit, the number of early exits for the full path.
        router: scores every exit on the way, as it does when it decides, and spares those that it has closed; None
            leaves the scoring out and computes every branch.
        alone: without a router, leaves out the branches before the exit's own, which knows nothing of them: the exit
            as a detector of its own.
    """

    def __init__(
        self, model: EarlyExitSSDLite, exit_index: int, router: Router | None = None, *, alone: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= exit_index <= model.num_early_exits:
            raise ValueError(f"exit_index {exit_index}: the model has exits 0 to {model.num_early_exits}")
        self.model, self.exit_index, self.router, self.alone = model, exit_index, router, alone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [N, 3, S, S] to ``cls_logits`` [N, A, C] and ``bbox_regression`` [N, A, 4]."""
        head = self.run(x)[0][-1]
        return head["cls_logits"], head["bbox_regression"]

    def run(self, x: Tensor) -> tuple[list[Head], list[Tensor]]:
        """The heads of all exits on the way, this one's last, and the router's confidences [N] in the early ones."""
        model, state = self.model, TrunkState(x)
        heads: list[Head] = []
        confidences: list[Tensor] = []
        for index, branch in enumerate(model.branches.values()):
            state = model.trunk.run(state, index)
            spared = self.alone if self.router is None else not self.router.needs(index)
            if spared and index != self.exit_index:
                continue
            head = branch(state.x)
            heads.append(head)
            if self.router is not None:
                signals = ExitSignals(head["cls_logits"], pool_tap(state.x), model.empty[index])
                confidences.append(self.router.confidence(signals, index))
            if index == self.exit_index:
                if self.router is not None and self.router.hybrid:
                    heads[-1] = {**head, "bbox_regression": self._full_boxes(state, index)}
                return heads, confidences
        state = model.trunk.run(state, model.num_early_exits)
        return [*heads, model.head(model.trunk.feature_maps(state))], confidences

    def _full_boxes(self, state: TrunkState, exit_index: int) -> Tensor:
        """The full path's box regression, from the state at an exit on."""
        for segment in range(exit_index + 1, self.model.num_early_exits + 1):
            state = self.model.trunk.run(state, segment)
        return self.model.head.regression_head(self.model.trunk.feature_maps(state))


class AllOutputs(nn.Module):
    """A path that returns everything it pays for: what earlier branches and the router say, too.

    Tracers and exporters drop whatever reaches no output.
    """

    def __init__(self, path: PathToExit) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images [N, 3, S, S] to the tensors of :meth:`PathToExit.run`, in its order."""
        heads, confidences = self.path.run(x)
        return [*(tensor for head in heads for tensor in head.values()), *confidences]
