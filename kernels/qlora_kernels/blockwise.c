/* Which paths there are, and what Python asks first. */

#include "blockwise.h"

/* To be raised with every change to the structures and functions that Python knows. */
EXPORTED const int32_t interface = 5;

/* Whether this processor runs a path. */
EXPORTED int32_t runs_path(int32_t number)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (number == AVX2)
        /* Every processor with AVX2 has F16C, which not every compiler can be asked for. */
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (number == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return number == PORTABLE;
}

const struct path *path_of(int32_t number)
{
#if defined(__x86_64__)
    if (number == AVX2)
        return &avx2_path;
    if (number == AVX512)
        return &avx512_path;
#endif
    (void)number;
    return &portable_path;
}

void enter_standard_arithmetic(fenv_t *callers)
{
    feholdexcept(callers);
    fesetenv(FE_DFL_ENV);
}
