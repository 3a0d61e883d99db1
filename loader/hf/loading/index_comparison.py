"""The modules that an index names, compared with those of the model that is being loaded."""

from torch import nn

from formats import INDEX_NAME
from formats.artifact import Artifact
from formats.errors import FormatError
from formats.index import PackedLinear
from loader.hf.modules.expert_layers import experts_modules


def check_matrix(model: nn.Module, path: str, linear: PackedLinear, artifact: Artifact) -> None:
    """FormatError unless the model has a matrix of the shape that the index says at `path`."""
    module = _module(model, path, artifact)
    found = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None
    if found != (linear.rows, linear.columns) or module.bias is not None:
        has = f"a matrix {list(found)}" if found else f"a {type(module).__name__}"
        raise FormatError(
            f"{artifact.folder / INDEX_NAME}: trunk.packed has {path} of [{linear.rows}, {linear.columns}] without"
            f" bias, the model has {has} there"
        )


def check_experts(model: nn.Module, path: str, artifact: Artifact) -> None:
    """FormatError unless the model has experts of the sizes that the index says at `path`."""
    a, module = artifact.architecture, _module(model, path, artifact)
    shapes = [
        getattr(getattr(module, name, None), "shape", None)
        for name in ("gate_up_proj", "down_proj")
    ]
    expected = [
        (a.num_local_experts, 2 * a.intermediate_size, a.hidden_size),
        (a.num_local_experts, a.hidden_size, a.intermediate_size),
    ]
    if shapes != expected:
        raise FormatError(
            f"{artifact.folder / INDEX_NAME}: the experts at {path} are {[list(x) for x in expected]}, the model has"
            f" {[list(x) if x else None for x in shapes]} there"
        )


def check_no_experts_left(model: nn.Module, artifact: Artifact) -> None:
    """FormatError naming experts of the model that the index does not name."""
    if left := experts_modules(model).keys() - artifact.architecture.expert_modules:
        raise FormatError(
            f"{artifact.folder / INDEX_NAME}: expert_modules lacks {min(left)}, which the model has"
        )


def _module(model: nn.Module, path: str, artifact: Artifact) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise FormatError(
            f"{artifact.folder / INDEX_NAME}: {path} is no module of the model"
        ) from None
