/* Many boxes of rows copied in one call: what moving parameters between layouts is, on one machine. */
#include <stdint.h>
#include <string.h>

/* table [count][6]: source, target, rows, bytes of a row, and bytes from one row to the next, there and here. */
void copy_rows(const int64_t *table, long count, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long i = 0; i < count; i++) {
        const int64_t *t = table + 6 * i;
        const char *source = (const char *)t[0];
        char *target = (char *)t[1];
        const int64_t rows = t[2], size = t[3], there = t[4], here = t[5];
        if (there == size && here == size) memcpy(target, source, (size_t)(rows * size));
        else
            for (int64_t r = 0; r < rows; r++) memcpy(target + r * here, source + r * there, (size_t)size);
    }
}
