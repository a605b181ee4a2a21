/* Numbers in memory that several processes map, by which one tells the others how far it is. */
#include <sched.h>
#include <stdint.h>
#include <time.h>

#define YIELDS 64 /* before it sleeps between two looks */

/* What was written before is there for whoever sees the number. */
void set_signal(int64_t *number, int64_t value) { __atomic_store_n(number, value, __ATOMIC_RELEASE); }

/* Waits until all numbers at these addresses have got so far, at most so many seconds. Gives the first that has not, or -1. */
long await_signals(const int64_t *addresses, long count, int64_t value, float seconds) {
    const struct timespec pause = {0, 50000};
    struct timespec begin, now;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (long i = 0, looks = 0; i < count; looks++) {
        if (__atomic_load_n((const int64_t *)addresses[i], __ATOMIC_ACQUIRE) >= value) {
            i++;
            continue;
        }
        if (looks < YIELDS) {
            sched_yield();
            continue;
        }
        nanosleep(&pause, NULL);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if ((double)(now.tv_sec - begin.tv_sec) + 1e-9 * (double)(now.tv_nsec - begin.tv_nsec) > seconds) return i;
    }
    return -1;
}
