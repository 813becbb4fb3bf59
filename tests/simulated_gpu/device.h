// The variables of the simulated GPU that tests may set and read, by these names in the module.
#pragma once

extern "C" {
__attribute__((visibility("default"))) extern int simulated_stream, simulated_capturing, simulated_unavailable;
__attribute__((visibility("default"))) extern int simulated_launches, simulated_tables, simulated_last_stream;
__attribute__((visibility("default"))) extern const void* simulated_table;  // where the last launch found its rows
__attribute__((visibility("default"))) extern char simulated_failure[64];   // the function of cuda/kernels.h that fails
}
