// Loops for each level of x86-64.
//
// Everything in a cloned function is compiled three times: keep it to the loops over heads. Rows of tables and weights
// are made, and float64 is worked on, outside of them: compilation takes 18 seconds, with those inside about a minute.
#pragma once

#if !defined(ROPE_NO_CLONES) && defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && \
    !defined(__clang__) && __GNUC__ >= 12
#define ROPE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define ROPE_LEVELS "x86-64-v4 x86-64-v3 x86-64"
#else
#define ROPE_CLONES
#define ROPE_LEVELS "one instruction set"
#endif

// Iterations do not depend on each other although in and out may be one array: each pair is read before it is
// written, and belongs to one iteration. Few: of a number known beforehand, which GCC would else take apart.
#if defined(__clang__)
#define ROPE_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ROPE_VECTORIZE _Pragma("GCC ivdep")
#define ROPE_VECTORIZE_FEW _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#else
#define ROPE_VECTORIZE
#endif
#if !defined(ROPE_VECTORIZE_FEW)
#define ROPE_VECTORIZE_FEW ROPE_VECTORIZE
#endif
