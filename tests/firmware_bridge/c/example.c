/* A board for the example main.c, whose slot A holds a model on trial. `example SCORE` gives this for each golden input;
 * then two inputs come, on the second of which the model does not run. It prints 1 where it asks for a restart, which
 * leaves the model, else 0, how many inputs were counted, and how many of them were not checked. */
#include "edgeguard_link.h"
#include "edgeguard_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SLOT (256U * 1024U)
#define PAGE 4096U

extern int example_main(void);

typedef struct {
    const void *classes;
    const void *scores;
    const void *features;
    uint32_t inference_us;
} board_outputs_t;

static uint8_t flash[4][SLOT];
static float scores[EDGEGUARD_DETECTORS];
static float features[64];
static int8_t classes[64];
static uint32_t inputs;
static uint32_t now;
static edgeguard_decoder_t decoder;

uint32_t board_clock_ms(void *context)
{
    (void)context;
    return now;
}

static void ended(int restarted, uint32_t counted, uint32_t unchecked)
{
    (void)printf("%d %u %u\n", restarted, (unsigned)counted, (unsigned)unchecked);
    exit(0);
}

/* Listens for health: the line is the one way to hear what was counted. */
bool board_uart_write(void *context, const uint8_t *bytes, uint16_t size)
{
    uint16_t i;
    (void)context;
    for (i = 0U; i < size; i++) {
        edgeguard_frame_t frame;
        if ((edgeguard_decode(&decoder, bytes[i], &frame) == EDGEGUARD_FRAME) &&
            (frame.type == EDGEGUARD_TYPE_HEALTH) && (inputs >= 2U)) {
            uint32_t counted[2];
            (void)memcpy(counted, &frame.payload[8], sizeof counted);
            ended(0, counted[0], counted[1]);
        }
    }
    return true;
}

uint16_t board_uart_read(uint8_t *bytes, uint16_t most)
{
    static bool greeted;
    static uint8_t line[64];
    now += 1000U;
    if (now > 100000U) {
        abort();
    }
    if (!greeted && (now >= 2000U)) { /* a welcome, in one run without zeros but those of COBS */
        uint8_t frame[64];
        const edgeguard_welcome_t welcome = {EDGEGUARD_SCHEMA, 7U, 1U};
        const uint32_t payload = 20U;
        uint32_t size = EDGEGUARD_HEADER + payload;
        uint32_t code = 0U;
        uint32_t i;
        uint32_t crc;
        (void)memset(frame, 0, sizeof frame);
        frame[0] = EDGEGUARD_VERSION;
        frame[1] = EDGEGUARD_TYPE_WELCOME;
        frame[2] = (uint8_t)payload;
        (void)memcpy(&frame[EDGEGUARD_HEADER], &welcome.schema, 4U);
        (void)memcpy(&frame[EDGEGUARD_HEADER + 4U], &welcome.boot, 8U);
        (void)memcpy(&frame[EDGEGUARD_HEADER + 12U], &welcome.unix_ms, 8U);
        crc = edgeguard_crc32(frame, size);
        (void)memcpy(&frame[size], &crc, 4U);
        size += 4U;
        for (i = 0U; i < size; i++) {
            line[i + 1U] = frame[i];
            if (frame[i] == 0U) {
                line[code] = (uint8_t)((i + 1U) - code);
                code = i + 1U;
            }
        }
        line[code] = (uint8_t)((size + 1U) - code);
        greeted = true;
        (void)memcpy(bytes, line, size + 2U);
        return ((size + 2U) <= most) ? (uint16_t)(size + 2U) : 0U;
    }
    return 0U;
}

bool board_flash_read(void *context, uint8_t area, uint32_t offset, uint8_t *bytes, uint16_t size)
{
    (void)context;
    (void)memcpy(bytes, &flash[area][offset], size);
    return true;
}

bool board_flash_write(void *context, uint8_t area, uint32_t offset, const uint8_t *bytes, uint16_t size)
{
    (void)context;
    (void)memcpy(&flash[area][offset], bytes, size);
    return true;
}

bool board_flash_erase(void *context, uint8_t area, uint32_t offset)
{
    (void)context;
    (void)memset(&flash[area][offset], 0xFF, PAGE);
    return true;
}

const uint8_t *board_slot(uint8_t slot)
{
    return flash[slot];
}

uint64_t board_boot_number(void)
{
    return 7U;
}

bool board_open_model(const uint8_t *model)
{
    return model == flash[EDGEGUARD_SLOT_A];
}

bool board_run(const uint8_t *input, board_outputs_t *outputs)
{
    outputs->classes = classes;
    outputs->scores = scores;
    outputs->features = features;
    outputs->inference_us = 1U;
    return (input != (const uint8_t *)features) || (inputs < 2U);
}

const uint8_t *board_next_input(void)
{
    if (inputs >= 2U) {
        return NULL;
    }
    inputs++;
    scores[0] = 0.0F;
    return (const uint8_t *)features;
}

void board_restart(void)
{
    ended(1, 0U, 0U);
}

int main(int count, char **arguments)
{
    static const edgeguard_hal_t hal = {NULL, board_clock_ms, board_uart_write, board_flash_read,
                                        board_flash_write, board_flash_erase, SLOT, PAGE};
    edgeguard_slots_t slots;
    edgeguard_transfer_begin_t begin;
    uint8_t data[64] = {'a', 'b', 'c'};
    /* FIPS 180-4's own example: SHA-256 of "abc" */
    static const uint8_t digest[32] = {0xBA, 0x78, 0x16, 0xBF, 0x8F, 0x01, 0xCF, 0xEA, 0x41, 0x41, 0x40,
                                       0xDE, 0x5D, 0xAE, 0x22, 0x23, 0xB0, 0x03, 0x61, 0xA3, 0x96, 0x17,
                                       0x7A, 0x9C, 0xB4, 0x10, 0xFF, 0x61, 0xF2, 0x00, 0x15, 0xAD};
    if (count != 2) {
        return 2;
    }
    (void)memset(flash, 0xFF, sizeof flash);
    edgeguard_slots_open(&slots, &hal, edgeguard_guard.content);
    begin.file_digest = digest;
    begin.model_digest = digest;
    begin.guard_digest = digest;
    begin.sequence = edgeguard_guard.content->sequence + 1U;
    begin.size = 3U;
    edgeguard_slots_begin(&slots, &begin);
    edgeguard_slots_chunk(&slots, 0U, data, 3U);
    edgeguard_slots_end(&slots, digest);
    if (!edgeguard_slots_verify(&slots) || (slots.phase != EDGEGUARD_PHASE_STAGED)) {
        return 3;
    }
    scores[0] = strtof(arguments[1], NULL);
    return example_main();
}
