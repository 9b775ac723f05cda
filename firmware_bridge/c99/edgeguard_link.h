/* EdgeGuard: the microcontroller's end of the serial link to its gateway.
 *
 * Rules enforced here:
 * - a frame counts when its checksum, its length and its type fit; nothing of it is looked at before;
 * - until the gateway has answered a hello with the same message definitions, nothing but hello is said;
 * - one message at a time is repeated until it is acknowledged, EDGEGUARD_SENDINGS times at most; then the link begins
 *   anew with a hello, and the message is kept;
 * - a command is executed once; the same transaction again gets the same reply;
 * - inputs are counted whether the gateway is there or not; what no report could hold is counted as lost.
 *
 * All functions are to be called from one thread, and none from an interrupt: let the interrupt fill a ring buffer, and
 * hand its content to edgeguard_receive in the main loop.
 */
#ifndef EDGEGUARD_LINK_H
#define EDGEGUARD_LINK_H

#include "edgeguard_slots.h"

#ifndef EDGEGUARD_WINDOW_MS
#define EDGEGUARD_WINDOW_MS 60000U
#endif
#ifndef EDGEGUARD_HEARTBEAT_MS
#define EDGEGUARD_HEARTBEAT_MS 5000U
#endif
/* At least so long from one alert to the next; the windows count what is between. */
#ifndef EDGEGUARD_ALERT_MS
#define EDGEGUARD_ALERT_MS 10000U
#endif
#define EDGEGUARD_HELLO_MS 1000U
#define EDGEGUARD_REPEAT_MS 500U
#define EDGEGUARD_SENDINGS 5U
#define EDGEGUARD_SILENCE_MS 30000U
#define EDGEGUARD_RESTART_MS 500U

#define EDGEGUARD_HEADER 6U
#define EDGEGUARD_CHECKSUM 4U
#define EDGEGUARD_MAX_FRAME (EDGEGUARD_HEADER + EDGEGUARD_MAX_PAYLOAD + EDGEGUARD_CHECKSUM)

/* Puts frames together, byte by byte. */
typedef struct {
    uint16_t size;
    uint8_t code; /* of the run that is read, 0 between frames */
    uint8_t left; /* bytes of it that are still to come */
    bool damaged;
    uint8_t frame[EDGEGUARD_MAX_FRAME];
} edgeguard_decoder_t;

/* A frame that is intact; `payload` lies in the decoder until its next byte. */
typedef struct {
    uint8_t type;
    uint16_t sequence;
    uint16_t size;
    uint8_t *payload;
} edgeguard_frame_t;

typedef enum {
    EDGEGUARD_NOTHING = 0, /* no frame ended with this byte */
    EDGEGUARD_FRAME = 1,
    EDGEGUARD_DAMAGED = 2
} edgeguard_decoded_t;

edgeguard_decoded_t edgeguard_decode(edgeguard_decoder_t *decoder, uint8_t byte, edgeguard_frame_t *frame);

/* Everything that the library remembers. Zero-initialised memory is a good place for it; nothing in it is for you. */
typedef struct {
    bool welcome; /* flags and small numbers first: a Cortex-M0 reaches these in one instruction */
    bool known; /* a command came: `transaction` and `outcome` are its */
    bool reply_waits;
    bool alert_waits;
    bool confirm_waits;
    bool report_now;
    bool restart_after_reply;
    bool restart_soon;
    bool restart_now;
    uint8_t sendings;
    uint8_t outcome;
    uint8_t kept_type; /* 0: nothing waits for an acknowledgement */
    uint8_t kept_payload;
    uint16_t sequence;
    uint16_t kept_sequence;
    int16_t alert_label;
    uint32_t clock_ms;
    uint32_t hello_at;
    uint32_t heard_at;
    uint32_t health_at;
    uint32_t sent_at;
    uint32_t restart_at;
    uint32_t window_at;
    uint32_t alert_at;
    uint32_t number;
    uint32_t transaction;
    const edgeguard_hal_t *hal;
    const edgeguard_guard_t *guard;
    const char *name;
    const char *board;
    edgeguard_health_t health; /* its uptime_ms is the time now */
    uint64_t boot;
    uint64_t unix_ms; /* at an uptime of 0; 0 while no clock came */
    edgeguard_slots_t slots;
    edgeguard_decoder_t decoder;
    edgeguard_window_t window;
    uint32_t alert_scores[EDGEGUARD_DETECTORS];
    uint8_t kept[EDGEGUARD_HEADER + EDGEGUARD_REPORT_MAX + EDGEGUARD_CHECKSUM];
} edgeguard_t;

/* At each start. `boot`: a number that no other start of this device has, from a random source or a counter in flash.
 * `name` and `board`: what a hello says, which cuts them at 24 characters; the gateway goes by the port that it is on.
 * False where the sizes of slots and pages, or the number of detectors, are out of bounds; nothing else may be called
 * then. */
bool edgeguard_init(edgeguard_t *self, const edgeguard_hal_t *hal, const edgeguard_guard_t *guard, const char *name,
                    const char *board, uint64_t boot);

/* Where the model to run lies: EDGEGUARD_BUILT_IN, EDGEGUARD_SLOT_A or EDGEGUARD_SLOT_B. */
uint8_t edgeguard_running(const edgeguard_t *self);

/* Whether that model is on trial: run your self-test and tell edgeguard_confirm how it went. Where it did not pass,
 * edgeguard_poll asks for a restart, into the former model. */
bool edgeguard_on_trial(const edgeguard_t *self);
void edgeguard_confirm(edgeguard_t *self, bool passed);

/* Judge one input, count it, and have an alert sent where it is flagged. */
edgeguard_status_t edgeguard_observe(edgeguard_t *self, const edgeguard_input_t *input);

/* What the line brought. */
void edgeguard_receive(edgeguard_t *self, const uint8_t *bytes, uint16_t size);

/* Whatever is due; call it at least every 100 ms. True: restart the microcontroller now. */
bool edgeguard_poll(edgeguard_t *self);

#endif
