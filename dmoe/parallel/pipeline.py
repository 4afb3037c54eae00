"""A stage of ``torch.distributed.pipelining`` whose trial run leaves nothing behind in the layers."""

from __future__ import annotations

from typing import Any

from torch.distributed import pipelining

from dmoe.parallel.step_state import StepState


class PipelineStage(pipelining.PipelineStage):
    """``torch.distributed.pipelining.PipelineStage``, for models whose layers count what they see.

    Where a stage is not told the shapes of its inputs and outputs (``input_args``, ``output_args``), PyTorch finds them
    by a forward, and from 2.13 on a backward, on memory that holds anything. Loads that move the selection bias,
    attached losses, metrics and random numbers would begin with what that left. Here they are put back.

    Build the layers with ``aux_loss="attached"``, or call :func:`dmoe.attach_aux_losses` on each stage's module: the
    schedule divides all gradients by the number of micro-batches, and so the auxiliary losses' with them.
    :func:`dmoe.attached_aux_loss` with the pipeline's group gives their value. Layers with ``ep_group`` share their
    experts with the ranks that hold the same stage.

    Args:
        *args, **kwargs: of PyTorch's.
    """

    _before: StepState | None = None

    def _forward_metadata_inference(self, *args: Any, **kwargs: Any) -> Any:
        self._before = StepState(self.submod)
        found = super()._forward_metadata_inference(*args, **kwargs)
        if not self.has_backward:  # else the graph still needs the buffers as they are
            self._put_back()
        return found

    def _backward_metadata_inference(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._backward_metadata_inference(*args, **kwargs)
        self._put_back()
        return found

    def _shape_inference(self, *args: Any, **kwargs: Any) -> Any:
        """Before PyTorch 2.13: a forward alone."""
        self._before = StepState(self.submod)
        found = super()._shape_inference(*args, **kwargs)
        self._put_back()
        return found

    def _put_back(self) -> None:
        if self._before is not None:
            self._before.restore()
            self._before = None
