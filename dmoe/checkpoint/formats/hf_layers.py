"""MoE layers among the tensors of a Hugging Face model: of which family, whether whole, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmoe.checkpoint.bank import from_dmoe, to_dmoe
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.hf_config import OPTIONS, LackingError, Said, sizes
from dmoe.checkpoint.formats.hf_families import FAMILIES, Family, by_config, by_names, named
from dmoe.checkpoint.formats.hf_files import Files
from dmoe.checkpoint.layers import Bank, Found, check_bank, write_layer
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.options_of import options_of
from dmoe.checkpoint.stored import Stored
from dmoe.config import MoEConfig
from dmoe.layer import MoE


def family_of(files: Files, tensors: Mapping[str, Stored], options: Options) -> tuple[Family, bool]:
    """The family, and whether its config can be trusted to be one.

    Raises:
        ValueError: neither the user nor ``config.json`` says, and the names fit none or several.
    """
    if options.family is not None:
        return named(options.family), True
    if files.config is not None and (family := by_config(files.config)) is not None:
        return family, True
    fit = by_names(tensors)
    if len(fit) == 1:
        return fit[0], False
    got = "those of " + " and ".join(family.name for family in fit) if fit else "others"
    said = "" if files.config is None else f", and model_type {files.config.get('model_type')!r} in {files.config_path}"
    raise ValueError(
        f"{files.where}: expected names of one family of {', '.join(FAMILIES)}, got {got}{said}; --family says which"
    )


def find_layers(family: Family, tensors: Mapping[str, Stored], where: str) -> tuple[str, dict[str, Found]]:
    """The one form of names in which a family's layers are, and the layers by prefix.

    Raises:
        ValueError: there are none, or they are in two forms.
    """
    by_form = {name: form.layout.find(tensors) for name, form in family.forms.items()}
    there = {name: found for name, found in by_form.items() if found}
    if not there:
        raise ValueError(f"{where}: expected MoE layers with the names of {family.name}, got none")
    if len(there) > 1:
        one, other = ((found[min(found)], name) for name, found in there.items())
        raise ValueError(
            f"{where}: expected the names of {family.name} in one form, got {_first(one[0])} ({one[1]}) beside "
            f"{_first(other[0])} ({other[1]})"
        )
    return next(iter(there.items()))


def _first(layer: Found) -> str:
    return min(name for of_row in layer.names.values() for name in of_row.values())


def natural(prefix: str) -> list[tuple[int, str]]:
    """To sort by: the numbers in a prefix as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in prefix.split(".")]


def check_whole(family: Family, bank: Bank, where: str) -> None:
    """Refuse a layer that a family's models do not have.

    Raises:
        ValueError: a tensor of every layer of the family is missing, or experts are.
    """
    check_bank(bank, where)
    for field in family.needs:
        if field not in bank:
            rows = [row for form in family.forms.values() for row in form.layout.rows if row.field == field]
            raise ValueError(f"{where}: expected {' and '.join(rows[0].theirs)} in a layer of {family.name}, got none")
    experts, hidden = bank["down"].shape[0], bank["down"].shape[1]
    if bank["router.weight"].shape != (experts, hidden):
        raise ValueError(
            f"{where}: expected a router ({experts}, {hidden}) for {experts} experts of width {hidden}, got "
            f"{bank['router.weight'].shape}: experts are missing, or too many"
        )


def layer_config(
    family: Family, said: Said | None, bank: Bank, files: Files, prefix: str
) -> tuple[MoEConfig | None, str | None]:
    """A layer's config, or why there is none.

    Raises:
        ValueError: ``config.json`` says something else than the tensors, or is none of the family.
    """
    if said is None:
        return None, None
    told = options_of(to_dmoe(bank, prefix))
    for field, (names, values) in sizes(family.name, said).items():
        if told[field] not in values:
            raise ValueError(
                f"{files.config_path}: {names}: expected {told[field]}, as the tensors of {prefix} in {files.where} "
                f"have it, got {' or '.join(map(str, values))}"
            )
    try:
        config = MoEConfig(**{**told, **OPTIONS[family.name](said)})
    except LackingError as missing:
        return None, f"dmoe.MoE has no option for what {files.config_path} asks for: {missing}."
    except (ValueError, TypeError) as error:
        raise ValueError(f"{files.config_path}: expected the config of a {family.name}, got: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in MoE(config, device="meta").state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in to_dmoe(bank, prefix).items()}
    for name in expected.keys() | shapes.keys():
        if expected.get(name) != shapes.get(name):
            raise ValueError(
                f"{files.where}: {prefix}: expected {name} {expected.get(name)} in a layer of these experts, got "
                f"{shapes.get(name)}"
            )
    return config, None


def unsure(files: Files, family: Family) -> str:
    """Why layers have no config, in a sentence."""
    if files.config is None:
        return f"There is no {files.config_path}, so the options of the layers (top_k, ...) are not known."
    return (
        f"{files.config_path} is of model_type {files.config.get('model_type')!r}, whose options are not known; its "
        f"names are those of {family.name}, and with --family {family.name} it is read as one."
    )


def renamed_to(model: Model, family: Family, form: Any, where: str) -> dict[str, Stored]:
    """A model's tensors by the names of a family, in one of its forms; None is the first.

    Raises:
        ValueError: a layer that the family has no names for.
    """
    layout = family.forms.get(form, next(iter(family.forms.values()))).layout

    def made(layer: str) -> dict[str, Stored]:
        bank = from_dmoe(model.of_layer(layer), f"{where}: {layer}")
        check_whole(family, bank, f"{where}: {layer}")
        return {layer + each: part for each, part in write_layer(layout, bank, f"{where}: {layer}").items()}

    return model.with_layers(made)
