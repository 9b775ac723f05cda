/* The library on a machine that Python drives, a command a line:
 *   r HEX              the line brings bytes
 *   p NOW              set the clock, poll; answers 1 where a restart is asked for
 *   o LABEL HEX HEX US observe scores and features; answers the status
 *   j LABEL HEX HEX    judge; answers status, joint and bin
 *   e CHANNEL BITS LABEL   answers the excess
 *   m FLOATS HEX       argmax of int8, uint8 and float32 values
 *   c 0|1              confirm
 *   s                  answers where the model runs from, whether on trial
 *   d HEX              decode frames alone: answers how many were intact and how many damaged
 * "w HEX" is what goes onto the line; "." ends each answer. The flash is a file; where the power goes, the process ends
 * with 7 in the middle of a write or an erasing. */
#define _DEFAULT_SOURCE 1
#include "edgeguard_link.h"
#include "edgeguard_model.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLOT 8192U
#define PAGE 256U
#define LONGEST 4096U

static uint8_t *flash;
static uint32_t now;
static long left;

static uint32_t clock_ms(void *context)
{
    (void)context;
    return now;
}

static bool uart_write(void *context, const uint8_t *bytes, uint16_t size)
{
    uint16_t i;
    (void)context;
    if (size > 0U) {
        (void)printf("w ");
        for (i = 0U; i < size; i++) {
            (void)printf("%02x", (unsigned)bytes[i]);
        }
        (void)printf("\n");
    }
    return true;
}

static uint8_t *at(uint8_t area, uint32_t offset, uint32_t size)
{
    if ((area > EDGEGUARD_RECORD_B) || (offset > SLOT) || (size > (SLOT - offset))) {
        abort();
    }
    return &flash[(area * SLOT) + offset];
}

/* How many of `size` bytes still happen: none beyond the cut, half of those that it falls into. */
static uint32_t powered(uint32_t size)
{
    if (left > 0) {
        left--;
        if (left == 0) {
            return size / 2U;
        }
    }
    return size;
}

static void cut(uint32_t done, uint32_t size)
{
    if (done < size) {
        (void)fflush(stdout);
        _exit(7);
    }
}

static bool flash_read(void *context, uint8_t area, uint32_t offset, uint8_t *bytes, uint16_t size)
{
    (void)context;
    (void)memcpy(bytes, at(area, offset, size), size);
    return true;
}

static bool flash_write(void *context, uint8_t area, uint32_t offset, const uint8_t *bytes, uint16_t size)
{
    uint8_t *const target = at(area, offset, size);
    const uint32_t done = powered(size);
    uint32_t i;
    (void)context;
    if (((offset % EDGEGUARD_WRITE_UNIT) != 0U) || ((size % EDGEGUARD_WRITE_UNIT) != 0U)) {
        abort();
    }
    for (i = 0U; i < size; i++) {
        if (target[i] != 0xFFU) {
            abort(); /* written twice without erasing */
        }
    }
    (void)memcpy(target, bytes, done);
    cut(done, size);
    return true;
}

static bool flash_erase(void *context, uint8_t area, uint32_t offset)
{
    uint8_t *const target = at(area, offset, PAGE);
    const uint32_t done = powered(PAGE);
    (void)context;
    (void)memset(target, 0xFF, done);
    cut(done, PAGE);
    return true;
}

static const edgeguard_hal_t hal = {NULL, clock_ms, uart_write, flash_read, flash_write, flash_erase, SLOT, PAGE};
static edgeguard_t guard;

static uint16_t bytes_of(const char *hex, uint8_t *bytes)
{
    const size_t size = (hex == NULL) ? 0U : (strlen(hex) / 2U);
    size_t i;
    for (i = 0U; (i < size) && (i < LONGEST); i++) {
        unsigned value = 0U;
        if (sscanf(&hex[2U * i], "%2x", &value) != 1) {
            abort();
        }
        bytes[i] = (uint8_t)value;
    }
    return (uint16_t)i;
}

static const char *word(void)
{
    const char *const found = strtok(NULL, " \n");
    return (found == NULL) ? "" : found;
}

static long number(void)
{
    return strtol(word(), NULL, 0);
}

static void command(char kind)
{
    static uint8_t first[LONGEST];
    static uint8_t second[LONGEST];
    edgeguard_input_t input = {first, second, 0, EDGEGUARD_UNKNOWN};
    int32_t joint = 0;

    if (kind == 'r') {
        edgeguard_receive(&guard, first, bytes_of(word(), first));
    } else if (kind == 'p') {
        now = (uint32_t)number();
        (void)printf("a %d\n", (int)edgeguard_poll(&guard));
    } else if ((kind == 'o') || (kind == 'j')) {
        input.label = (int16_t)number();
        (void)bytes_of(word(), first);
        (void)bytes_of(word(), second);
        if (kind == 'o') {
            input.inference_us = (uint32_t)number();
            (void)printf("a %d\n", (int)edgeguard_observe(&guard, &input));
        } else {
            const int status = (int)edgeguard_judge(&edgeguard_guard, &input, &joint);
            (void)printf("a %d %" PRId32 " %" PRIu32 "\n", status, joint, edgeguard_bin(joint));
        }
    } else if (kind == 'e') {
        const uint32_t channel = (uint32_t)number();
        const uint32_t feature = (uint32_t)number();
        (void)printf("a %" PRId32 "\n", edgeguard_excess(&edgeguard_guard, channel, feature, (int32_t)number()));
    } else if (kind == 'm') {
        const uint32_t floats = (uint32_t)number();
        (void)bytes_of(word(), first);
        (void)printf("a %d %d %d\n", edgeguard_argmax_int8((const int8_t *)first, 4U * floats),
                     edgeguard_argmax_uint8(first, 4U * floats), edgeguard_argmax_float32(first, floats));
    } else if (kind == 'c') {
        edgeguard_confirm(&guard, number() != 0);
    } else if (kind == 's') {
        (void)printf("a %d %d\n", (int)edgeguard_running(&guard), (int)edgeguard_on_trial(&guard));
    } else if (kind == 'd') {
        static edgeguard_decoder_t decoder;
        const uint16_t size = bytes_of(word(), first);
        int counts[3] = {0, 0, 0};
        edgeguard_frame_t frame;
        uint16_t i;
        for (i = 0U; i < size; i++) {
            counts[(int)edgeguard_decode(&decoder, first[i], &frame)]++;
        }
        (void)printf("a %d %d\n", counts[1], counts[2]);
    } else {
        abort();
    }
}

int main(int count, char **arguments)
{
    const char *const built_in = getenv("BUILT_IN"); /* another first byte of the digest of the firmware's own model */
    edgeguard_content_t content;
    edgeguard_guard_t own = edgeguard_guard;
    static char line[(2U * LONGEST) + 4096U];
    const int file = (count > 3) ? open(arguments[1], O_RDWR | O_CREAT, 0600) : -1;
    const off_t size = lseek(file, 0, SEEK_END);

    if ((file < 0) || (ftruncate(file, 4 * (off_t)SLOT) != 0)) {
        return 1;
    }
    flash = mmap(NULL, 4U * SLOT, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (flash == MAP_FAILED) {
        return 1;
    }
    if (size == 0) {
        (void)memset(flash, 0xFF, 4U * SLOT);
    }
    left = strtol(arguments[3], NULL, 10);
    content = *own.content;
    if (built_in != NULL) {
        content.file_digest[0] = (uint8_t)strtol(built_in, NULL, 0);
        own.content = &content;
    }
    if (!edgeguard_init(&guard, &hal, &own, "mcu-1", "host", strtoull(arguments[2], NULL, 10))) {
        return 1;
    }
    (void)printf(".\n");
    (void)fflush(stdout);
    while (fgets(line, (int)sizeof line, stdin) != NULL) {
        const char *const kind = strtok(line, " \n");
        command((kind == NULL) ? '?' : kind[0]);
        (void)printf(".\n");
        (void)fflush(stdout);
    }
    return 0;
}
