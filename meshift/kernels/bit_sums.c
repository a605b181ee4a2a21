/* Sums of a matrix's bits, read as signed integers of 2 or 4 bytes, along each row and each column, modulo 2^64: what
   fingerprints of parameters are made of. Integers add up exactly, so neither order nor threads matter. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FLUSH 16384 /* sums of so many numbers of 2 bytes fit 32 bits */

static void two_bytes(const int16_t *x, long rows, long columns, int64_t *of_rows, int64_t *of_columns, int32_t *part) {
    memset(part, 0, (size_t)columns * sizeof(int32_t));
    for (long r = 0; r < rows; r++) {
        const int16_t *row = x + r * columns;
        int64_t sum = 0;
        for (long start = 0; start < columns; start += FLUSH) {
            const long stop = start + FLUSH < columns ? start + FLUSH : columns;
            int32_t some = 0;
            for (long i = start; i < stop; i++) part[i] += row[i], some += row[i];
            sum += some;
        }
        of_rows[r] = sum;
        if (r % FLUSH == FLUSH - 1 || r == rows - 1)
            for (long i = 0; i < columns; i++) of_columns[i] += part[i], part[i] = 0;
    }
}

static void four_bytes(const int32_t *x, long rows, long columns, int64_t *of_rows, int64_t *of_columns) {
    for (long r = 0; r < rows; r++) {
        const int32_t *row = x + r * columns;
        int64_t sum = 0;
        for (long i = 0; i < columns; i++) of_columns[i] += row[i], sum += row[i];
        of_rows[r] = sum;
    }
}

/* x [rows][columns] of `size` bytes each; of_rows [rows] is written, of_columns [columns] added to. Returns whether
   there was memory for it. */
int bit_sums(const void *x, long rows, long columns, int size, int64_t *of_rows, int64_t *of_columns, int threads) {
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
    for (int t = 0; t < threads; t++) {
        const long first = rows * t / threads, count = rows * (t + 1) / threads - first;
        int64_t *own = calloc((size_t)columns, sizeof(int64_t));
        int32_t *part = malloc((size_t)columns * sizeof(int32_t));
        if (!own || !part) failed = 1;
        else {
            if (size == 2) two_bytes((const int16_t *)x + first * columns, count, columns, of_rows + first, own, part);
            else four_bytes((const int32_t *)x + first * columns, count, columns, of_rows + first, own);
#pragma omp critical
            for (long i = 0; i < columns; i++) of_columns[i] += own[i];
        }
        free(own);
        free(part);
    }
    return !failed;
}
