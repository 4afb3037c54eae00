"""V-MoE's parameters as a ``.npz`` of names joined by ``/``, which is what a user can make of its checkpoints.

    numpy.savez(path, **{"/".join(name): array for name, array in flax.traverse_util.flatten_dict(params).items()})

(V-MoE's own files are msgpack with extension types of its own.) A prefix before ``Encoder/``, as ``target/`` or
``params/``, stays. Layers' prefixes have dots in :class:`dmoe.checkpoint.model.Model`; ``Model.origin`` says what they
were (``prefixes``). Every other array keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dmoe.checkpoint.bank import from_dmoe, to_dmoe
from dmoe.checkpoint.formats.base import Options, as_asked
from dmoe.checkpoint.formats.npz import read_npz, write_npz
from dmoe.checkpoint.layers import Bank, Layout, Row, check_bank, is_gated, write_layer
from dmoe.checkpoint.maps import TRANSPOSED, TURNED
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import Stored
from dmoe.config import MoEConfig
from dmoe.presets.vision import vmoe

# Names have dots here: tables know no other separator.
LAYOUT = Layout(
    "vmoe",
    (
        Row("router.weight", ("Router.dense.kernel",), TURNED),
        Row("up", ("Mlp.Dense_0.kernel",), TRANSPOSED, gated=False, dims=3),
        Row("up_bias", ("Mlp.Dense_0.bias",), gated=False),
        Row("down", ("Mlp.Dense_1.kernel",), TRANSPOSED, dims=3),
        Row("down_bias", ("Mlp.Dense_1.bias",)),
    ),
    inside=("",),
)
_FIELDS = tuple(row.field for row in LAYOUT.rows)


class VisionMoE:
    """The layout ``vmoe``, see :class:`dmoe.checkpoint.formats.base.Format`."""

    name = "vmoe"
    about = 'a .npz of V-MoE\'s parameters, their names joined by "/"'

    def fits(self, sources: Sequence[Path]) -> bool:
        """A ``.npz`` with experts by V-MoE's names."""
        if len(sources) != 1 or Path(sources[0]).suffix != ".npz":
            return False
        try:
            return bool(LAYOUT.find(_dotted(read_npz(Path(sources[0])), str(sources[0]))[0]))
        except (OSError, ValueError, ImportError):
            return False

    def read(self, sources: Sequence[Path], options: Options) -> Model:
        """A ``.npz``. Layers compute what :func:`dmoe.presets.vmoe` says: the arrays tell nothing but sizes.

        Raises:
            OSError: no such file, or one that cannot be read.
            ValueError: a damaged file, or layers that are incomplete.
        """
        if len(sources) != 1:
            raise ValueError(f"vmoe: expected one file, got {len(sources)} sources")
        path = str(sources[0])
        tensors, names = _dotted(read_npz(Path(path)), path)
        found = LAYOUT.find(tensors)
        if not found:
            raise ValueError(f"{path}: expected arrays such as Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel, got none")
        ordered: dict[str, Stored] = {}
        layers: dict[str, MoEConfig | None] = {}
        renamed: dict[str, dict[str, Stored]] = {}
        inside: set[str] = set()
        for prefix, layer in found.items():
            where = f"{path}: {prefix.replace('.', '/')}"
            bank, used = layer.read(tensors, None, where)
            _check_whole(bank, where)
            experts, hidden, width = bank["down"].shape
            layers[prefix] = vmoe(hidden, width, experts)
            renamed[next(name for name in tensors if name in used)] = {
                prefix + name: tensor for name, tensor in to_dmoe(bank, where).items()
            }
            inside |= used
        for name, tensor in tensors.items():
            ordered |= renamed.get(name, {} if name in inside else {names[name]: tensor})
        prefixes = {prefix: _slashed(prefix, names) for prefix in found}
        note = (
            f"{path} holds no settings: the layers have those that V-MoE was published with (dmoe.presets.vmoe), "
            "top_k=2 and a capacity of 1.05 times an even share among them."
        )
        return Model(ordered, layers, origin={"layout": self.name, "prefixes": prefixes}, notes=[note])

    def write(self, model: Model, target: Path, options: Options) -> list[Path]:
        """A ``.npz``.

        Raises:
            OSError: it cannot be written, or is there already.
            ValueError: a layer that V-MoE's cannot be, or a dtype that numpy does not have.
        """
        prefixes = model.origin.get("prefixes", {})

        def made(layer: str) -> dict[str, Stored]:
            where = f"{target}: {layer}"
            bank = from_dmoe(model.of_layer(layer), where)
            _check_whole(bank, where)
            prefix = prefixes.get(layer, layer.replace(".", "/"))
            return {prefix + each.replace(".", "/"): part for each, part in write_layer(LAYOUT, bank, where).items()}

        written = model.with_layers(made)
        written = {name: as_asked(each, options) for name, each in written.items()}
        write_npz(Path(target), written, overwrite=options.overwrite, progress=options.progress)
        return [Path(target)]


def _dotted(tensors: Mapping[str, Stored], where: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """Arrays by names with dots, and what those were."""
    names = {name.replace("/", "."): name for name in tensors}
    if len(names) < len(tensors):
        other = next(name for name in tensors if names[name.replace("/", ".")] != name)
        raise ValueError(f"{where}: {other}: expected names that differ in more than / and dots, got another such")
    return {dotted: tensors[name] for dotted, name in names.items()}, names


def _slashed(prefix: str, names: Mapping[str, str]) -> str:
    return next(name[: len(prefix)] for dotted, name in names.items() if dotted.startswith(prefix))


def _check_whole(bank: Bank, where: str) -> None:
    check_bank(bank, where)
    if missing := [field for field in _FIELDS if field not in bank]:
        row = next(row for row in LAYOUT.rows if row.field == missing[0])
        raise ValueError(f"{where}: expected {row.theirs[0].replace('.', '/')} in a layer of V-MoE, got none")
    experts, hidden = bank["down"].shape[:2]
    if is_gated(bank) or bank["router.weight"].shape != (experts, hidden):
        raise ValueError(
            f"{where}: expected experts without gates and a router for {experts} experts of width {hidden}, got up "
            f"projections {bank['up'].shape} and a router {bank['router.weight'].shape}"
        )


VMOE = VisionMoE()
