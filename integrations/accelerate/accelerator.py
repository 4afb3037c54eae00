"""An Accelerator that knows that ranks have experts of their own: what it does otherwise than Accelerate's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.checkpoint.sharded import load_sharded, save_sharded, whole_state
from dmoe.parallel import GradScaler, clip_grad_norm, clip_grad_value, data_parallel, split_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        "dmoe.integrations.accelerate: expected Accelerate, which is not installed: pip install accelerate"
    ) from error

_A = TypeVar("_A", bound=Accelerator)
FOLDER = "sharded_state"  # of models and optimizers, in Accelerate's own folder


class ExpertParallel:
    """Comes before ``Accelerator``, or a class made of it, among the bases of a class: see :func:`teach`."""

    expert_mesh: DeviceMesh | None = None

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Accelerate's; but where that is DDP, the experts are left out of its all-reduce."""
        me: Any = self
        prepare = super().prepare_model  # type: ignore[misc]
        plain = me.distributed_type == DistributedType.NO or me.distributed_type == DistributedType.FSDP
        if plain or evaluation_mode or getattr(model, "_is_accelerate_prepared", False):
            return prepare(model, device_placement=device_placement, evaluation_mode=evaluation_mode)
        if is_spread_already(model):
            return prepare(model, device_placement=False, evaluation_mode=True)
        if self.expert_mesh is None or not split_parameters(model)[1]:
            return prepare(model, device_placement=device_placement)
        model = prepare(model, device_placement=False, evaluation_mode=True)  # autocast and compilation
        handler = me.ddp_handler
        options = {} if handler is None else handler.to_kwargs()
        if me.device.type != "cpu":
            options |= {"device_ids": [me.device.index], "output_device": me.device.index}
        wrapped = data_parallel(model, expert_replicas=self.expert_mesh["replicas"].get_group(), **options)
        if handler is not None:
            handler.register_comm_hook(wrapped)
        wrapped._is_accelerate_prepared = True  # type: ignore[assignment]
        return wrapped

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Tensor:
        """Accelerate's, counting each expert once wherever it lives; all ranks scale by the same factor.

        Args:
            parameters: of models that were prepared.
            max_norm, norm_type: see :func:`dmoe.parallel.clip_grad_norm`.
        """
        me: Any = self
        me.unscale_gradients()
        return clip_grad_norm(nn.ModuleList(me._models), max_norm, norm_type, parameters=parameters)

    def clip_grad_value_(self, parameters: Iterable[nn.Parameter], clip_value: float) -> None:
        """Accelerate's, for ``DTensor`` beside plain parameters, too."""
        me: Any = self
        me.unscale_gradients()
        clip_grad_value(parameters, clip_value)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """A model's state with all experts on the first rank, nothing on the others; every rank calls this.

        Args:
            model: that was prepared.
            unwrap: without DDP's prefix; it has none here.
        """
        return whole_state(model)

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **options: Any) -> Any:
        """Accelerate's; models and optimizers are written by all ranks together, each its part.

        Args:
            output_dir: see Accelerate; so are the others.
            safe_serialization: of no meaning here.
            **options: of Accelerate.

        Raises:
            ValueError: experts that are plain tensors.
        """
        me: Any = self
        models, optimizers = me._models, me._optimizers
        me._models, me._optimizers = [], []  # Accelerate would write the first rank's experts for all
        try:
            folder = super().save_state(output_dir, safe_serialization, **options)  # type: ignore[misc]
        finally:
            me._models, me._optimizers = models, optimizers
        save_sharded(Path(folder) / FOLDER, *_named(models, optimizers), step=me.step)
        return folder

    def load_state(self, input_dir: str | None = None, load_kwargs: Any = None, **options: Any) -> None:
        """Accelerate's, of a folder that any number of ranks wrote.

        Args:
            input_dir: see Accelerate; so are the others.
            load_kwargs: of Accelerate.
            **options: of Accelerate.

        Raises:
            ValueError: a folder that another Accelerator wrote.
        """
        me: Any = self
        models, optimizers = me._models, me._optimizers
        me._models, me._optimizers = [], []
        found: list[str] = []
        hook = me.register_load_state_pre_hook(lambda _, folder: found.append(folder))  # it may choose the folder
        try:
            super().load_state(input_dir, load_kwargs, **options)  # type: ignore[misc]
        finally:
            hook.remove()
            me._models, me._optimizers = models, optimizers
        parts = Path(found[0]) / FOLDER
        if not (parts / ".metadata").is_file():
            raise ValueError(
                f"load_state: expected a folder that an Accelerator taught by dmoe wrote, with {FOLDER} in it, got "
                f"{found[0]}"
            )
        me.step = load_sharded(parts, *_named(models, optimizers), step=0)["step"]


def _named(models: Sequence[nn.Module], optimizers: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models, and optimizers with the models at the same places, by the names that they have in the files."""
    if len(optimizers) not in (0, len(models)):
        raise ValueError(
            f"save_state, load_state: expected an optimizer for each of the {len(models)} models, or none, got "
            f"{len(optimizers)}"
        )
    inner = [getattr(each, "optimizer", each) for each in optimizers]  # Accelerate's have them inside
    pairs = zip(models, inner, strict=bool(inner))
    return (
        {f"model_{place}": model for place, model in enumerate(models)},
        {f"optimizer_{place}": pair for place, pair in enumerate(pairs)},
    )


def is_spread_already(model: nn.Module) -> bool:
    """Whether a model averages gradients by itself: one that Transformers' ``parallelize`` spread, or FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    from dmoe.integrations.transformers.parallel_mesh import grid_of_model

    if isinstance(model, FSDPModule):
        return True
    try:
        return grid_of_model(model).group is not None
    except ValueError:
        return False


def teach(accelerator: _A, mesh: DeviceMesh | None = None) -> _A:
    """Let an Accelerator that is there already know of experts on several ranks; it is changed.

    Its class becomes one of :class:`ExpertParallel` and its own, as a Trainer makes its Accelerator by itself; its grad
    scaler becomes :class:`dmoe.parallel.GradScaler`. :func:`parallelize` does this.

    Args:
        accelerator: that has not prepared anything yet.
        mesh: of ("replicas", "ep"); None for models that average their gradients by themselves.

    Returns:
        The accelerator.

    Raises:
        TypeError: no Accelerator.
        ValueError: it works by DeepSpeed, Megatron-LM or FSDP1, or has prepared models already.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"teach: accelerator: expected an accelerate.Accelerator, got {type(accelerator).__name__}")
    kind = accelerator.distributed_type
    by_itself = kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if by_itself or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(
            "dmoe.integrations.accelerate: accelerator: expected DDP, FSDP2 (fsdp_version=2) or one process, got "
            f"{'FSDP1' if kind == DistributedType.FSDP else kind.value}"
        )
    if accelerator._models:
        raise ValueError(
            "dmoe.integrations.accelerate: accelerator: expected one that has prepared nothing yet, got one with "
            f"{len(accelerator._models)} models"
        )
    if not isinstance(accelerator, ExpertParallel):
        own = type(accelerator)
        accelerator.__class__ = type(own.__name__, (ExpertParallel, own), {"__module__": own.__module__})
    accelerator.expert_mesh = mesh
    scaler = accelerator.scaler
    ranks = dist.is_initialized() and dist.get_world_size() > 1
    if ranks and isinstance(scaler, torch.amp.GradScaler) and not isinstance(scaler, GradScaler):
        accelerator.scaler = GradScaler.like(scaler)
    return accelerator
