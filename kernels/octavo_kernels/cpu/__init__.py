"""Kernels for CPUs with AVX512-VNNI and AVX512-BF16, written as LLVM IR and compiled in the process: no compiler is
needed. `compiler.available()` says whether they run here; nothing else of this folder may be imported before it did,
except `processor`."""
