"""Adds the check of packed targets to PEFT."""

import functools
import warnings
from typing import Any

from torch import nn

from formats.files.log_once import warn_once
from loader.hf.adapters.packed_targets import PackedTargets, is_all_linear
from loader.hf.by_name.import_hook import after_import


@functools.cache
def check_adapters() -> None:
    """Make PEFT check adapters on packed weights, now or when it is imported.

    PEFT has no hook that sees a configuration before modules change, whichever function adds the
    adapter, so its method is wrapped. Models without packed weights are not affected.
    """
    after_import("peft.tuners.tuners_utils", _wrap)


def _wrap() -> None:
    from peft.tuners import tuners_utils

    tuner: Any = tuners_utils.BaseTuner
    inject = tuner.inject_adapter

    @functools.wraps(inject)
    def checked(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        packed = PackedTargets.find(model)
        if not (packed.linears or packed.experts):
            inject(self, model, adapter_name, *args, **kwargs)
            return
        config = self.peft_config[adapter_name]
        packed.check(config, lambda path: self._check_target_module_exists(config, path))
        all_linear = is_all_linear(config)
        if not all_linear and getattr(config, "target_modules", None) is not None:
            inject(self, model, adapter_name, *args, **kwargs)
            return
        with warnings.catch_warnings():
            # PEFT gives the experts a rank before it looks for them.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
            inject(self, model, adapter_name, *args, **kwargs)
        if packed.forget_experts(config) or (all_linear and packed.experts):
            choice = "all-linear" if all_linear else "PEFT's default targets"
            warn_once(f"{choice}: packed experts get no adapter, other layers do")

    tuner.inject_adapter = checked
