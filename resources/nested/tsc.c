/* tsc: prints the frequency of the time stamp counter in kHz, which an emulated host cannot measure on a busy machine: its
 * timers come late, and its clock then runs too fast or too slow for as long as it is up. Each of the two readings is the
 * quickest of several, so that a pause in one does not matter. */
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

struct reading { uint64_t ticks; int64_t ns; };

static struct reading read_both(void) {
    struct reading best = {0, 0};
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < 1000; i++) {
        struct timespec now;
        uint64_t before = __rdtsc();
        clock_gettime(CLOCK_MONOTONIC_RAW, &now);
        uint64_t took = __rdtsc() - before;
        if (took >= least) continue;
        least = took;
        best = (struct reading){before + took / 2, now.tv_sec * 1000000000LL + now.tv_nsec};
    }
    return best;
}

int main(void) {
    struct reading start = read_both();
    nanosleep(&(struct timespec){.tv_nsec = 300000000}, 0);
    struct reading end = read_both();
    printf("%.0f\n", (double)(end.ticks - start.ticks) * 1e6 / (double)(end.ns - start.ns));
    return 0;
}
