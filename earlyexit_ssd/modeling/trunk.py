"""Run torchvision's SSDLite backbone in segments that end at the exits, without rewriting it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from earlyexit_ssd.errors import EarlyExitError

LAST_LAYER = 16


@dataclass(frozen=True)
class TrunkState:
    """Where a batch stands in the trunk.

    Attributes:
        x: output of the last layer run, [N, C, H, W]; at an exit, this is the tap.
        finest: the expansion of C4, the finest map of the full path's head; None before it is reached.
    """

    x: Tensor
    finest: Tensor | None = None

    def select(self, keep: Tensor) -> TrunkState:
        """The images of the boolean mask ``keep`` [N]; the others are computed no further."""
        return TrunkState(self.x[keep], None if self.finest is None else self.finest[keep])


class SegmentedTrunk:
    """A view of a torchvision ``SSDLiteFeatureExtractorMobileNet`` cut behind the exit layers.

    Made anew for each use, since layers may have been replaced. Not a module: the parameters stay where torchvision has
    them, under the same names. ``features[0]`` holds the layers up to the one before C4 and C4's expansion,
    ``features[1]`` the rest of C4 and the layers behind it.

    Args:
        backbone: the feature extractor.
        exit_layers: trunk layers (torchvision's numbering, stem 0) behind which a segment ends, increasing.

    Raises:
        EarlyExitError: another kind of backbone.
    """

    def __init__(self, backbone: nn.Module, exit_layers: Sequence[int]) -> None:
        try:
            head_part, tail_part = backbone.features
            self._steps = [*head_part, *tail_part]
            self._extra = list(backbone.extra)
        except (AttributeError, TypeError, ValueError):
            raise EarlyExitError(
                f"backbone is a {type(backbone).__name__}, expected torchvision's SSDLiteFeatureExtractorMobileNet "
                "(`features` in two parts, and `extra`): its layers are run one by one, to leave between them"
            ) from None
        self._finest_step = len(head_part) - 1
        stops = [self._step_of(layer) + 1 for layer in exit_layers]
        self._ranges = list(zip([0, *stops], [*stops, len(self._steps)], strict=True))

    def _step_of(self, layer: int) -> int:
        """C4 (layer 13) takes two steps: its expansion and the rest."""
        return layer if layer < self._finest_step else layer + 1

    def run(self, state: TrunkState, segment: int) -> TrunkState:
        """Run segment ``segment`` (0 ends at the first exit; the last one ends the trunk)."""
        x, finest = state.x, state.finest
        for step in range(*self._ranges[segment]):
            x = self._steps[step](x)
            if step == self._finest_step:
                finest = x
        return TrunkState(x, finest)

    def feature_maps(self, state: TrunkState) -> list[Tensor]:
        """The six maps of the full path's head, from the state behind the last segment."""
        maps = [state.finest, state.x]
        for block in self._extra:
            maps.append(block(maps[-1]))
        return maps
