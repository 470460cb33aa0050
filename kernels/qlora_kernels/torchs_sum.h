/* A sum of float32 in torch's order, to the last bit. Whether the torch installed has this order is for Python to try. */

#ifndef TORCHS_SUM_H
#define TORCHS_SUM_H

#include "blockwise.h"

/* Running sums of torch's float32 sum, and how many of its levels there are. */
enum { SUM_VECTOR = 8, SUM_ROWS = 4, SUM_LEVELS = 4 };

ALWAYS_INLINE void add_row(float *sums, const void *values, int64_t start, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        sums[i] += float_at(values, start + i);
}

ALWAYS_INLINE void move_up(float *from, float *to)
{
    for (int i = 0; i < SUM_ROWS * SUM_VECTOR; i++) {
        to[i] += from[i];
        from[i] = 0.0f;
    }
}

/* The sum of n values in the order in which torch adds them up with one thread: 32 running sums, moved to a higher
   level after each 2^power rows of 32, and from there likewise; then the levels, the vectors left over, the four vectors
   of sums, the values left over, and the eight sums. */
ALWAYS_INLINE float torchs_sum(const void *values, int64_t n)
{
    float sums[SUM_LEVELS][SUM_ROWS * SUM_VECTOR] = {{0}}, total = 0.0f;
    int64_t vectors = n / SUM_VECTOR, rows = vectors / SUM_ROWS;
    int log = 0;
    while ((int64_t)1 << log < rows)
        log++;
    int power = log / SUM_LEVELS > 4 ? log / SUM_LEVELS : 4;
    for (int64_t row = 1; row <= rows; row++) {
        add_row(sums[0], values, (row - 1) * SUM_ROWS * SUM_VECTOR, SUM_ROWS * SUM_VECTOR);
        for (int level = 1; level < SUM_LEVELS && row % ((int64_t)1 << level * power) == 0; level++)
            move_up(sums[level - 1], sums[level]);
    }
    for (int level = 1; level < SUM_LEVELS; level++)
        move_up(sums[level], sums[0]);
    for (int64_t vector = rows * SUM_ROWS; vector < vectors; vector++)
        add_row(sums[0], values, vector * SUM_VECTOR, SUM_VECTOR);
    for (int row = 1; row < SUM_ROWS; row++)
        for (int i = 0; i < SUM_VECTOR; i++)
            sums[0][i] += sums[0][row * SUM_VECTOR + i];
    for (int64_t i = vectors * SUM_VECTOR; i < n; i++)
        total += float_at(values, i);
    for (int i = 0; i < SUM_VECTOR; i++)
        total += sums[0][i];
    return total;
}

#endif
