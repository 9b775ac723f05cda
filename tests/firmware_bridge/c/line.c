/* Frames over a line that flips, drops and doubles bytes: how many arrive, and whether any arrives that was not sent.
 *   line FRAMES SHARE SEED
 * Each frame holds a type, 6 to 240 random bytes behind it and a running number: 16 to 250 bytes in all. A frame that
 * the decoder takes must be, to the byte, one that was sent no more than a few frames ago. */
#include "edgeguard_link.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEPT 8U
#define LINE 600U

static uint64_t state;
static edgeguard_decoder_t decoder;
static uint8_t sent[KEPT][EDGEGUARD_MAX_FRAME];
static uint32_t sizes[KEPT];

static uint64_t next(void) /* xorshift64*, Vigna 2014 */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ULL;
}

static uint32_t make(uint8_t *frame, uint32_t number)
{
    const uint32_t payload = 6U + (uint32_t)(next() % 235U);
    uint32_t size = EDGEGUARD_HEADER + payload;
    uint32_t crc;
    uint32_t i;
    for (i = EDGEGUARD_HEADER; i < size; i++) {
        frame[i] = ((next() & 3U) == 0U) ? 0U : (uint8_t)(next() >> 56);
    }
    frame[0] = EDGEGUARD_VERSION;
    frame[1] = (uint8_t)(1U + (next() % 14U));
    frame[2] = (uint8_t)payload;
    frame[3] = 0U;
    frame[4] = (uint8_t)number;
    frame[5] = (uint8_t)(number >> 8);
    crc = edgeguard_crc32(frame, size);
    for (i = 0U; i < 4U; i++) {
        frame[size + i] = (uint8_t)(crc >> (8U * i));
    }
    return size + 4U;
}

static uint32_t stuff(const uint8_t *frame, uint32_t size, uint8_t *line)
{
    uint32_t code = 0U;
    uint32_t at = 1U;
    uint32_t i;
    for (i = 0U; i < size; i++) {
        if (frame[i] == 0U) {
            line[code] = (uint8_t)(at - code);
            code = at;
        } else {
            line[at] = frame[i];
        }
        at++;
    }
    line[code] = (uint8_t)(at - code);
    line[at] = 0U;
    return at + 1U;
}

static int was_sent(const edgeguard_frame_t *found)
{
    const uint8_t *const frame = found->payload - EDGEGUARD_HEADER;
    const uint32_t size = EDGEGUARD_HEADER + found->size + EDGEGUARD_CHECKSUM;
    uint32_t i;
    for (i = 0U; i < KEPT; i++) {
        if ((sizes[i] == size) && (memcmp(sent[i], frame, size) == 0)) {
            return 1;
        }
    }
    return 0;
}

int main(int count, char **arguments)
{
    const uint64_t damaged_wanted = (count > 3) ? strtoull(arguments[1], NULL, 10) : 0U;
    const double share = (count > 3) ? strtod(arguments[2], NULL) : 0.0;
    const uint64_t below = (uint64_t)(share * 18446744073709551615.0);
    uint64_t number = 0U;
    uint64_t damaged = 0U;
    uint64_t arrived = 0U;
    uint64_t payload = 0U;
    uint64_t bytes = 0U;
    uint64_t wrong = 0U;

    if (count < 4) {
        return 1;
    }
    state = strtoull(arguments[3], NULL, 10) | 1U;
    while (damaged < damaged_wanted) {
        uint8_t line[LINE];
        uint8_t *const frame = sent[number % KEPT];
        uint32_t length;
        uint32_t i;
        int touched = 0;

        sizes[number % KEPT] = make(frame, (uint32_t)number);
        length = stuff(frame, sizes[number % KEPT], line);
        number++;
        bytes += length;
        for (i = 0U; i < length; i++) {
            uint8_t byte = line[i];
            uint32_t times = 1U;
            uint32_t j;
            if (next() < below) {
                const uint64_t what = next() % 3U;
                touched = 1;
                if (what == 0U) {
                    byte = (uint8_t)(byte ^ (1U << (next() % 8U)));
                } else {
                    times = (what == 1U) ? 0U : 2U;
                }
            }
            for (j = 0U; j < times; j++) {
                edgeguard_frame_t found;
                if (edgeguard_decode(&decoder, byte, &found) == EDGEGUARD_FRAME) {
                    if (was_sent(&found) == 1) {
                        arrived++;
                        payload += found.size;
                    } else {
                        wrong++;
                    }
                }
            }
        }
        damaged += (uint64_t)touched;
    }
    (void)printf("{\"frames\": %" PRIu64 ", \"damaged\": %" PRIu64 ", \"arrived\": %" PRIu64 ", \"wrong\": %" PRIu64
                 ", \"line_bytes\": %" PRIu64 ", \"payload_bytes\": %" PRIu64 "}\n",
                 number, damaged, arrived, wrong, bytes, payload);
    return (wrong == 0U) ? 0 : 1;
}
