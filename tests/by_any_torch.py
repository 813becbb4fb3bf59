"""A pytest plugin that replaces the module for the installed torch by the one for any torch."""

from __future__ import annotations

import sys

from dracopt_ext import any_torch, backend

module = backend.load_module(backend.ANY_TORCH)
module.set_places(any_torch.find_places())
backend._C = sys.modules["dracopt_ext._C"] = module
