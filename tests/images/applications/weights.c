// The application of the image `weights`: maps the file of weights and reads a few places of it, or all.
//
//   weights [SECONDS]    reads 64 places, prints "ready", sleeps for so many seconds
//   weights --map STEP   reads a word of every STEPth page, in random order, then prints how many and their sum

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE_LEN = 4096, PLACES = 64 };

static const char PATH[] = "/model/weights.bin";

// Goes through 0..count - 1 once each when count is a power of two, and wraps there: a full-period generator.
static uint64_t next(uint64_t place, uint64_t count) {
    return (place * 1664525 + 1013904223) & (count - 1);
}

static uint64_t power_of_two_from(uint64_t count) {
    uint64_t power = 1;
    while (power < count) power *= 2;
    return power;
}

int main(int argc, char **argv) {
    int is_map = argc > 2 && strcmp(argv[1], "--map") == 0;
    int file = open(PATH, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) {
        perror(PATH);
        return 1;
    }
    const uint8_t *weights = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0);
    uint64_t step = is_map ? strtoull(argv[2], NULL, 10) : 1;
    if (weights == MAP_FAILED || step == 0) {
        fprintf(stderr, "weights: cannot map %s, or no step\n", PATH);
        return 1;
    }
    uint64_t pages = (uint64_t)status.st_size / PAGE_LEN / step, read = 0, sum = 0, place = 0;
    uint64_t wanted = is_map || pages < PLACES ? pages : PLACES, period = power_of_two_from(pages);
    while (read < wanted) {
        place = next(place, period);
        if (place >= pages) continue;
        uint64_t word;
        memcpy(&word, weights + place * step * PAGE_LEN, sizeof word);
        sum += word;
        read++;
    }
    if (is_map) printf("%llu %llu\n", (unsigned long long)read, (unsigned long long)sum);
    else puts("ready");
    fflush(stdout);
    if (!is_map && argc > 1) sleep((unsigned)atoi(argv[1]));
    return 0;
}
