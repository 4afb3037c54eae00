"""dmoe in other clothes, beside itself: the launch shapes of another day, and PyTorch's own grouped products."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import dmoe
from dmoe.ops.offline import launch_shapes
from parts.gpu_contestants import CONTESTANTS, AbsentError, Dmoe

SHAPES = Path(__file__).with_name("launch_shapes_2026-11.json")


class DmoeOldShapes(Dmoe):
    """dmoe under a table of launch shapes that is kept, so that a change of the built-in one is seen in one run."""

    def prepare(self) -> None:
        super().prepare()
        H, width = self.down.shape[1:]
        if not any(key.endswith(f"/{width}/{H}") for key in json.loads(SHAPES.read_text())):
            raise AbsentError(f"{SHAPES.name} has no launch shapes for this H and F")

    def around(self) -> contextlib.AbstractContextManager[None]:
        """The table."""
        return launch_shapes(SHAPES)


class DmoeTorch(Dmoe):
    """dmoe with ``backend="torch"``: its routing and combine around PyTorch's grouped products."""

    backend = "torch"

    def prepare(self) -> None:
        super().prepare()
        sizes = {"hidden_size": 16, "ffn_hidden_size": 16, "num_experts": 2, "top_k": 1}
        try:
            dmoe.MoEConfig(**sizes, backend="torch")  # type: ignore[arg-type]  # not in every version
        except ValueError as error:
            raise AbsentError(f"this dmoe has no backend 'torch': {error}") from error


CONTESTANTS.update({"dmoe torch": DmoeTorch, "dmoe 2026-11 shapes": DmoeOldShapes})
