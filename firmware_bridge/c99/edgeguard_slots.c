/* EdgeGuard: model slots. See edgeguard_slots.h. SHA-256 is FIPS 180-4. */
#include "edgeguard_slots.h"

#include <string.h>

#define MAGIC 0x31474445UL
#define BLOCK 64U
#define BLOCKS_AT_ONCE 16U
#define ERASED 0xFFU

/* In the record only: a trial that has begun. To the outside it is a trial like one that has not. */
#define TRIAL_BEGUN 3U

typedef char record_is_256_bytes[(sizeof(edgeguard_record_t) == 256U) ? 1 : -1];

uint32_t edgeguard_crc32(const uint8_t *bytes, uint32_t size)
{
    uint32_t value = 0xFFFFFFFFUL;
    uint32_t i;
    uint32_t bit;
    for (i = 0U; i < size; i++) {
        value ^= bytes[i];
        for (bit = 0U; bit < 8U; bit++) { /* a table would be faster than any serial line needs */
            value = (value >> 1) ^ (0xEDB88320UL & (0U - (value & 1U)));
        }
    }
    return ~value;
}

static uint32_t turned(uint32_t value, uint32_t by)
{
    return (value >> by) | (value << (32U - by));
}

/* The four functions of FIPS 180-4, 4.1.2 have one form: three turns, or two and a shift. */
static uint32_t mixed(uint32_t value, uint32_t first, uint32_t second, uint32_t third)
{
    return turned(value, first) ^ turned(value, second) ^ third;
}

static void hash_begin(uint32_t hash[8])
{
    static const uint32_t initial[8] = {0x6A09E667UL, 0xBB67AE85UL, 0x3C6EF372UL, 0xA54FF53AUL,
                                        0x510E527FUL, 0x9B05688CUL, 0x1F83D9ABUL, 0x5BE0CD19UL};
    (void)memcpy(hash, initial, sizeof initial);
}

static void hash_block(uint32_t hash[8], const uint8_t block[BLOCK])
{
    static const uint32_t constants[64] = {
        0x428A2F98UL, 0x71374491UL, 0xB5C0FBCFUL, 0xE9B5DBA5UL, 0x3956C25BUL, 0x59F111F1UL, 0x923F82A4UL, 0xAB1C5ED5UL,
        0xD807AA98UL, 0x12835B01UL, 0x243185BEUL, 0x550C7DC3UL, 0x72BE5D74UL, 0x80DEB1FEUL, 0x9BDC06A7UL, 0xC19BF174UL,
        0xE49B69C1UL, 0xEFBE4786UL, 0x0FC19DC6UL, 0x240CA1CCUL, 0x2DE92C6FUL, 0x4A7484AAUL, 0x5CB0A9DCUL, 0x76F988DAUL,
        0x983E5152UL, 0xA831C66DUL, 0xB00327C8UL, 0xBF597FC7UL, 0xC6E00BF3UL, 0xD5A79147UL, 0x06CA6351UL, 0x14292967UL,
        0x27B70A85UL, 0x2E1B2138UL, 0x4D2C6DFCUL, 0x53380D13UL, 0x650A7354UL, 0x766A0ABBUL, 0x81C2C92EUL, 0x92722C85UL,
        0xA2BFE8A1UL, 0xA81A664BUL, 0xC24B8B70UL, 0xC76C51A3UL, 0xD192E819UL, 0xD6990624UL, 0xF40E3585UL, 0x106AA070UL,
        0x19A4C116UL, 0x1E376C08UL, 0x2748774CUL, 0x34B0BCB5UL, 0x391C0CB3UL, 0x4ED8AA4AUL, 0x5B9CCA4FUL, 0x682E6FF3UL,
        0x748F82EEUL, 0x78A5636FUL, 0x84C87814UL, 0x8CC70208UL, 0x90BEFFFAUL, 0xA4506CEBUL, 0xBEF9A3F7UL, 0xC67178F2UL};
    uint32_t w[16];
    uint32_t v[8];
    uint32_t i;

    (void)memcpy(v, hash, sizeof v);
    for (i = 0U; i < 64U; i++) {
        uint32_t first;
        uint32_t second;
        if (i < 16U) {
            const uint8_t *const in = &block[i * 4U];
            w[i] = ((uint32_t)in[0] << 24) | ((uint32_t)in[1] << 16) | ((uint32_t)in[2] << 8) | in[3];
        } else {
            const uint32_t before = w[(i + 1U) & 15U];
            const uint32_t last = w[(i + 14U) & 15U];
            w[i & 15U] += mixed(before, 7U, 18U, before >> 3) + w[(i + 9U) & 15U] +
                          mixed(last, 17U, 19U, last >> 10);
        }
        first = v[7] + mixed(v[4], 6U, 11U, turned(v[4], 25U)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) +
                constants[i] + w[i & 15U];
        second = mixed(v[0], 2U, 13U, turned(v[0], 22U)) +
                 ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        (void)memmove(&v[1], &v[0], 7U * sizeof v[0]);
        v[4] += first;
        v[0] = first + second;
    }
    for (i = 0U; i < 8U; i++) {
        hash[i] += v[i];
    }
}

static bool hash_is(const uint32_t hash[8], const uint8_t digest[32])
{
    uint32_t i;
    for (i = 0U; i < 32U; i++) {
        if ((uint8_t)(hash[i >> 2] >> (24U - (8U * (i & 3U)))) != digest[i]) {
            return false;
        }
    }
    return true;
}

static bool read_record(const edgeguard_hal_t *hal, uint8_t area, edgeguard_record_t *record)
{
    return hal->flash_read(hal->context, area, 0U, (uint8_t *)record, (uint16_t)sizeof *record) &&
           (record->magic == MAGIC) &&
           (record->crc == edgeguard_crc32((const uint8_t *)record, (uint32_t)offsetof(edgeguard_record_t, crc)));
}

void edgeguard_slots_record(const edgeguard_slots_t *slots, edgeguard_record_t *record)
{
    if ((slots->area == EDGEGUARD_NO_RECORD) || !read_record(slots->hal, slots->area, record)) {
        (void)memset(record, 0, sizeof *record);
        record->magic = MAGIC;
        record->active = EDGEGUARD_BUILT_IN;
        record->previous = EDGEGUARD_BUILT_IN;
    }
}

/* What stands in `record` afterwards is what was read back, and anything where that is not what was written. */
static bool write_record(edgeguard_slots_t *slots, edgeguard_record_t *record)
{
    const edgeguard_hal_t *const hal = slots->hal;
    const uint8_t area = (slots->area == EDGEGUARD_RECORD_A) ? EDGEGUARD_RECORD_B : EDGEGUARD_RECORD_A;

    (void)memcpy(record->built_in, slots->built_in->file_digest, sizeof record->built_in);
    record->counter = slots->counter + 1U;
    record->crc = edgeguard_crc32((const uint8_t *)record, (uint32_t)offsetof(edgeguard_record_t, crc));
    if (!hal->flash_erase(hal->context, area, 0U) ||
        !hal->flash_write(hal->context, area, 0U, (const uint8_t *)record, (uint16_t)sizeof *record) ||
        !read_record(hal, area, record)) {
        return false;
    }
    slots->area = area;
    slots->counter = record->counter;
    return true;
}

static uint8_t outer(uint8_t standing)
{
    return (standing == TRIAL_BEGUN) ? EDGEGUARD_STANDING_TRIAL : standing;
}

/* The slot that does not run: what is received goes there. */
static uint8_t spare(const edgeguard_record_t *record)
{
    return (record->active == EDGEGUARD_SLOT_A) ? EDGEGUARD_SLOT_B : EDGEGUARD_SLOT_A;
}

const edgeguard_content_t *edgeguard_slots_incoming(const edgeguard_record_t *record)
{
    return &record->slot[(record->standing == EDGEGUARD_STANDING_TRIAL) ? record->active : spare(record)];
}

const edgeguard_content_t *edgeguard_slots_content(const edgeguard_slots_t *slots, const edgeguard_record_t *record)
{
    return (slots->active == EDGEGUARD_BUILT_IN) ? slots->built_in : &record->slot[slots->active];
}

void edgeguard_slots_open(edgeguard_slots_t *slots, const edgeguard_hal_t *hal, const edgeguard_content_t *built_in)
{
    edgeguard_record_t record;
    uint8_t area;

    (void)memset(slots, 0, sizeof *slots);
    slots->hal = hal;
    slots->built_in = built_in;
    slots->active = EDGEGUARD_BUILT_IN;
    if (hal->slot_bytes == 0U) {
        return;
    }
    for (area = EDGEGUARD_RECORD_A; area <= EDGEGUARD_RECORD_B; area++) {
        if (read_record(hal, area, &record) &&
            ((slots->area == EDGEGUARD_NO_RECORD) || ((record.counter - slots->counter) <= 0x7FFFFFFFUL))) {
            slots->area = area;
            slots->counter = record.counter;
        }
    }
    edgeguard_slots_record(slots, &record);
    if (memcmp(record.built_in, built_in->file_digest, sizeof record.built_in) != 0) {
        slots->area = EDGEGUARD_NO_RECORD; /* the next one that is written counts on, and replaces it */
        return;
    }
    slots->active = record.active;
    slots->standing = record.standing;
    if (record.standing == EDGEGUARD_STANDING_TRIAL) {
        const uint8_t previous = record.previous;
        record.standing = TRIAL_BEGUN;
        if (!write_record(slots, &record)) { /* no trial that could not be noticed to have failed */
            slots->active = previous;
            slots->standing = EDGEGUARD_STANDING_REVERTED;
        }
    } else if (record.standing == TRIAL_BEGUN) {
        (void)edgeguard_slots_confirm(slots, false);
    } else {
        /* nothing is on trial */
    }
}

bool edgeguard_slots_confirm(edgeguard_slots_t *slots, bool passed)
{
    edgeguard_record_t record;

    edgeguard_slots_record(slots, &record);
    if (record.standing != TRIAL_BEGUN) {
        return true;
    }
    if (passed) {
        record.standing = EDGEGUARD_STANDING_CONFIRMED;
    } else {
        record.standing = EDGEGUARD_STANDING_REVERTED;
        record.active = record.previous;
    }
    slots->active = record.active;
    slots->standing = record.standing;
    return write_record(slots, &record);
}

static void refuse(edgeguard_slots_t *slots, uint8_t cause)
{
    slots->phase = EDGEGUARD_PHASE_REFUSED;
    slots->cause = cause;
}

/* Nothing more is taken; where the record cannot say so, the next begin will. */
static void give_up(edgeguard_slots_t *slots, uint8_t cause)
{
    edgeguard_record_t record;
    edgeguard_slots_record(slots, &record);
    record.receiving = 0U;
    (void)write_record(slots, &record);
    refuse(slots, cause);
}

void edgeguard_slots_begin(edgeguard_slots_t *slots, const edgeguard_transfer_begin_t *begin)
{
    edgeguard_record_t record;
    edgeguard_content_t *content;
    uint32_t offset = 0U;
    uint8_t cause = EDGEGUARD_CAUSE_NONE;

    if (slots->phase == EDGEGUARD_PHASE_STAGED) {
        return; /* the restart is near */
    }
    edgeguard_slots_record(slots, &record);
    content = &record.slot[spare(&record)];
    if (slots->hal->slot_bytes == 0U) {
        cause = EDGEGUARD_CAUSE_NO_SLOT;
    } else if (outer(record.standing) == EDGEGUARD_STANDING_TRIAL) {
        cause = EDGEGUARD_CAUSE_ON_TRIAL;
    } else if ((begin->size == 0U) || (begin->size > slots->hal->slot_bytes)) {
        cause = EDGEGUARD_CAUSE_TOO_LARGE;
    } else if (begin->sequence <= edgeguard_slots_content(slots, &record)->sequence) {
        cause = EDGEGUARD_CAUSE_NOT_NEWER;
    } else {
        /* nothing speaks against it */
    }
    if (cause != EDGEGUARD_CAUSE_NONE) {
        refuse(slots, cause);
        return;
    }
    if ((record.receiving != 0U) && (content->size == begin->size) &&
        (memcmp(content->file_digest, begin->file_digest, sizeof content->file_digest) == 0)) {
        if ((slots->phase == EDGEGUARD_PHASE_RECEIVING) || (slots->phase == EDGEGUARD_PHASE_VERIFYING)) {
            return; /* it is going on */
        }
        offset = record.offset;
    }
    (void)memcpy(content->file_digest, begin->file_digest, sizeof content->file_digest);
    (void)memcpy(content->model_digest, begin->model_digest, sizeof content->model_digest);
    (void)memcpy(content->guard_digest, begin->guard_digest, sizeof content->guard_digest);
    content->sequence = begin->sequence;
    content->size = begin->size;
    record.receiving = 1U;
    record.offset = offset;
    record.standing = EDGEGUARD_STANDING_CONFIRMED;
    if (!write_record(slots, &record)) {
        refuse(slots, EDGEGUARD_CAUSE_FLASH);
        return;
    }
    slots->standing = EDGEGUARD_STANDING_CONFIRMED;
    slots->phase = EDGEGUARD_PHASE_RECEIVING;
    slots->cause = EDGEGUARD_CAUSE_NONE;
    slots->size = begin->size;
    slots->offset = offset;
    slots->checkpoint = offset;
}

/* Erase the pages that begin within the next `size` bytes, write these, and now and then note how far it got. */
static bool store(edgeguard_slots_t *slots, const uint8_t *data, uint32_t padded, uint32_t size)
{
    const edgeguard_hal_t *const hal = slots->hal;
    const uint8_t area = (slots->active == EDGEGUARD_SLOT_A) ? EDGEGUARD_SLOT_B : EDGEGUARD_SLOT_A;
    const uint32_t page = (slots->offset + (hal->page_bytes - 1U)) & ~(hal->page_bytes - 1U);

    if ((page < (slots->offset + padded)) && !hal->flash_erase(hal->context, area, page)) {
        return false;
    }
    if (!hal->flash_write(hal->context, area, slots->offset, data, (uint16_t)padded)) {
        return false;
    }
    slots->offset += size;
    if ((slots->offset - slots->checkpoint) > (EDGEGUARD_CHECKPOINT_PAGES * hal->page_bytes)) {
        edgeguard_record_t record;
        edgeguard_slots_record(slots, &record);
        record.offset = slots->offset & ~(hal->page_bytes - 1U);
        slots->checkpoint = record.offset;
        return write_record(slots, &record);
    }
    return true;
}

void edgeguard_slots_chunk(edgeguard_slots_t *slots, uint32_t offset, uint8_t *data, uint32_t size)
{
    uint32_t padded = size;
    if ((slots->phase != EDGEGUARD_PHASE_RECEIVING) || (offset != slots->offset) || (size == 0U) ||
        (size > (slots->size - offset))) {
        return;
    }
    if ((size % EDGEGUARD_WRITE_UNIT) != 0U) {
        if (size != (slots->size - offset)) { /* only the last one may be of any length */
            return;
        }
        while ((padded % EDGEGUARD_WRITE_UNIT) != 0U) {
            data[padded] = ERASED;
            padded++;
        }
    }
    if (!store(slots, data, padded, size)) {
        give_up(slots, EDGEGUARD_CAUSE_FLASH);
    }
}

void edgeguard_slots_end(edgeguard_slots_t *slots, const uint8_t *file_digest)
{
    edgeguard_record_t record;
    if ((slots->phase != EDGEGUARD_PHASE_RECEIVING) || (slots->offset != slots->size)) {
        return;
    }
    edgeguard_slots_record(slots, &record);
    if (memcmp(record.slot[spare(&record)].file_digest, file_digest, sizeof record.slot[0].file_digest) == 0) {
        slots->phase = EDGEGUARD_PHASE_VERIFYING;
        slots->hashed = 0U;
        hash_begin(slots->hash);
    }
}

/* The next block of the content: its bytes, and behind the last of them what FIPS 180-4 pads with. */
static bool next_block(const edgeguard_slots_t *slots, uint8_t area, uint8_t block[BLOCK])
{
    const edgeguard_hal_t *const hal = slots->hal;
    const uint32_t left = (slots->size > slots->hashed) ? (slots->size - slots->hashed) : 0U;
    const uint32_t here = (left < BLOCK) ? left : BLOCK;
    uint32_t i;

    (void)memset(block, 0, BLOCK);
    if ((here > 0U) && !hal->flash_read(hal->context, area, slots->hashed, block, (uint16_t)here)) {
        return false;
    }
    if ((here < BLOCK) && (slots->hashed <= slots->size)) {
        block[here] = 0x80U;
    }
    if ((slots->hashed + BLOCK) >= (slots->size + 9U)) {
        for (i = 0U; i < 4U; i++) {
            block[(BLOCK - 1U) - i] = (uint8_t)((slots->size << 3) >> (8U * i));
        }
        block[BLOCK - 5U] = (uint8_t)(slots->size >> 29);
    }
    return true;
}

bool edgeguard_slots_verify(edgeguard_slots_t *slots)
{
    edgeguard_record_t record;
    uint8_t block[BLOCK];
    uint32_t i;

    if (slots->phase != EDGEGUARD_PHASE_VERIFYING) {
        return false;
    }
    edgeguard_slots_record(slots, &record);
    for (i = 0U; (i < BLOCKS_AT_ONCE) && (slots->hashed < (slots->size + 9U)); i++) {
        if (!next_block(slots, spare(&record), block)) {
            give_up(slots, EDGEGUARD_CAUSE_FLASH);
            return true;
        }
        hash_block(slots->hash, block);
        slots->hashed += BLOCK;
    }
    if (slots->hashed < (slots->size + 9U)) {
        return false;
    }
    if (!hash_is(slots->hash, record.slot[spare(&record)].file_digest)) {
        give_up(slots, EDGEGUARD_CAUSE_DIGEST);
        return true;
    }
    record.previous = record.active;
    record.active = spare(&record);
    record.standing = EDGEGUARD_STANDING_TRIAL;
    record.receiving = 0U;
    if (write_record(slots, &record)) {
        slots->phase = EDGEGUARD_PHASE_STAGED;
    } else {
        give_up(slots, EDGEGUARD_CAUSE_FLASH);
    }
    return true;
}
