/* What libFuzzer drives: anything at all into the frame decoder, and well-formed frames of any content behind it. */
#include "edgeguard_link.h"
#include "edgeguard_model.h"

#include <stdlib.h>
#include <string.h>

#define SLOT 1024U
#define PAGE 256U

static uint8_t flash[4][SLOT];
static uint32_t now;
static volatile uint32_t sum;

static uint32_t clock_ms(void *context)
{
    (void)context;
    return now;
}

static bool uart_write(void *context, const uint8_t *bytes, uint16_t size)
{
    uint16_t i;
    (void)context;
    for (i = 0U; i < size; i++) { /* touches them all, for AddressSanitizer */
        sum += bytes[i];
    }
    return true;
}

static void within(uint8_t area, uint32_t offset, uint32_t size)
{
    if ((area > EDGEGUARD_RECORD_B) || (offset > SLOT) || (size > (SLOT - offset))) {
        abort();
    }
}

static bool flash_read(void *context, uint8_t area, uint32_t offset, uint8_t *bytes, uint16_t size)
{
    (void)context;
    within(area, offset, size);
    (void)memcpy(bytes, &flash[area][offset], size);
    return true;
}

static bool flash_write(void *context, uint8_t area, uint32_t offset, const uint8_t *bytes, uint16_t size)
{
    uint16_t i;
    (void)context;
    within(area, offset, size);
    for (i = 0U; i < size; i++) {
        if (flash[area][offset + i] != 0xFFU) {
            abort(); /* written twice without erasing */
        }
        flash[area][offset + i] = bytes[i];
    }
    return true;
}

static bool flash_erase(void *context, uint8_t area, uint32_t offset)
{
    (void)context;
    within(area, offset, PAGE);
    (void)memset(&flash[area][offset], 0xFF, PAGE);
    return true;
}

static const edgeguard_hal_t hal = {NULL, clock_ms, uart_write, flash_read, flash_write, flash_erase, SLOT, PAGE};
static edgeguard_t guard;

static void receive_framed(uint8_t type, const uint8_t *payload, uint32_t size)
{
    uint8_t frame[EDGEGUARD_MAX_FRAME];
    uint8_t line[EDGEGUARD_MAX_FRAME + 2U];
    uint32_t length = EDGEGUARD_HEADER + size;
    uint32_t crc;
    uint32_t i;
    uint32_t code = 0U;
    uint32_t at = 1U;

    frame[0] = EDGEGUARD_VERSION;
    frame[1] = type;
    frame[2] = (uint8_t)size;
    frame[3] = 0U;
    frame[4] = 0U;
    frame[5] = 0U;
    (void)memcpy(&frame[EDGEGUARD_HEADER], payload, size);
    crc = edgeguard_crc32(frame, length);
    for (i = 0U; i < 4U; i++) {
        frame[length + i] = (uint8_t)(crc >> (8U * i));
    }
    length += 4U;
    for (i = 0U; i < length; i++) {
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
    edgeguard_receive(&guard, line, (uint16_t)(at + 1U));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t welcome[20] = {EDGEGUARD_SCHEMA & 0xFFU, (EDGEGUARD_SCHEMA >> 8) & 0xFFU,
                                        (EDGEGUARD_SCHEMA >> 16) & 0xFFU, (EDGEGUARD_SCHEMA >> 24) & 0xFFU, 7U};
    size_t at = 1U;

    if (size == 0U) {
        return 0;
    }
    (void)memset(flash, 0xFF, sizeof flash);
    now = 0U;
    if (!edgeguard_init(&guard, &hal, &edgeguard_guard, "fuzz", "host", 7U)) {
        abort();
    }
    receive_framed(EDGEGUARD_TYPE_WELCOME, welcome, sizeof welcome);
    if ((data[0] & 1U) == 0U) {
        uint8_t *const copy = malloc(size);
        if (copy != NULL) {
            (void)memcpy(copy, data, size);
            edgeguard_receive(&guard, copy, (uint16_t)size);
            free(copy);
        }
    }
    while (((data[0] & 1U) == 1U) && ((at + 2U) <= size)) {
        const uint8_t type = data[at] & 15U;
        size_t length = data[at + 1U] % (EDGEGUARD_MAX_PAYLOAD + 1U);
        at += 2U;
        length = (length < (size - at)) ? length : (size - at);
        receive_framed(type, &data[at], (uint32_t)length);
        at += length;
        now += 100U;
        if (edgeguard_poll(&guard) && !edgeguard_init(&guard, &hal, &edgeguard_guard, "fuzz", "host", 7U)) {
            abort();
        }
    }
    (void)edgeguard_poll(&guard);
    return 0;
}
