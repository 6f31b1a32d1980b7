"""Which modules keep their weights quantised: those whose matrices are all stored alike."""

from kimijax.config import Fp8Config, Int4Config, ModelConfig
from kimijax.config_tree import override
from kimijax.convert.names import rules
from kimijax.convert.tensors import TensorFiles
from kimijax.errors import UserError


def kept(cfg: ModelConfig, files: TensorFiles, start: str) -> ModelConfig:
    """`cfg` with the forms in which its modules are stored; UserError: there is none to keep.

    Layers that repeat share a config, so a form is that of every one of them, or none. `start`
    stands before every name.
    """
    names = set(files.names())
    found: dict[str, dict] = {}  # field -> its forms, each with a tensor that has it
    for rule in rules(cfg):
        if rule.field:
            name = start + rule.name
            found.setdefault(rule.field, {})[_stored(files, names, name)] = name
    forms = {field: next(iter(x)) for field, x in found.items() if len(x) == 1 and None not in x}
    if not forms:
        name = next(name for x in found.values() for name in x.values())
        raise UserError(
            f"weights cannot be kept quantised: neither the module of {name} nor another has all "
            "of its matrices in one of the forms that are kept; expand them"
        )
    return override(cfg, forms)


def _stored(files: TensorFiles, names: set[str], name: str) -> Int4Config | Fp8Config | None:
    """The form of a matrix in the files; None: it is not quantised, or not as we hold it."""
    if f"{name}_packed" in names:
        return Int4Config() if ".experts." in name else None
    scale = f"{name}_scale_inv"
    if files.info(name).dtype == "F8_E4M3" and scale in names:
        return Fp8Config() if files.info(scale).dtype == "F32" else None
    return None
