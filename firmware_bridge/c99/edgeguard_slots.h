/* EdgeGuard: two model slots in flash and one record of them, so that a power cut at any moment leaves a model to run.
 *
 * Rules enforced here:
 * - the slot that runs is never erased or written; what is received goes to the other one;
 * - nothing is staged that was not read back and has the SHA-256 that was announced;
 * - a staged model runs on trial once: unless it is confirmed, the next start runs the former one;
 * - the record lies twice: the older copy is replaced, and counts only when its checksum fits;
 * - before the first hand-over the model that is built into the firmware runs, until another one passed its trial;
 * - firmware with another model of its own begins with that: what the slots hold was handed to the former one.
 */
#ifndef EDGEGUARD_SLOTS_H
#define EDGEGUARD_SLOTS_H

#include "edgeguard.h"

/* Flash is given in four areas. Slots hold `slot_bytes`, records one page; a page is what is erased at once. */
#define EDGEGUARD_SLOT_A 0U
#define EDGEGUARD_SLOT_B 1U
#define EDGEGUARD_RECORD_A 2U
#define EDGEGUARD_RECORD_B 3U
/* Where the model runs from, beside the two slots: the firmware's own copy. */
#define EDGEGUARD_BUILT_IN 2U

/* Bytes are written in whole multiples of this, at such offsets, once after each erasing. */
#define EDGEGUARD_WRITE_UNIT 32U

/* How many pages of a transfer may have to be sent again after a power cut. */
#ifndef EDGEGUARD_CHECKPOINT_PAGES
#define EDGEGUARD_CHECKPOINT_PAGES 8U
#endif

/* What the library asks of the board. All but flash_* must be there; without slots `slot_bytes` is 0. Each returns
 * false where it did not succeed. `context` is handed back as it was given. */
typedef struct {
    void *context;
    uint32_t (*clock_ms)(void *context); /* never goes back, but for wrapping around */
    bool (*uart_write)(void *context, const uint8_t *bytes, uint16_t size); /* all of them, none perhaps, or false */
    bool (*flash_read)(void *context, uint8_t area, uint32_t offset, uint8_t *bytes, uint16_t size);
    bool (*flash_write)(void *context, uint8_t area, uint32_t offset, const uint8_t *bytes, uint16_t size);
    bool (*flash_erase)(void *context, uint8_t area, uint32_t offset); /* the page that begins there */
    uint32_t slot_bytes; /* a multiple of page_bytes */
    uint32_t page_bytes; /* a power of two, 256 at least */
} edgeguard_hal_t;

/* The record as it lies in flash: 256 bytes without gaps, in this machine's byte order. */
typedef struct {
    uint32_t magic;
    uint32_t counter;
    uint32_t offset;   /* of a transfer: so much is safe */
    uint8_t active;    /* EDGEGUARD_SLOT_A, EDGEGUARD_SLOT_B or EDGEGUARD_BUILT_IN */
    uint8_t previous;  /* likewise: what runs again when the active one does not pass its trial */
    uint8_t standing;
    uint8_t receiving; /* a transfer into the slot that is neither is under way */
    edgeguard_content_t slot[2];
    uint8_t built_in[28]; /* how the digest of the firmware's own file begins */
    uint32_t crc;
} edgeguard_record_t;

typedef struct {
    uint8_t area;     /* where the record in force lies, or EDGEGUARD_NO_RECORD */
    uint8_t active;
    uint8_t standing; /* what a hello says */
    uint8_t phase;
    uint8_t cause;
    const edgeguard_hal_t *hal;
    const edgeguard_content_t *built_in;
    uint32_t offset;
    uint32_t checkpoint;
    uint32_t size;
    uint32_t hashed;
    uint32_t hash[8];
    uint32_t counter;
} edgeguard_slots_t;

#define EDGEGUARD_NO_RECORD 0U

/* CRC-32 as in zlib. */
uint32_t edgeguard_crc32(const uint8_t *bytes, uint32_t size);

/* At each start: find out what runs. A model that was on trial and not confirmed is left behind, and so is what was
 * handed to firmware with another model of its own. */
void edgeguard_slots_open(edgeguard_slots_t *slots, const edgeguard_hal_t *hal, const edgeguard_content_t *built_in);

/* The record in force; without one, a record of the built-in model. */
void edgeguard_slots_record(const edgeguard_slots_t *slots, edgeguard_record_t *record);

/* What runs; and what is received, is staged, or was rejected. */
const edgeguard_content_t *edgeguard_slots_content(const edgeguard_slots_t *slots, const edgeguard_record_t *record);
const edgeguard_content_t *edgeguard_slots_incoming(const edgeguard_record_t *record);

/* After a trial. False where the record could not be written: the next start runs the former model. */
bool edgeguard_slots_confirm(edgeguard_slots_t *slots, bool passed);

/* The three steps of a transfer; `slots->phase` and `slots->cause` say what became of each.
 * A chunk is padded behind its end, to EDGEGUARD_WRITE_UNIT, in place. */
void edgeguard_slots_begin(edgeguard_slots_t *slots, const edgeguard_transfer_begin_t *begin);
void edgeguard_slots_chunk(edgeguard_slots_t *slots, uint32_t offset, uint8_t *data, uint32_t size);
void edgeguard_slots_end(edgeguard_slots_t *slots, const uint8_t *file_digest);

/* One piece of the reading back; true when that ended it. */
bool edgeguard_slots_verify(edgeguard_slots_t *slots);

#endif
