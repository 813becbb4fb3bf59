"""``python -m tests.mutants``: builds one fault after the other into copies of the sources, one copy for each core. The
test that is named for a fault must fail. Prints a table; exits with 1 if a fault is not found, or does not fit the
sources any more.

``python -m tests.mutants WORD...`` takes only the faults whose name contains one of the words.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIES = ROOT / "build" / "mutants"
WORKERS = os.cpu_count() or 1
# dracopt_ext/triton_kernels is a link to the folder beside dracopt_ext.
IGNORED = shutil.ignore_patterns("__pycache__", "native", "_build_info.py", "triton_kernels")
COPIED = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
COPIED += ["benchmarks", "csrc", "dracopt_ext", "triton_kernels", "tests"]


@dataclass(frozen=True)
class Mutant:
    """A fault that replaces ``old`` by ``new`` in a file, which contains ``old`` once."""

    name: str
    file: str
    old: str
    new: str
    found_by: str
    """The test that must fail, as ``file::function``."""

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


TRITON_KERNEL, TRITON_LAUNCHER = "triton_kernels/kernel.py", "triton_kernels/launcher.py"
TRITON_LAUNCHES, TRITON_ARITHMETIC = "csrc/bindings/triton_launches.cpp", "triton_kernels/arithmetic.py"
ANY_TORCH, ONE_TORCH = (f"csrc/bindings/tensor_of_{which}_torch.h" for which in ("any", "one"))
TRITON_BITS = "test_triton::test_on_the_cpu_in_the_interpreter"
ADAM, LION, MOMENTS, SGD, NADAM = (f"csrc/rules/{name}.h" for name in ("adam", "lion", "moments", "sgd", "nadam"))
KERNELS, TILES = "csrc/cpu/kernels.cpp", "csrc/cpu/tiles.h"
PATCHES, RUNS = "csrc/cpu/patches.h", "csrc/cpu/runs.h"
DTYPE, LAYOUT, MATH, SEGMENT = (f"csrc/core/{name}.h" for name in ("dtype", "layout", "math", "segment"))
MASTER, STOCHASTIC, CPU_ROUNDING = "csrc/core/master.h", "csrc/core/stochastic.h", "csrc/cpu/rounding.h"
PLAN, READER, EXAMINE, UPDATES, RUNNER, TODO, REFUSALS, SEARCH, LAUNCHES = (
    f"csrc/bindings/{name}.cpp"
    for name in (
        *("step_plan", "python_reader", "examine", "updates", "runner", "todo", "refusals", "shared_memory"),
        "gpu_launches",
    )
)
KEYS, FACTS, OVERLAP = (f"csrc/bindings/{name}.h" for name in ("key_reader", "tensor_facts", "written_memory"))
LOCAL_TENSORS = "csrc/bindings/local_tensors.cpp"
DISPATCH = "csrc/cpu/dispatch.cpp"
LAUNCH, GPU_TILE, GPU_UPDATE = (f"csrc/cuda/{name}.h" for name in ("launch", "tile", "update"))
FAST_MATH, FAST = "csrc/cuda/fast_math.h", "test_core::test_fast_math"
BASE, STEP, KIND, SCALED, BY_TORCH, BY_REFERENCE, CHECKPOINTS = (
    f"dracopt_ext/optim/_{name}.py"
    for name in ("base", "step", "kind", "scaled", "by_torch", "by_reference", "checkpoints")
)
REFERENCE, PRECISION = "dracopt_ext/reference.py", "dracopt_ext/optim/_precision.py"
RULE, CONTEXT, OWN = "dracopt_ext/rule.py", "dracopt_ext/optim/_context.py", "dracopt_ext/optim/_own.py"
SGD_CLASS, CONTAINERS = "dracopt_ext/optim/sgd.py", "dracopt_ext/containers.py"

BITS = "test_bits::test_reference_in_fp32"
EDITS, GPU_EDITS = "test_edits", "test_edits_on_a_gpu"
COMPILE_FOR_THEMSELVES = ("test_core::", "test_gpu::", "test_gpu_kit::")
ANY = ["-p", "tests.by_any_torch"]

MUTANTS = [
    # The rules
    Mutant("sign of the next average", LION, "states[0] * c.beta1);", "states[0] * c.beta2);", BITS),
    Mutant("NaN has no sign", LION, ": average;", ": T(0);", "test_own::test_the_sign_of_zero_and_nan"),
    Mutant(
        "Triton: NaN has no sign",
        "triton_kernels/rules.py",
        "tl.where(average < 0, -1.0, average)",
        "tl.where(average < 0, -1.0, 0.0)",
        "test_own::test_the_sign_of_zero_and_nan",
    ),
    # Declarations, and what is derived from them
    Mutant(
        "a moment without its option",
        RULE,
        "switch is None or is_on(switch)",
        "True",
        "test_cases::test_a_moment_that_is_switched_off_by_a_number_or_a_flag",
    ),
    Mutant(
        "all moments have the same random bits",
        RULE,
        "FIRST_STATE + list(self.moments).index(moment)",
        "FIRST_STATE",
        "test_precision::test_reference",
    ),
    Mutant(
        "declarations are not compared",
        KIND,
        "if backend._C is not None and (_found",
        "if False and (_found",
        "test_own::test_the_import_fails_if_the_declarations_differ",
    ),
    Mutant(
        "new moments are not zeros",
        KIND,
        "self.rule.first_step_fills else torch.zeros_like",
        "self.rule.first_step_fills else torch.ones_like",
        "test_own::test_lion_is_what_the_paper_says",
    ),
    Mutant(
        "constructors lack a hyperparameter",
        KIND,
        "for name in self.rule.kinds.keys() - parameters.keys():",
        "for name in ():",
        "test_own::test_a_class_that_lacks_a_hyperparameter",
    ),
    Mutant(
        "unknown options are taken",
        CONTEXT,
        "for name in [name for name in options if name not in DEFAULTS]:",
        "for name in ():",
        "test_own::test_constructors_refuse",
    ),
    Mutant(
        "negative numbers are taken",
        OWN,
        "if not as_number(value, name) >= 0:",
        "if value != value:",
        "test_own::test_constructors_refuse",
    ),
    Mutant(
        "old checkpoints lack options",
        OWN,
        "group.setdefault(key, self.defaults[key])",
        "pass",
        "test_own::test_checkpoints_of_other_libraries",
    ),
    Mutant(
        "sparse gradients are left to torch",
        BY_TORCH,
        "refuses_sparse = fused or not kind.takes_sparse",
        "refuses_sparse = fused",
        "test_refusals::test_a_group_that_is_refused_leaves_the_others_alone",
    ),
    Mutant(
        "capturable groups are not the first",
        BY_TORCH,
        'by_torch.sort(key=lambda group: not group.get("capturable"))',
        "pass",
        "test_refusals::test_a_group_that_is_refused_leaves_the_others_alone",
    ),
    Mutant(
        "capturable without a count of steps",
        READER,
        "group.capturable &= rule_.state_scalars > 0;",
        "",
        "test_own::test_capturable_changes_nothing_without_a_count_of_steps",
    ),
    Mutant("weight decay without lr", MOMENTS, "1 - h.lr * h.weight_decay", "1 - h.weight_decay", BITS),
    Mutant("no L2 penalty", MOMENTS, ".has_l2 = flag<T>(!decoupled && h.weight_decay != 0)", ".has_l2 = 0", BITS),
    Mutant("moment of the raw gradient", MOMENTS, "g = select(has_l2, fma(p, l2, g), g);", "", BITS),
    Mutant("two roundings for one", MOMENTS, "fma(one_minus_beta2 * g, g, ", "(one_minus_beta2 * g * g + ", BITS),
    Mutant("lerp from the wrong end", MOMENTS, ".from_grad = flag<T>(from_grad)", ".from_grad = 0", BITS),
    Mutant("no bias correction", MOMENTS, "sqrt(1 - power(h.beta2, step))", "1", BITS),
    Mutant("no eps", MOMENTS, "bias_correction2_sqrt) + eps;", "bias_correction2_sqrt);", BITS),
    Mutant("step counts from 0", ADAM, "1 - power(h.beta1, step)", "1 - power(h.beta1, step - 1)", BITS),
    Mutant(
        "amsgrad's maximum not stored",
        ADAM,
        "second_moment = states[2] = maximum(states[2], second_moment)",
        "second_moment = maximum(states[2], second_moment)",
        "test_known_defects::test_78807_the_maximum_of_amsgrad_is_stored",
    ),
    Mutant(
        "maximum drops NaN",
        "csrc/core/math.h",
        "((a > b) | (a != a))",
        "(a > b)",
        "test_bits::test_nan_in_every_stream",
    ),
    Mutant("first momentum dampened", SGD, ".first = flag<T>(first)", ".first = 0", BITS),
    Mutant("nesterov ignored", SGD, "flag<T>(h.nesterov != 0)", "0", BITS),
    Mutant("dampening ignored", SGD, "static_cast<T>(1 - h.dampening)", "1", BITS),
    Mutant("mu_product stands still", NADAM, "state_scalars[1].multiply(mu)", "state_scalars[1].value * mu", BITS),
    Mutant("momentum of this step for the next", NADAM, "mu_next = momentum(step + 1, h)", "mu_next = mu", BITS),
    # The plan's memory of the step before
    *(
        Mutant(f"memory: {name}", file, old, new, f"test_memory::{test}")
        for name, file, old, new, test in [
            ("a group's dict is the same", READER, "group.version == version && version != 0;", "version != 0;", EDITS),
            ("a list of decay rates stays", READER, "group.lasts &= PyTuple_CheckExact(value);", "", EDITS),
            ("a tensor of a group stays", READER, "    group.lasts = false;\n", "", EDITS),
            ("the dict of all states", READER, "version == known && ", "", EDITS),
            (
                "parameters at their places",
                READER,
                "same_state && block[i].parameter == parameter;",
                "same_state;",
                EDITS,
            ),
            ("a state's dict", READER, "located.version == version_of(located.entries) &&", "", EDITS),
            (
                "the number of values",
                READER,
                "located.wanted == inventory.wanted_values(",
                "0 < inventory.wanted_values(",
                EDITS,
            ),
            (
                "the terms of a group",
                PLAN,
                "std::exchange(group.examined_for, Terms{}) == group;",
                "group.examined_for.states >= 0;",
                EDITS,
            ),
            ("the group", EXAMINE, "ready.group != located.group || ", "", EDITS),
            ("inference mode", EXAMINE, " || (p.is_inference() && !inference_mode)) return", ") return", EDITS),
            ("the number of places", PLAN, "if (same_size && !share.changed)", "if (!share.changed)", GPU_EDITS),
            (
                "parameters without gradients",
                PLAN,
                "std::holds_alternative<PassedOver>(examined)) continue;",
                "true) continue;",
                EDITS,
            ),
            (
                "a parameter's class",
                PLAN,
                "(!inventory.has_subclasses || is_exact_tensor(located.local)) && ",
                "",
                EDITS,
            ),
            ("a parameter's dtype", EXAMINE, " || param.dtype != ready.dtypes[kParam]) return", ") return", EDITS),
            ("a parameter's size", EXAMINE, "param.numel * ready.reals != segment.numel || ", "", EDITS),
            ("a parameter's gaps", EXAMINE, "if (!p.is_non_overlapping_and_dense()) return false;", "", EDITS),
            (
                "a parameter's place",
                EXAMINE,
                "if (!is_at(param, segment.data[kParam], ready.itemsizes[kParam], param.numel)) return false;",
                "",
                EDITS,
            ),
            ("a gradient's dtype", EXAMINE, "facts.dtype != ready.dtypes[kGrad] || ", "", EDITS),
            ("a gradient's layout", EXAMINE, " || !lies_like(gradient, facts, p, param)) return", ") return", EDITS),
            (
                "a gradient's alignment",
                EXAMINE,
                "if (!is_aligned(found.gradient, segment.dtypes[kGrad])) return false;",
                "",
                EDITS,
            ),
            (
                "a gradient's memory",
                EXAMINE,
                "if (!has_memory(facts, itemsize, param.numel * itemsize, found.gradient)) return false;",
                "has_memory(facts, itemsize, param.numel * itemsize, found.gradient);",
                EDITS,
            ),
            ("a moved gradient", PLAN, "if (moved) share.search", "if (false) share.search", EDITS),
            ("a scalar's dtype", EXAMINE, "facts.dtype != ready.scalar_dtypes[k] || ", "", EDITS),
            ("a scalar's size", EXAMINE, " || facts.numel != 1) return", ") return", EDITS),
            ("a scalar's place", EXAMINE, "if (!is_at(facts, data, fp32 ? 4 : 8, 1)) return false;", "", EDITS),
            ("a step count", EXAMINE, "if (k == 0 && !is_step_count(now)) return false;", "", EDITS),
            ("scalars", EXAMINE, "prepared_of(segment).state_scalars[k].value == now;", "true;", EDITS),
            (
                "a state's class",
                EXAMINE,
                "    if (value == nullptr || !is_exact_tensor(value)) return false;\n    const Tensor state",
                "    if (value == nullptr) return false;\n    const Tensor state",
                EDITS,
            ),
            ("a state's dtype", EXAMINE, "facts.dtype != ready.dtypes[k] || ", "", EDITS),
            ("a state's layout", EXAMINE, " || !lies_like(state, facts, p, param)) return", ") return", EDITS),
            (
                "a state's place",
                EXAMINE,
                "if (!is_at(facts, segment.data[k], ready.itemsizes[k], param.numel)) return false;",
                "",
                EDITS,
            ),
            ("lazy clones", EXAMINE, " && !facts.is_lazily_cloned;", ";", EDITS),
            ("strides", EXAMINE, "same_strides &= facts.strides[d] == param.strides[d];", "", EDITS),
            ("shapes", EXAMINE, "if (facts.sizes[d] != param.sizes[d]) return false;", "", EDITS),
            (
                "the directions of launches",
                LAUNCHES,
                "maximize != segment.update->maximize || known",
                "maximize > 1 || known",
                GPU_EDITS,
            ),
            (
                "shared slots",
                LAUNCHES,
                "return std::memcmp(words, slot, slot_words * sizeof(*slot)) == 0;",
                "return true;",
                GPU_EDITS,
            ),
            (
                "gradients of launches",
                LAUNCHES,
                "launch.gradients[next_row_ - launch.first_row] =",
                "(void)",
                GPU_EDITS,
            ),
            (
                "updates of launches",
                RUNNER,
                "std::exchange(filled_for_, 0) == updates.version() && ",
                "filled_for_ != 0 && ",
                GPU_EDITS,
            ),
        ]
    ),
    Mutant(
        "memory: the version of the updates",
        UPDATES,
        "std::exchange(prepared_for_, 0) == inventory.version &&",
        "std::exchange(prepared_for_, 0) != 0 &&",
        "test_memory::test_calls_that_take_no_step",
    ),
    Mutant(
        "memory: a call that failed",
        READER,
        "const uint64_t known = std::exchange(state_version_, 0);",
        "const uint64_t known = state_version_;",
        "test_memory::test_other_states_in_a_step_that_fails",
    ),
    Mutant(
        "memory: a backend",
        PLAN,
        "on_gpu.why_not == nullptr && on_gpu.backend == streams.backend",
        "true",
        "test_gpu::test_triton_serves_where_cuda_does_not",
    ),
    # The loop and its tiles
    Mutant("lost tail", KERNELS, "i < count; ++i) {\n    T of", "i < (count & ~7); ++i) {\n    T of", BITS),
    Mutant("maximize ignored", SEGMENT, "(maximize ? -1 : 1) * coefficient", "coefficient", BITS),
    Mutant(
        "grad_scale ignored",
        TILES,
        "if (!update.divides) return tile;",
        "return tile;",
        "test_dtypes::test_grad_scale_is_divided_by",
    ),
    Mutant(
        "grad_scale multiplied by its reciprocal",
        TILES,
        "staged[i] = tile[i] / by",
        "staged[i] = tile[i] * (1 / by)",
        "test_dtypes::test_grad_scale_is_divided_by",
    ),
    Mutant(
        "staged states not written back",
        KERNELS,
        "if (k != kGrad && is_staged)",
        "if (k == kParam && is_staged)",
        "test_dtypes::test_reference",
    ),
    Mutant(
        "rows not followed",
        TILES,
        "offset += strides[d - 1] - index[d] * strides[d];",
        "offset += strides[d - 1] - strides[d];",
        "test_layouts::test_one_layout",
    ),
    Mutant(
        "a run that is not all of the tile in place",
        TILES,
        "if (n == count && stride == 1)",
        "if (n == count)",
        "test_layouts::test_one_layout",
    ),
    *(
        Mutant(f"patches: {name}", file, old, new, f"test_layouts::{test}")
        for name, file, old, new, test in [
            ("copies not written back", KERNELS, "rows[k].first == staged[k]) store", "false) store", "test_patches"),
            ("rows that lie apart as one", KERNELS, "adjacent &= rows[k].pitch ==", "adjacent |= 0 ==", "test_patches"),
            ("gradients stay", KERNELS, "zeroes) clear(patches", "divides > 1) clear(patches", "test_patches"),
            ("gaps in a row ignored", PATCHES, "patches.column_stride(stream) == 1 && ", "", "test_patches"),
            ("more than there are", PATCHES, "number < count_ ? number : count_", "number", "test_patches"),
            ("outer dimensions ignored", PATCHES, "if (d != row_dim_) take(d, 1);", "", "test_patches"),
            ("cut beyond the end", PATCHES, "size(d) - begin < most ? size(d) - begin : most", "most", "test_patches"),
        ]
    ),
    Mutant(
        "strides ignored",
        PLAN,
        "segment.dense[k] = segment.layout->dense(k)",
        "segment.dense[k] = true",
        "test_layouts::test_one_layout",
    ),
    Mutant(
        "dimensions joined that do not",
        LAYOUT,
        "k < streams && joins; ++k) joins",
        "k < 1 && joins; ++k) joins",
        "test_core::test_layouts_join_what_all_streams_traverse_as_one",
    ),
    Mutant(
        "bf16 truncated",
        DTYPE,
        "bits + 0x7fffu + (bits >> 16 & 1)",
        "bits",
        "test_dtypes::test_every_rounding_to_16_bits_is_right",
    ),
    Mutant(
        "ties rounded up",
        DTYPE,
        "bits + 0x7fffu + (bits >> 16 & 1)",
        "bits + 0x8000u",
        "test_dtypes::test_every_rounding_to_16_bits_is_right",
    ),
    Mutant(
        "NaN rounded to zero",
        DTYPE,
        "x != x ? Bits{} + 0x7fc00000u : bits",
        "bits",
        "test_dtypes::test_every_rounding_to_16_bits_is_right",
    ),
    Mutant(
        "subnormal fp16 flushed",
        DTYPE,
        "(magnitude < smallest_normal ? subnormal : normal)",
        "(magnitude < smallest_normal ? 0 : normal)",
        "test_dtypes::test_every_16_bit_number_is_read_right",
    ),
    Mutant(
        "beyond the end of a tensor",
        SEGMENT,
        "units < units_of(segment.numel, segment.unit_numel) ? units * segment.unit_numel : segment.numel",
        "units * segment.unit_numel",
        "test_core::test_work_is_shared_without_gap_or_overlap_beyond_two_to_the_31",
    ),
    Mutant(
        "32-bit element numbers",
        SEGMENT,
        "const int64_t from = begin > segment.first_unit",
        "const int from = begin > segment.first_unit",
        "test_core::test_work_is_shared_without_gap_or_overlap_beyond_two_to_the_31",
    ),
    # The plan
    Mutant(
        "last parameter skipped", READER, "  located.resize(total);", "  located.resize(total ? --total : 0);", BITS
    ),
    Mutant(
        "hyperparameters of the first group for all",
        UPDATES,
        "first, group.hyperparameters, powers,",
        "first, inventory.groups[0].hyperparameters, powers,",
        "test_known_defects::test_parameters_in_groups_have_their_own_hyperparameters",
    ),
    Mutant(
        "hyperparameters read once",
        READER,
        "  group.hyperparameters[k] = value;\n",
        "  if (static bool read[64]; !std::exchange(read[k], true)) group.hyperparameters[k] = value;\n",
        "test_life::test_hyperparameters_change",
    ),
    Mutant(
        "step count of the neighbour",
        UPDATES,
        "same = scalars[k].value == last_scalars[k].value &&",
        "same =",
        "test_life::test_late_missing_and_frozen_gradients",
    ),
    Mutant(
        "no version bump",
        RUNNER,
        "  located.param().bump_version();",
        "",
        "test_known_defects::test_versions_are_bumped",
    ),
    Mutant(
        "shared memory not searched for",
        OVERLAP,
        "pieces_[i].begin < reach",
        "false",
        "test_fallback::test_parameters_that_share_memory",
    ),
    Mutant(
        "halves of a pair swapped",
        RUNS,
        "low >> 16 | (high & 0xffff0000u)",
        "high >> 16 | (low & 0xffff0000u)",
        "test_core::test_conversions",
    ),
    Mutant(
        "masters: another tie",
        MASTER,
        "((bits + 0x8000u) & 0xffff0000u)",
        "((bits + 0x7fffu) & 0xffff0000u)",
        "test_core::test_all_masters_are_what_their_halves_say",
    ),
    Mutant(
        "masters: a tie of another library loses its master",
        MASTER,
        "0x8000u <= 0x10000u",
        "0x8000u < 0x10000u",
        "test_core::test_all_masters_are_what_their_halves_say",
    ),
    Mutant(
        "masters: a NaN takes a new parameter's place",
        MASTER,
        "(is_near & (master == master))",
        "is_near",
        "test_core::test_all_masters_are_what_their_halves_say",
    ),
    Mutant(
        "masters: the parameter of fp16 never wins",
        MASTER,
        "widen(narrow<Fp16>(master)) == param ? master : param",
        "master",
        "test_precision::test_a_parameter_that_changes_on_a_gpu",
    ),
    Mutant(
        "masters: what the user writes is lost",
        CPU_ROUNDING,
        "i < count && differs != 0",
        "i < count && false",
        "test_precision::test_a_parameter_that_the_user_changes_takes_its_masters_place",
    ),
    Mutant(
        "masters: the lower half stays",
        CPU_ROUNDING,
        "rests[i] = static_cast<Bits>(halves);",
        "",
        "test_precision::test_masters_are_those_of_training_in_fp32",
    ),
    Mutant(
        "masters: a missing one is created anew",
        EXAMINE,
        "k > 0 && k == of_rule",
        "false",
        "test_precision::test_wrong_masters_in_a_state",
    ),
    Mutant(
        "masters: any dtype",
        EXAMINE,
        "tensor.dtype() != (form == Master::fp32 ? kFp32 : kBf16)",
        "false",
        "test_precision::test_wrong_masters_in_a_state",
    ),
    Mutant(
        "masters: not from a checkpoint",
        CHECKPOINTS,
        "    if name is None:\n        return precision.new_master(p)\n",
        "    if True:\n        return precision.new_master(p)\n",
        "test_precision::test_training_goes_on_as_if_it_had_not_stopped",
    ),
    Mutant(
        "masters: torch steps beside them",
        BY_TORCH,
        "precision.rounds(p) or ",
        "",
        "test_precision::test_steps_without_compiled_kernels",
    ),
    Mutant(
        "masters: lost where GPU vectors are of any dtypes",
        GPU_UPDATE,
        "if (master_in<Storage>() != Master::none) store<Storage>(kMaster, i, stored[kMaster]);",
        "",
        "test_precision::test_gpu",
    ),
    Mutant(
        "masters: zero with half a master is NaN",
        MASTER,
        "return master == master ? master : param;",
        "return master;",
        "test_core::test_all_masters_are_what_their_halves_say",
    ),
    Mutant(
        "masters: taken for a momentum of another step",
        READER,
        "located.states == inventory.groups[located.group].states",
        "true",
        "test_precision::test_a_master_is_not_taken_for_a_moment",
    ),
    Mutant(
        "masters: moments of another library's checkpoint must be there",
        EXAMINE,
        "!has_only_master(located, of_rule)",
        "true",
        "test_precision::test_masters_of_parameters_that_have_no_moments_yet",
    ),
    Mutant(
        "random bits: a round less",
        STOCHASTIC,
        "kRounds = 7",
        "kRounds = 6",
        "test_core::test_random_bits_and_rounding_at_random",
    ),
    Mutant(
        "random bits: all streams alike",
        STOCHASTIC,
        "static_cast<uint32_t>(stream) << 24",
        "static_cast<uint32_t>(0 * stream) << 24",
        "test_precision::test_gpu",
    ),
    Mutant(
        "random bits: a shard counts from zero",
        CPU_ROUNDING,
        "rounding.first + from, count, words",
        "from, count, words",
        "test_distributed_training::test_rounding",
    ),
    Mutant(
        "random bits: shards of columns count like rows",
        PLAN,
        "if (!layout.dense(kWhole))",
        "if (false)",
        "test_distributed_training::test_rounding",
    ),
    Mutant(
        "random bits: released parameters count from zero",
        PLAN,
        "at_random.first_param + static_cast<uint32_t>(i)",
        "static_cast<uint32_t>(i)",
        "test_precision::test_gradients_that_are_released_give_the_same_bits",
    ),
    Mutant(
        "random bits: every step the same",
        BASE,
        "_precision.advance(group, 1)",
        "_precision.advance(group, 0)",
        "test_precision::test_elements_and_steps_and_parameters_and_seeds_differ",
    ),
    Mutant(
        "random bits: vectors on a GPU begin anywhere in a block",
        GPU_UPDATE,
        "(row.first + head) % kRandomBlock != 0",
        "false",
        "test_precision::test_misaligned_tensors_on_a_gpu",
    ),
    Mutant(
        "rounding at random takes NaN for a number",
        STOCHASTIC,
        "return x != x ? Bits{} + 0x7fc00000u : __builtin_bit_cast(Bits, x) + random;",
        "return __builtin_bit_cast(Bits, x) + random;",
        "test_core::test_random_bits_and_rounding_at_random",
    ),
    Mutant(
        "rounding at random in fp16 forgets subnormal numbers",
        STOCHASTIC,
        "const uint32_t finite = magnitude < smallest_normal ? subnormal : normal;",
        "const uint32_t finite = normal;",
        "test_core::test_random_bits_and_rounding_at_random",
    ),
    Mutant(
        "Triton: masters of another tie",
        TRITON_ARITHMETIC,
        "bits_of(x) + 0x8000) >> 16",
        "bits_of(x) + 0x7FFF) >> 16",
        "test_precision::test_gpu",
    ),
    Mutant(
        "a dtype for one moment is that of all",
        PRECISION,
        "self.state_dtype.get(moment) if isinstance(self.state_dtype, Mapping) else self.state_dtype",
        "next(iter(self.state_dtype.values())) if isinstance(self.state_dtype, Mapping) else self.state_dtype",
        "test_precision::test_a_dtype_for_each_moment",
    ),
    Mutant(
        "the search trusts what lay at another place",
        SEARCH,
        "  if (!complete || inventory.size() != searched_) written_moved_ = true;\n",
        "  complete = true;\n",
        "test_fallback::test_the_search_is_repeated_when_parameters_change_places",
    ),
    Mutant(
        "only the last range before a reader looked at",
        OVERLAP,
        "reach = std::max(reach, end_of(piece))",
        "reach = end_of(piece)",
        "test_fallback::test_a_gradient_inside_a_parameter_that_encloses_another",
    ),
    Mutant(
        "what torch steps not searched",
        SEARCH,
        "if (bytes > 0) memory_.add(i, kParam, data);",
        "(void)data, (void)bytes, (void)i;",
        "test_fallback::test_a_gradient_inside_a_parameter_that_torch_steps",
    ),
    Mutant(
        "fp64 states in fp32 arithmetic",
        EXAMINE,
        "fp64 |= stored.dtype == Dtype::fp64;",
        "fp64 |= k == kParam && stored.dtype == Dtype::fp64;",
        "test_dtypes::test_reference",
    ),
    Mutant(
        "a parent's step runs in its child",
        PLAN,
        "if (running_in_ == cpu::forks())",
        "if (running_in_ != kNoProcess)",
        "test_hostile_programs::test_a_child_forked_during_a_step",
    ),
    Mutant(
        "a parent's step of Python runs in its child",
        STEP,
        "context, process = self.context, os.getpid()",
        "context, process = self.context, 0",
        "test_hostile_programs::test_a_child_forked_during_a_step",
    ),
    Mutant(
        "a step within a step",
        STEP,
        "if context.running.setdefault(process, self) is not self:",
        "if context.running.setdefault(process, self) is None:",
        "test_hostile_programs::test_a_step_within_a_step_is_refused",
    ),
    Mutant(
        "methods of keys called",
        KEYS,
        "if (!all_strings) return false;",
        "",
        "test_hostile_programs::test_edits_while_a_group_is_read",
    ),
    Mutant(
        "a learned learning rate is an old one",
        SEARCH,
        "read(inventory.size() + static_cast<size_t>(group.index), group.addresses[k], group.bytes[k]);",
        "",
        "test_hostile_programs::test_a_learned_learning_rate",
    ),
    Mutant(
        "a hyperparameter may lie anywhere",
        SEARCH,
        "if (hyperparameters_moved(inventory)) reads_moved_ = true;",
        "",
        "test_hostile_programs::test_a_hyperparameter_that_moves_into_a_parameter",
    ),
    Mutant(
        "infinite scalars",
        UPDATES,
        "if (!finite && !ready.has_recipe)",
        "if (false)",
        "test_hostile_programs::test_hyperparameters_that_the_arithmetic_does_not_hold",
    ),
    Mutant(
        "an exponential without end",
        MATH,
        "if (x > 709.0) return __builtin_inf();",
        "",
        "test_core::test_nadams_momenta_are_those_of_libm_up_to_a_million_steps",
    ),
    Mutant(
        "odd addresses",
        EXAMINE,
        "if (!is_aligned(data, stored.dtype) && extent > 0)",
        "if (false)",
        "test_hostile_programs::test_odd_addresses",
    ),
    Mutant(
        "errors in any bytes",
        DISPATCH,
        "printable(wanted) + ",
        "std::string(wanted) + ",
        "test_hostile_programs::test_an_instruction_set_in_any_bytes",
    ),
    Mutant(
        "kernels of any build",
        "csrc/bindings/module.cpp",
        "cpu::interface() != DRACOPT_INTERFACE",
        "false",
        "test_hostile_programs::test_kernels_of_another_build_are_refused",
    ),
    Mutant(
        "gradients of any shape taken",
        EXAMINE,
        "if (!same_shape(tensor, param)) return Fault::shape;",
        "",
        "test_refusals::test_gradients_that_do_not_fit",
    ),
    Mutant(
        "expanded parameters taken",
        FACTS,
        "return tensor.numel() > 0;",
        "return false;",
        "test_refusals::test_expanded_parameter",
    ),
    Mutant(
        "NaN hyperparameters taken",
        READER,
        "!std::isfinite(value) ||",
        "",
        "test_refusals::test_groups_edited_to_nonsense",
    ),
    # The GPU
    Mutant(
        "a row too early",
        GPU_TILE,
        "arguments.first_tiles[row + at] <= block",
        "arguments.first_tiles[row + at] < block",
        "test_core::test_launches_hold_every_tile_once",
    ),
    Mutant(
        "tiles not shifted with the first vector",
        GPU_TILE,
        "begin = number * kTile + (number > 0 ? head : 0);",
        "begin = number * kTile;",
        "test_core::test_launches_hold_every_tile_once",
    ),
    Mutant(
        "slots beyond the arguments' end",
        LAUNCH,
        "tensors + 1 + slot_words + slot > room",
        "tensors + 1 + slot_words > room",
        "test_core::test_launches_hold_every_tile_once",
    ),
    Mutant(
        "no block for an empty tensor",
        LAUNCH,
        "numel <= tile ? 1 :",
        "numel == 0 ? 0 :",
        "test_gpu::test_empty_tensors_at_every_position",
    ),
    Mutant(
        "last elements lost on the GPU",
        GPU_UPDATE,
        "first == range.end ? first : range.first + (range.end - range.last)",
        "first",
        "test_gpu::test_bits_of_the_cpu",
    ),
    Mutant(
        "vectors that need PlainMath are lost",
        GPU_UPDATE,
        "left.bits |= bit;",
        "",
        "test_gpu::test_special_numbers",
    ),
    Mutant(
        "elements in no vector are lost",
        GPU_UPDATE,
        "range.first > 0 || range.last < range.end ? Left::kLoose : 0",
        "range.first > 0 ? Left::kLoose : 0",
        "test_gpu::test_bits_of_the_cpu",
    ),
    Mutant(
        "misaligned states taken for aligned",
        GPU_UPDATE,
        "row.misaligned || reinterpret_cast",
        "reinterpret_cast",
        "test_gpu::test_misaligned",
    ),
    Mutant(
        "maximize only where gradients are divided, too",
        GPU_UPDATE,
        "adjusts = number != T(1) || coefficient != T(1);",
        "adjusts = number != T(1);",
        "test_gpu::test_bits_of_the_cpu",
    ),
    Mutant(
        "neighbours in fp16 change places",
        "csrc/core/dtype.h",
        "round_to_fp16(low) | static_cast<uint32_t>(round_to_fp16(high)) << 16",
        "round_to_fp16(high) | static_cast<uint32_t>(round_to_fp16(low)) << 16",
        "test_gpu::test_special_numbers_among_others",
    ),
    Mutant(
        "search for a row ends after a round",
        GPU_TILE,
        "rows = rows - passed < distance ? rows - passed : distance;",
        "rows = 1;",
        "test_core::test_launches_hold_every_tile_once",
    ),
    Mutant(
        "PlainMath for another vector",
        GPU_UPDATE,
        "lowest_bit(left.bits) * kThreads) * left.lanes",
        "lowest_bit(left.bits)) * left.lanes",
        "test_gpu::test_special_numbers_among_others",
    ),
    Mutant(
        "root of a number that is too small",
        FAST_MATH,
        "require(is_zero_or_from(x, 0x1p-100f));",
        "",
        FAST,
    ),
    Mutant(
        "root of zero",
        FAST_MATH,
        "estimate_reciprocal_root(x + 0x1p-126f)",
        "estimate_reciprocal_root(x)",
        FAST,
    ),
    Mutant("quotient by a number that is too large", FAST_MATH, "require(divides_by(d));", "", FAST),
    Mutant(
        "quotient by a known number that is too large",
        "csrc/core/math.h",
        "value > 0 && value <= kMost",
        "value > 0",
        FAST,
    ),
    Mutant(
        "quotient by a known negative number", "csrc/core/math.h", "value > 0 && value <= kMost", "value <= kMost", FAST
    ),
    Mutant(
        "quotient of a gradient that is too small",
        FAST_MATH,
        "return is_zero_or_from(x, kLeast) ? divide(x, d.value, d.inverse)",
        "return true ? divide(x, d.value, d.inverse)",
        FAST,
    ),
    Mutant("quotient of -0", FAST_MATH, "fma(fma(d, q, -x), -inverse, q)", "fma(fma(-d, q, x), inverse, q)", FAST),
    Mutant("quotient without its remainder", FAST_MATH, "fma(fma(d, q, -x), -inverse, q)", "q", FAST),
    Mutant("root without its remainder", FAST_MATH, "fma(fma(-root, root, x), half, root)", "root", FAST),
    Mutant(
        "a launch that does nothing",
        "tests/simulated_gpu/launcher.cpp",
        "  kSteps[rule][static_cast<int>(arithmetic)](arguments);\n",
        "",
        "test_gpu_kit::test_check_on_the_host",
    ),
    Mutant(
        "a launch with gradients that are 1% off",
        GPU_UPDATE,
        "const auto number = static_cast<T>(",
        "const auto number = T(1.01) * static_cast<T>(",
        "test_gpu_kit::test_check_on_the_host",
    ),
    Mutant(
        "threads are waited for before a launch",
        PLAN,
        "if (share.on_gpu) {",
        "if (false) {",
        "test_gpu::test_no_other_thread_is_waited_for",
    ),
    Mutant(
        "misaligned stream taken for aligned",
        GPU_UPDATE,
        "return address % kVectorBytes == 0;",
        "return true;",
        "test_gpu::test_misaligned",
    ),
    Mutant(
        "grad_scale not read by the kernel",
        GPU_UPDATE,
        "arguments.grad_scale == nullptr ?",
        "true ?",
        "test_gpu::test_grad_scale_is_read_by_the_kernel",
    ),
    Mutant(
        "lr on the GPU taken for its address",
        GPU_TILE,
        "recipe.fp32_address >> k & 1 ",
        "false ",
        "test_gpu::test_tensor_lr_on_the_gpu",
    ),
    Mutant(
        "step count on the GPU not moved on",
        GPU_TILE,
        "*static_cast<float*>(row.state_scalars[k]) = ",
        "",
        "test_gpu::test_bits_of_the_cpu",
    ),
    Mutant(
        "table of an earlier step",
        LAUNCHES,
        "if (image_ != written_) written_.clear();",
        "if (image_.size() != written_.size()) written_.clear();",
        "test_gpu::test_table_is_written_once",
    ),
    Mutant(
        "first group's scalars for all on the GPU",
        LAUNCHES,
        "std::memcmp(&launch.slots[known.at], slot, slot_words * sizeof(*slot)) == 0",
        "true",
        "test_gpu::test_steps_of_different_tensors",
    ),
    Mutant(
        "table that only a graph would write",
        LAUNCHES,
        "if (!capturing_) written_ = image_;",
        "written_ = image_;",
        "test_gpu::test_table_of_a_capture_is_the_graphs_alone",
    ),
    Mutant(
        "captured table given back",
        LAUNCHES,
        "  if (capturing_) keep(table_);",
        "",
        "test_gpu::test_captured_memory_outlives_the_capture",
    ),
    Mutant(
        "another device's hyperparameters",
        EXAMINE,
        "p.device() != *group.gpu",
        "false",
        "test_gpu::test_tensor_lr_on_another_device",
    ),
    Mutant(
        "host does not notice an overflow that it must",
        PLAN,
        "if (rule.state_scalars == 0 || (!group.fused && !group.capturable)) return true;",
        "",
        "test_gpu::test_overflow_with_counts_on_the_host",
    ),
    Mutant(
        "host does not notice an overflow beside a parameter that no kernel serves",
        PLAN,
        "if (streams == nullptr || !streams->on_gpu) return true;",
        "if (streams != nullptr && !streams->on_gpu) return true;",
        "test_gpu::test_scaler_where_kernels_serve_some",
    ),
    Mutant(
        "host counts for the GPU",
        RUNNER,
        "if (ready.scalar_on_gpu[k]) continue;  // the kernel does it",
        "",
        "test_gpu::test_bits_of_the_cpu",
    ),
    Mutant(
        "first step captured",
        REFUSALS,
        'if (ready == nullptr) refuse_it("has',
        'if (false) refuse_it("has',
        "test_gpu::test_capture_is_refused_where_it_would_be_wrong",
    ),
    Mutant(
        "GPU's parameters stepped on the CPU, too",
        RUNNER,
        "if (ready == nullptr || ready->streams.backend != Backend::cpu) continue;\n      gathered_",
        "if (ready == nullptr) continue;\n      gathered_",
        "test_gpu::test_parameters_on_gpu_and_cpu",
    ),
    Mutant(
        "host guesses a count on the GPU",
        EXAMINE,
        "if (k > 0 && ready.has_recipe) {",
        "if (false) {",
        "test_gpu::test_nadam_with_a_state_on_both_sides",
    ),
    Mutant(
        "host waits where torch would not",
        SCALED,
        "kernels_serve_none = todo.nothing_left",
        "kernels_serve_none = False",
        "test_gpu::test_scaler_where_no_kernel_serves",
    ),
    Mutant(
        "freed memory written to",
        FACTS,
        "extent > 0 && end * static_cast<uint64_t>(itemsize) >",
        "false && end * static_cast<uint64_t>(itemsize) >",
        "test_refusals::test_freed_memory",
    ),
    Mutant(
        "what a layout does not use in the table",
        LAUNCHES,
        "std::memset(static_cast<void*>(&copy), 0, sizeof(copy));",
        "copy = layout;",
        "test_gpu::test_table_of_strided_tensors_is_written_once",
    ),
    # The Python part
    Mutant(
        "overflow not noticed",
        SCALED,
        "if found_inf is None or not found_inf.item():",
        "if True:",
        "test_dtypes::test_grad_scaler_in_low_precision",
    ),
    Mutant(
        "scaled gradients left behind",
        BY_TORCH,
        "p.grad = grad\n",
        "pass\n",
        "test_fallback::test_unscaling_for_what_torch_steps",
    ),
    Mutant(
        "state_dtype lost on loading",
        CHECKPOINTS,
        "precision.dtype_of(name) or dtype",
        "dtype",
        "test_checkpoints::test_state_dtype_holds_after_loading",
    ),
    Mutant(
        "states shared with what was loaded",
        CHECKPOINTS,
        "dtype=dtype, copy=True)",
        "dtype=dtype)",
        "test_checkpoints::test_nothing_is_shared_with_what_was_loaded",
    ),
    Mutant(
        "mu_product rounded on loading",
        CHECKPOINTS,
        "dtype = value.dtype if value.dtype == torch.float64 else torch.float32",
        "pass",
        "test_checkpoints::test_mu_product_is_not_rounded",
    ),
    Mutant(
        "options lost by pickle",
        BASE,
        'kept["_step_supports_amp_scaling"] =',
        "_ =",
        "test_dropin::test_pickle_and_deepcopy",
    ),
    Mutant(
        "half-made states left after an error",
        STEP,
        "restore(state, p, before.get(i))",
        "pass",
        "test_refusals::test_interrupted_creation_of_states_leaves_none_behind",
    ),
    Mutant(
        "torch's fused CPU kernels for the rest",
        BY_TORCH,
        '"params": unfused, "fused": None}',
        '"params": unfused}',
        "test_fallback::test_torchs_fused_kernels_are_not_used_where_strides_have_gaps",
    ),
    Mutant(
        "mixed dtypes left to torch",
        TODO,
        "if (mixed) return form | kMixed;",
        "",
        "test_fallback::test_mixed_dtypes_for_what_torch_steps",
    ),
    Mutant(
        "the reference does not look first",
        BY_REFERENCE,
        "    check(step, groups)\n",
        "",
        "test_fallback::test_the_reference_changes_nothing_before_it_raises",
    ),
    Mutant(
        "the reference's fma rounds twice", REFERENCE, "return torch.where(adjust,", "return torch.where(False,", BITS
    ),
    # ---- Triton
    Mutant(
        "Triton: amsgrad takes no maximum",
        "triton_kernels/rules.py",
        "second_moment = maximum(states[2], exp_avg_sq)",
        "second_moment = exp_avg_sq",
        TRITON_BITS,
    ),
    Mutant(
        "Triton: the first momentum is dampened",
        "triton_kernels/rules.py",
        "buffer = tl.where(first != 0, g, fma(",
        "buffer = tl.where(first == 2, g, fma(",
        TRITON_BITS,
    ),
    Mutant(
        "Triton: mu_product is not rounded",
        "triton_kernels/rules.py",
        "mu_product = rounded(state_scalars[1] * rounded(mu, is_fp32[1]), is_fp32[1])",
        "mu_product = state_scalars[1] * mu",
        "test_gpu::test_bits_after_many_steps",
    ),
    Mutant(
        "Triton: powers in plain doubles",
        "triton_kernels/arithmetic.py",
        "        base_lo = (square - base) + base_lo\n",
        "        base_lo = base_lo * 0\n",
        "test_gpu::test_bits_after_many_steps",
    ),
    Mutant("Triton: the last elements are lost", TRITON_KERNEL, "if in_vectors + i < end:", "if i < -1:", TRITON_BITS),
    Mutant(
        "Triton: maximize is ignored",
        TRITON_KERNEL,
        "tl.int8) != 0, -coefficient, coefficient)",
        "tl.int8) != 0, coefficient, coefficient)",
        "test_triton::test_on_the_cpu_in_the_interpreter",
    ),
    Mutant(
        "Triton: a program takes the row before",
        TRITON_KERNEL,
        "tl.int32) > program\n",
        "tl.int32) >= program\n",
        "test_triton::test_on_the_cpu_in_the_interpreter",
    ),
    Mutant(
        "Triton: blocks that the fast arithmetic cannot do are lost",
        TRITON_KERNEL,
        "at_random, LANES, False, T)",
        "at_random, LANES, fast, T)",
        "test_gpu::test_special_numbers_among_others",
    ),
    Mutant(
        "Triton: quotients of numbers that are too small",
        "triton_kernels/arithmetic.py",
        "proved = is_zero_or_from(x, LEAST_NUMERATOR) & ",
        "proved = ",
        "test_triton::test_fast_arithmetic",
    ),
    Mutant(
        "Triton: roots of numbers that are too small",
        "triton_kernels/arithmetic.py",
        "unless_proved(is_zero_or_from(x, LEAST_RADICAND), quotient)",
        "quotient",
        "test_triton::test_fast_arithmetic",
    ),
    Mutant(
        "Triton: loads wait for arithmetic",
        TRITON_KERNEL,
        "        tl.debug_barrier()  # ptxas",
        "        pass  # ptxas",
        "test_triton::test_compiled_for_gpus_that_are_not_here",
    ),
    Mutant(
        "Triton: contracts",
        TRITON_LAUNCHER,
        '"enable_fp_fusion": False',
        '"enable_fp_fusion": True',
        "test_triton::test_compiled_for_gpus_that_are_not_here",
    ),
    Mutant(
        "Triton: no vectors",
        TRITON_KERNEL,
        "pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 4 * lanes)",
        "pointer = address.to(tl.pointer_type(tl.float32))",
        "test_triton::test_compiled_for_gpus_that_are_not_here",
    ),
    Mutant(
        "Triton: a constant in fp32",
        "triton_kernels/rules.py",
        "ln_rest = tl.full((), -8.893492737632459e-19, tl.float64)",
        "ln_rest = -8.893492737632459e-19",
        "test_triton::test_compiled_for_gpus_that_are_not_here",
    ),
    # The replacement of the binding
    Mutant(
        "bindings fit what comes before a release",
        "dracopt_ext/backend.py",
        "_is_release(other) and _is_release(version)",
        "True",
        "test_backend::test_bindings_fit_their_minor_version",
    ),
    Mutant(
        "Triton: state stays after a failure",
        STEP,
        "        with self.restored_on_error(created + new):\n",
        "        with self.restored_on_error(new):\n",
        "test_triton::test_failure_changes_nothing",
    ),
    # ---- Other people's code
    Mutant(
        "overridden methods passed by",
        KIND,
        "if not _wraps(found, self.originals[name]):",
        "if False:",
        "test_other_peoples_code::test_init_group_overridden",
    ),
    Mutant(
        "methods replaced in torch's class passed by",
        KIND,
        "if code is None or not code.co_filename.startswith(_TORCH) or not",
        "if not",
        "test_other_peoples_code::test_init_group_replaced",
    ),
    Mutant(
        "methods of the instance passed by",
        KIND,
        "            if name in own:\n                return name\n",
        "",
        "test_other_peoples_code::test_init_group_replaced",
    ),
    Mutant(
        "options dropped for a class that torch steps",
        BY_TORCH,
        "if value is not None and value is not False and",
        "if False and",
        "test_other_peoples_code::test_what_torchs_step_cannot_keep_is_refused",
    ),
    Mutant(
        "a subclass's attribute taken for the backend",
        BASE,
        "if value is None or (isinstance(value, str) and value in backend_module.NAMES):",
        "if True:",
        "test_other_peoples_code::test_attributes_of_a_subclass_are_not_taken_for_our_options",
    ),
    Mutant(
        "modes see nothing",
        ANY_TORCH,
        "any_torch::is_true(places.mode_count) ||",
        "",
        "test_other_peoples_code::test_modes_see_the_operations",
    ),
    Mutant(
        "any dict read past its methods",
        READER,
        "if (!PyDict_CheckExact(dict)) return false;",
        "if (!PyDict_Check(dict)) return false;",
        "test_other_peoples_code::test_groups_in_other_mappings",
    ),
    Mutant(
        "states that are no exact dicts read past their methods",
        READER,
        "if (!PyDict_CheckExact(located.entries)) return false;",
        "if (!PyDict_Check(located.entries)) return true;",
        "test_other_peoples_code::test_states_in_other_mappings",
    ),
    Mutant(
        "any list of parameters read past its methods",
        READER,
        "group.params == nullptr || !PyList_CheckExact(group.params)",
        "group.params == nullptr || !PyList_Check(group.params)",
        "test_other_peoples_code::test_parameters_in_other_sequences",
    ),
    Mutant(
        "keys that a mapping does not list",
        CONTAINERS,
        'for key in ("params", *defaults) if key not in plain and _knows(group, key)',
        "for key in ()",
        "test_other_peoples_code::test_groups_in_other_mappings",
    ),
    Mutant(
        "flags read as numbers",
        READER,
        "if (!read_flag(value, flag)) return false;",
        "flag = PyObject_IsTrue(value) == 1 && !PyUnicode_Check(value);",
        "test_other_peoples_code::test_flags_are_asked_for_their_truth",
    ),
    Mutant(
        "torch's fused kernels for strides that they take for others",
        TODO,
        "tensor.is_plain_on_cpu() && tensor.is_contiguous() &&",
        "tensor.is_plain_on_cpu() &&",
        "test_other_peoples_code::test_fused_is_dropped_where_it_is_wrong",
    ),
    Mutant(
        "torch's fused kernels for shapes that differ",
        TODO,
        "!lies_simply(grad) || !same_shape(grad, param)",
        "!lies_simply(grad)",
        "test_other_peoples_code::test_shapes_that_torchs_fused_kernels_would_not_look_at",
    ),
    Mutant(
        "torch's fused kernels for tensors that share memory",
        TODO,
        "group.fused && std::get_if<Unsupported>(&inventory.examined[i])->reason != kSharesMemory",
        "group.fused",
        "test_other_peoples_code::test_fused_is_dropped_for_memory_that_is_shared",
    ),
    Mutant(
        "bad input not looked for under a mode",
        PLAN,
        "classify(options.stepped);\n  is_counted",
        "for (Examined& e : inventory_.examined) is_under_mode() ? (void)(e = Unsupported{kUnderMode}) : (void)0;\n"
        "  classify(options.stepped);\n  is_counted",
        "test_other_peoples_code::test_bad_input_under_a_mode",
    ),
    Mutant(
        "modes before dispatch see nothing",
        ANY_TORCH,
        " || any_torch::is_true(places.has_key, places.pre_dispatch)",
        "",
        "test_other_peoples_code::test_a_traced_training_step_trains",
    ),
    Mutant(
        "torch's fused kernels dropped",
        BY_TORCH,
        "(as_it_is if kind.keeps_fused else unfused).append(p)",
        "unfused.append(p)",
        "test_other_peoples_code::test_fused_is_kept_where_it_is_right",
    ),
    Mutant(
        "torch's fused SGD",
        SGD_CLASS,
        "keeps_fused=False",
        "keeps_fused=True",
        "test_other_peoples_code::test_fused_sgd_of_torch_is_not_used",
    ),
    Mutant(
        "a context shared by copies",
        BASE,
        '{"_dracopt_context": copy.copy(context_of(self))}',
        '{"_dracopt_context": context_of(self)}',
        "test_other_peoples_code::test_instances_that_pickle_all_their_attributes",
    ),
    # Two plans that share a step
    Mutant(
        "a look does not ask for infinite scalars",
        PLAN,
        "  updates_.prepare(",
        "  if (!options.only_looks) updates_.prepare(",
        "test_plan::test_a_look_finds_what_is_wrong",
    ),
    Mutant(
        "a learning rate that was forgotten is an old one",
        SEARCH,
        "  hyperparameters_.resize(count);\n",
        "",
        "test_fallback::test_a_learning_rate_comes_back_to_memory_that_is_written_now",
    ),
    Mutant(
        "the reference for a state_dtype that torch has",
        BY_TORCH,
        "dtypes - {p.dtype}",
        "dtypes",
        "test_dtypes::test_state_dtype_of_the_parameters_without_compiled_kernels",
    ),
    Mutant(
        "torch without our arguments taken",
        "dracopt_ext/backend.py",
        "if _minor(version) < (2, 7):",
        "if _minor(version) < (2, 6):",
        "test_backend::test_torch_that_has_not_our_constructors",
    ),
    Mutant(
        "torch steps before the kernels have looked",
        STEP,
        "            if unsupported and not todo.nothing_left:\n",
        "            if False:\n",
        "test_refusals::test_torch_steps_nothing_where_a_later_group_is_wrong",
    ),
    Mutant(
        "Triton: one kernel for any number of states",
        TRITON_LAUNCHES,
        "static_cast<uint32_t>(states) << kStateCount",
        "uint32_t(2) << kStateCount",
        "test_gpu::test_different_numbers_of_states",
    ),
    Mutant(
        "neighbours share words although one rounds at random",
        RUNNER,
        "if (update == its && words_before == before) return;",
        "if (update == its) return;",
        "test_precision::test_neighbours_that_do_not_round_on_a_gpu",
    ),
    Mutant(
        "a block zeroes what another reads because masters are aligned",
        "csrc/cuda/update.h",
        "may_begin ? 0 : kStreams + 1",
        "may_begin ? 0 : kStreams",
        "test_gpu_kit::test_check_on_the_host",
    ),
    Mutant(
        "Triton: memory is not held during a launch",
        RUNNER,
        "    if (needs_objects) {\n      alive.hold(inventory, i);",
        "    if (false) {\n      alive.hold(inventory, i);",
        "test_triton::test_what_other_code_may_do_during_a_launch",
    ),
    Mutant(
        "Triton: only its own parameters are held",
        RUNNER,
        "    if (needs_objects) {\n      alive.hold(inventory, i);",
        "    if (calls_python && ready->streams.backend == Backend::triton) {\n      alive.hold(inventory, i);",
        "test_gpu::test_what_other_code_may_take_away",
    ),
    Mutant(
        "Triton: hyperparameters are not held",
        RUNNER,
        "  if (calls_python) alive.hold_hyperparameters(inventory);",
        "",
        "test_gpu::test_what_other_code_may_take_away",
    ),
    Mutant(
        "a scaler of an earlier step",
        LAUNCHES,
        "  made_ = 0;\n  found_inf_ = grad_scale_ = coefficient_ = {};",
        "  made_ = 0;",
        "test_gpu::test_a_step_that_failed_leaves_no_scaler_behind",
    ),
    Mutant(
        "a partial parameter is taken for a whole one",
        LOCAL_TENSORS,
        "== whole_placements_.end()) return true;",
        "== whole_placements_.end()) return false;",
        "test_distributed::test_what_torch_steps",
    ),
    Mutant(
        "other placements are taken for the same",
        LOCAL_TENSORS,
        "    if (!same_places) distribution.unsupported = kRedistributed;\n",
        "",
        "test_distributed::test_new_specs_at_the_place_of_old_ones",
    ),
    Mutant(
        "the order of shards is not compared",
        LOCAL_TENSORS,
        "are_equal(of_param.order, spec.order) != Answer::no",
        "true",
        "test_distributed::test_another_order_of_shards",
    ),
    Mutant(
        "specs that were alike are not held",
        LOCAL_TENSORS,
        "row[k] = py::reinterpret_borrow<py::object>(specs[k]);",
        "row[k] = py::reinterpret_steal<py::object>(specs[k]);",
        "test_distributed::test_new_specs_at_the_place_of_old_ones",
    ),
    Mutant(
        "meshes are not compared",
        LOCAL_TENSORS,
        "becomes_partial || are_equal(of_param.mesh, spec.mesh) == Answer::no",
        "becomes_partial",
        "test_distributed_training::test_other_placements",
    ),
    Mutant(
        "a moment becomes partial",
        LOCAL_TENSORS,
        "is_partial_here && k != kGrad && !grad_is_partial",
        "false",
        "test_distributed_training::test_other_placements",
    ),
    Mutant(
        "a partial buffer is refused beside a partial gradient",
        LOCAL_TENSORS,
        "is_partial_here && k != kGrad && !grad_is_partial",
        "is_partial_here && k != kGrad",
        "test_other_peoples_code::test_partial_gradients_and_buffers",
    ),
    Mutant(
        "whole shapes are not compared",
        LOCAL_TENSORS,
        "} else if (!same_shape(",
        "} else if (false && !same_shape(",
        "test_distributed::test_a_gradient_of_another_whole_shape",
    ),
    Mutant(
        "local subclasses are taken for plain tensors",
        LOCAL_TENSORS,
        "local != nullptr && is_exact_tensor(local)",
        "local != nullptr && is_tensor(local)",
        "test_distributed::test_what_torch_steps",
    ),
    Mutant(
        "a plain gradient of a distributed parameter goes to torch",
        LOCAL_TENSORS,
        "if (is_subclass || inventory.may_mix(tensor)) {",
        "if (true) {",
        "test_distributed_training::test_other_placements",
    ),
    Mutant(
        "equal meshes are never forgotten",
        LOCAL_TENSORS,
        "if (known_.size() > kPairs * parameters)",
        "if (false)",
        "test_distributed::test_what_is_remembered_of_new_meshes_in_each_step",
    ),
    Mutant(
        "what other code did in a comparison is not read",
        PLAN,
        "} while (!local_tensors_.unwrap(inventory_));",
        "} while (!local_tensors_.unwrap(inventory_) && false);",
        "test_distributed::test_what_a_comparison_of_meshes_may_do",
    ),
    Mutant(
        "a distributed gradient of a plain parameter goes to torch",
        PLAN,
        "LocalTensors::is_mixed(inventory_, inventory_.located[i])",
        "false",
        "test_distributed::test_a_plain_parameter_with_distributed_tensors",
    ),
    Mutant(
        "a distributed moment of a plain parameter goes to torch",
        EXAMINE,
        "if (is_mixed && !inventory.may_mix(p)) return wrong(Fault::distribution, k);",
        "(void)is_mixed;",
        "test_distributed::test_a_plain_parameter_with_distributed_tensors",
    ),
    Mutant(
        "one-element tensors beside distributed ones are refused",
        "csrc/bindings/inventory.h",
        "return replicates || plain.numel() == 1;",
        "return replicates;",
        "test_distributed::test_plain_tensors_that_torch_replicates",
    ),
    Mutant(
        "plain tensors are refused where torch replicates them",
        "csrc/bindings/inventory.h",
        "return replicates || plain.numel() == 1;",
        "return plain.numel() == 1;",
        "test_distributed::test_plain_tensors_that_torch_replicates",
    ),
    Mutant(
        "a parameter of another dtype than its local tensor is updated",
        LOCAL_TENSORS,
        "if (parameter.dtype() != located.param().dtype() || ",
        "if (",
        "test_distributed::test_a_parameter_that_differs_from_its_local_tensor",
    ),
    Mutant(
        "an inference tensor around another tensor is updated",
        LOCAL_TENSORS,
        "parameter.is_inference() != located.param().is_inference()",
        "false",
        "test_distributed::test_a_parameter_that_differs_from_its_local_tensor",
    ),
    Mutant(
        "objects are not held while they are described",
        REFUSALS,
        "    held.push_back(py::reinterpret_borrow<py::object>(object));\n",
        "    (void)object;\n",
        "test_distributed::test_what_the_name_of_a_mesh_may_do",
    ),
    Mutant(
        "versions of distributed parameters are not counted",
        RUNNER,
        "if (located.parameter != located.local) Tensor::in(located.parameter).bump_version();",
        "",
        "test_distributed::test_versions",
    ),
    Mutant(
        "versions of distributed moments are not counted",
        RUNNER,
        "if (state != nullptr) Tensor::in(state).bump_version();",
        "(void)state;",
        "test_distributed::test_versions",
    ),
    Mutant(
        "Triton: shards are not held during a launch",
        RUNNER,
        "    hold(located.local);\n",
        "",
        "test_gpu::test_what_other_code_may_take_away_of_distributed_tensors",
    ),
    Mutant(
        "Triton: distributed moments are not held during a launch",
        RUNNER,
        "      if (state != nullptr) hold(state);\n",
        "      (void)state;\n",
        "test_gpu::test_what_other_code_may_take_away_of_distributed_tensors",
    ),
    Mutant(
        "Triton: states are not held during a launch",
        RUNNER,
        "      hold(located.values[k]);",
        "",
        "test_triton::test_what_other_code_may_do_during_a_launch",
    ),
    Mutant(
        "Triton: arguments of a capture given back",
        TRITON_LAUNCHES,
        "if (is_capturing()) keep(std::move(sent));",
        "",
        "test_gpu::test_captured_memory_outlives_the_capture",
    ),
    Mutant(
        "Triton: a capture loads a kernel",
        TRITON_LAUNCHER,
        "if capturing and jit not in self._loaded:",
        "if False:",
        "test_gpu::test_a_capture_needs_a_kernel_that_is_loaded",
    ),
    Mutant(
        "Triton: serves GPUs that have CUDA kernels",
        "csrc/bindings/backends.cpp",
        "if (no_cuda == nullptr) return",
        "if (no_cuda == nullptr && !triton_.has_value()) return",
        "test_gpu::test_triton_serves_where_cuda_does_not",
    ),
    Mutant(
        "Triton: serves no GPU without CUDA kernels",
        "csrc/bindings/backends.cpp",
        "if (!triton_.has_value()) {",
        "if (cuda_) {",
        "test_gpu::test_triton_serves_where_cuda_does_not",
    ),
    Mutant(
        "any torch: every key set is plain",
        ANY_TORCH,
        "(keys & ~(allowed | places.in_place)) == 0 &&",
        "",
        "test_fallback::test_conjugated_gradients",
    ),
    Mutant(
        "any torch: gradients that were taken away",
        ANY_TORCH,
        " || reinterpret_cast<uint64_t>(*grad) == places.undefined",
        "",
        "test_any_torch::test_gradients_that_come_and_go",
    ),
    Mutant(
        "any torch: lazy clones are written",
        ANY_TORCH,
        "return any_torch::at<uint64_t>(storage(), places.deleter) == places.lazy_deleter;",
        "return false;",
        "test_life::test_lazily_cloned_storage_is_copied_before_it_is_written",
    ),
    Mutant(
        "any torch: versions stand still",
        ANY_TORCH,
        "if (version != nullptr) ++",
        "if (version == nullptr) ++",
        "test_known_defects::test_versions_are_bumped",
    ),
    Mutant(
        "any torch: inference tensors have versions",
        ANY_TORCH,
        "if (version != nullptr) ++",
        "++",
        "test_life::test_inference_tensors",
    ),
    Mutant(
        "any torch: inference tensors everywhere",
        ANY_TORCH,
        "return (key_set() & places.in_place) == 0;",
        "return false;",
        "test_life::test_inference_tensors",
    ),
    Mutant(
        "any torch: no inference mode",
        ANY_TORCH,
        "return any_torch::is_true(places.in_inference_mode);",
        "return false;",
        "test_life::test_inference_mode_holds_for_all_threads",
    ),
    Mutant(
        "any torch: subclasses are tensors",
        ANY_TORCH,
        "return type == places.type || type == places.parameter;",
        "return type != nullptr;",
        "test_any_torch::test_subclasses_without_keys",
    ),
    Mutant(
        "any torch: gaps between elements",
        ANY_TORCH,
        "if (size == 0) return false;",
        "if (size == 0) return true;",
        "test_layouts::test_one_layout",
    ),
    Mutant(
        "any torch: a place that another one resembles",
        "dracopt_ext/any_torch.py",
        "if len(common) != 1:",
        "if not common:",
        "test_any_torch::test_a_place_that_is_not_certain",
    ),
    Mutant(
        "any torch: any keys for plain tensors",
        "dracopt_ext/any_torch.py",
        'if plain != found["cpu_keys"] | found["in_place"]:',
        "if False:",
        "test_any_torch::test_other_keys",
    ),
    Mutant(
        "one torch: every key set is plain",
        ONE_TORCH,
        "(keys & ~any) == 0 &&",
        "",
        "test_fallback::test_conjugated_gradients",
    ),
    Mutant(
        "one torch: lazy clones are written",
        ONE_TORCH,
        "return tensor_->unsafe_storage().data_ptr().get_deleter() == &c10::impl::cow::cow_deleter;",
        "return false;",
        "test_life::test_lazily_cloned_storage_is_copied_before_it_is_written",
    ),
    Mutant(
        "one torch: versions stand still",
        ONE_TORCH,
        "if (!is_inference()) tensor_->bump_version();",
        "",
        "test_known_defects::test_versions_are_bumped",
    ),
    Mutant(
        "one torch: modes see nothing",
        ONE_TORCH,
        "return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||",
        "return",
        "test_other_peoples_code::test_modes_see_the_operations",
    ),
    # The tail of the training step
    Mutant(
        "tail: lanes of a chunk added in another order",
        "csrc/core/squares.h",
        "(four[0] + four[1]) + (four[2] + four[3])",
        "(four[0] + four[2]) + (four[1] + four[3])",
        "test_clip::test_sum_of_squares_is_the_references",
    ),
    Mutant(
        "tail: a digit of the exact sum lost",
        "csrc/core/exact_sum.h",
        "if ((rest & in_digit) != 0)",
        "if (false)",
        "test_clip::test_sum_is_exact_beyond_chunks",
    ),
    Mutant(
        "tail: the exact sum rounds without what is below",
        "csrc/core/exact_sum.h",
        "upper |= next != 0;",
        "",
        "test_clip::test_sum_is_exact_beyond_chunks",
    ),
    Mutant(
        "tail: objects are not held while the GIL is released",
        RUNNER,
        "calls_python || (on_host && !holds_gil)",
        "calls_python",
        "test_clip::test_objects_that_another_thread_takes_away",
    ),
    Mutant(
        "tail: another device's scaler learns nothing",
        PLAN,
        "if (clipping.checks && scaler.found_inf.device() != device) return true;",
        "",
        "test_gpu_clip::test_scaler_on_another_device",
    ),
    Mutant(
        "tail: a coefficient above one",
        "csrc/core/squares.h",
        "coefficient > 1 ? 1 : coefficient",
        "coefficient",
        "test_clip::test_changes_nothing_unless_needed",
    ),
    Mutant(
        "tail: the norm is not unscaled",
        "csrc/core/squares.h",
        "sqrt(sum_of_squares) / grad_scale",
        "sqrt(sum_of_squares)",
        "test_clip::test_grad_scaler",
    ),
    Mutant(
        "tail: gradients are not clipped",
        SEGMENT,
        "* coefficient / (divides",
        "/ (divides",
        "test_clip::test_agrees_with_torch",
    ),
    Mutant(
        "tail: one update is clipped",
        UPDATES,
        "i < count_; ++i) {\n    prepared_[i].coefficient",
        "i < 1; ++i) {\n    prepared_[i].coefficient",
        "test_clip::test_norm_of_all_groups_and_dtypes",
    ),
    Mutant(
        "tail: an overflow that the norm shows is ignored",
        RUNNER,
        "if (clipping.checks && !finite)",
        "if (false)",
        "test_clip::test_grad_scaler",
    ),
    Mutant(
        "tail: large numbers are an overflow",
        "csrc/cpu/gradients.h",
        "finite || (sizeof(T) == 8 && are_finite(numbers, count))",
        "finite",
        "test_clip::test_large_numbers_are_no_overflow",
    ),
    Mutant(
        "tail: a step goes on with a norm that is not finite",
        RUNNER,
        "if (clipping.needs_a_norm && !all_finite(clip.norm)) return false;",
        "",
        "test_clip::test_error_if_nonfinite",
    ),
    Mutant(
        "tail: states are created before an error",
        PLAN,
        "if (clipping.needs_a_norm && std::holds_alternative<MissingState>(inventory_.examined[i])) return true;",
        "",
        "test_clip::test_error_if_nonfinite",
    ),
    Mutant(
        "tail: a scaler does not learn of an overflow",
        "dracopt_ext/grad_scaler.py",
        "context_of(optimizer).overflow = found_inf",
        "pass",
        "test_clip::test_grad_scaler",
    ),
    Mutant(
        "tail: equal parts count twice",
        "csrc/bindings/local_tensors.cpp",
        'if (std::strcmp(name, "Replicate") == 0) replicate_',
        "if (false) replicate_",
        "test_distributed_training::test_clipping_in_the_step",
    ),
    Mutant(
        "tail: a process counts only its part",
        "dracopt_ext/clip_grad.py",
        "        distributed.all_reduce(part)\n",
        "",
        "test_distributed_training::test_clipping_in_the_step",
    ),
    Mutant(
        "tail: nothing is held while processes communicate",
        RUNNER,
        "by_triton[0] + by_triton[1] > 0 || (clipping.has_value() && !inventory.distributions.empty())",
        "by_triton[0] + by_triton[1] > 0",
        "test_distributed::test_what_may_happen_while_processes_communicate",
    ),
    Mutant(
        "tail: the GPU's norm counts beyond a tensor's end",
        "csrc/cuda/squares.h",
        "if (at + i >= end) break;",
        "",
        "test_gpu_clip::test_norm_of_the_cpu",
    ),
    Mutant(
        "tail: the GPU counts a strided gradient as a dense one",
        "csrc/cuda/squares.h",
        "const int64_t place = simple ? begin + at + i",
        "const int64_t place = true ? begin + at + i",
        "test_gpu_clip::test_layouts",
    ),
    Mutant(
        "tail: the GPU does not clip",
        "csrc/cuda/update.h",
        "grad = math.quotient(grad, divisor) * coefficient;",
        "grad = math.quotient(grad, divisor);",
        "test_gpu_clip::test_bits_of_the_cpu",
    ),
    Mutant(
        "tail: a launch that failed leaves a sum",
        LAUNCHES,
        "if (std::exchange(is_measuring_, false)) written_.clear();",
        "",
        "test_gpu_clip::test_launch_that_failed_leaves_no_part_of_a_sum",
    ),
    Mutant(
        "Triton: sums of a step stay",
        "triton_kernels/squares.py",
        "mask=words < SUMS * SUM_BYTES // 8)",
        "mask=words < 0)",
        "test_gpu_clip::test_norm_of_the_cpu",
    ),
    Mutant(
        "tail: one gradient of two is changed once",
        "csrc/bindings/gradients.cpp",
        "if (writes) leave_out_shared_memory();",
        "",
        "test_clip::test_functions_and_shared_memory",
    ),
    Mutant(
        "tail: changes are not counted",
        "csrc/bindings/gradients.cpp",
        "for (const Tensor tensor : tensors_) tensor.bump_version();",
        "",
        "test_clip::test_functions_count_a_change",
    ),
    Mutant(
        "tail: gradients stay",
        KERNELS,
        "if (segment.update->zeroes) clear<T>(",
        "if (false) clear<T>(",
        "test_zero_grad::test_step_that_zeroes",
    ),
    Mutant(
        "tail: shared gradients are zeroed too early",
        PLAN,
        "const bool are_apart = overlapping(found).empty();",
        "const bool are_apart = true;",
        "test_zero_grad::test_shared_gradients_are_zeroed_after_the_step",
    ),
    Mutant(
        "tail: gradients that have moved may share memory",
        PLAN,
        "if (found == apart_) return true;",
        "if (found.size() == apart_.size()) return true;",
        "test_zero_grad::test_gradients_that_become_shared",
    ),
    Mutant(
        "tail: released gradients stay",
        "dracopt_ext/optim/_release.py",
        "            p.grad = None\n",
        "",
        "test_release::test_gradients_are_freed_one_after_the_other",
    ),
    Mutant(
        "tail: gradient release accumulates",
        "dracopt_ext/optim/_release.py",
        "if id(p) in self._stepped:",
        "if False:",
        "test_release::test_accumulation_is_refused",
    ),
]


class BrokenMutant(Exception):
    """The fault does not fit the sources, or its test does not run."""


class Copy:
    """A copy of the sources with its build, for one thread."""

    def __init__(self, number: int) -> None:
        self.folder = COPIES / str(number)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, self.folder / name, ignore=IGNORED)
            else:
                shutil.copy(source, self.folder / name)
        self.build("any")

    def build(self, which: str) -> None:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        env = {**os.environ, "DRACOPT_BUILD": which, "CUDA_HOME": "/nowhere", "MAX_JOBS": "1"}
        run = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        if run.returncode != 0:
            raise BrokenMutant(f"the copy does not compile:\n{run.stdout}{run.stderr}")

    def failures(self, tests: Sequence[str], *options: str) -> str:
        """Returns pytest's output if a test fails or crashes, else nothing. Raises if the tests do not run at all."""
        names = (test.split("::") for test in tests)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        env = {**os.environ, "TRITON_INTERPRET": "1", "MAX_JOBS": "1", "OMP_NUM_THREADS": "2"}
        command += [f"tests/{file}.py::{function}" for file, function in names]
        run = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        if run.returncode > 1:
            raise BrokenMutant(f"{' '.join(tests)} does not run:\n{run.stdout}{run.stderr}")
        return f"{run.stdout}ended with {run.returncode}" if run.returncode != 0 else ""

    def finds(self, mutant: Mutant) -> bool:
        """Says whether the mutant's test fails, with the module for any torch unless the fault is in the other one."""
        path = self.folder / mutant.file
        source = path.read_text()
        if source.count(mutant.old) != 1:
            raise BrokenMutant(f"{mutant.old!r} stands {source.count(mutant.old)} times in {mutant.file}, not once")
        path.write_text(source.replace(mutant.old, mutant.new))
        try:
            if mutant.compiled and not mutant.found_by.startswith(COMPILE_FOR_THEMSELVES):
                self.build("force" if mutant.file == ONE_TORCH else "any")
            options = [] if mutant.file == ONE_TORCH else ANY
            return self.failures([mutant.found_by], "-x", *options) != ""
        finally:
            path.write_text(source)


def main(words: list[str]) -> None:
    mutants = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    tests = sorted({mutant.found_by for mutant in mutants})
    copies: queue.Queue[Copy] = queue.Queue()
    threads = ThreadPoolExecutor(WORKERS)
    for copy in threads.map(Copy, range(WORKERS)):
        copies.put(copy)

    def without_fault(number: int) -> str:
        copy = copies.get()
        try:
            # The slowest cases are left out. `make test` has run them.
            return copy.failures(tests[number::WORKERS], "-m", "not untraced", *ANY)
        finally:
            copies.put(copy)

    def verdict_on(mutant: Mutant) -> str:
        copy = copies.get()
        begin, reason = time.monotonic(), ""
        try:
            verdict = "found" if copy.finds(mutant) else "SURVIVED"
        except BrokenMutant as error:
            verdict, reason = "BROKEN", f"\n{error}"
        finally:
            copies.put(copy)
        seconds = time.monotonic() - begin
        print(f"{verdict:9} {seconds:5.1f} s  {mutant.name:45} {mutant.found_by}{reason}", flush=True)
        return verdict

    failures = [found for found in threads.map(without_fault, range(min(WORKERS, len(tests)))) if found]
    if failures:
        sys.exit("\n".join(["These tests fail without any fault:", *failures]))
    # Faults in Python need the build without faults.
    verdicts = list(threads.map(verdict_on, sorted(mutants, key=lambda mutant: mutant.compiled)))
    print(f"{verdicts.count('found')} of {len(mutants)} faults found")
    sys.exit(verdicts.count("found") < len(mutants))


if __name__ == "__main__":
    main(sys.argv[1:])
