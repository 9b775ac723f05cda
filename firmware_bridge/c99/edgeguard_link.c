/* EdgeGuard: the serial link. See edgeguard_link.h. */
#include "edgeguard_link.h"

#include <string.h>

#define LONGEST_RUN 254U

/* -- frames */

static void push(edgeguard_decoder_t *decoder, uint32_t byte)
{
    if (decoder->size < EDGEGUARD_MAX_FRAME) {
        decoder->frame[decoder->size] = (uint8_t)byte;
        decoder->size++;
    } else {
        decoder->damaged = true;
    }
}

static uint32_t checksum_at(const uint8_t *in)
{
    return (uint32_t)in[0] | ((uint32_t)in[1] << 8) | ((uint32_t)in[2] << 16) | ((uint32_t)in[3] << 24);
}

static edgeguard_decoded_t complete(edgeguard_decoder_t *decoder, edgeguard_frame_t *frame)
{
    uint8_t *const in = decoder->frame;
    const uint32_t size = decoder->size;
    const bool whole = !decoder->damaged && (decoder->left == 0U) && (size >= (EDGEGUARD_HEADER + EDGEGUARD_CHECKSUM));
    const bool begun = decoder->code != 0U;

    decoder->size = 0U;
    decoder->code = 0U;
    decoder->left = 0U;
    decoder->damaged = false;
    if (!begun) {
        return EDGEGUARD_NOTHING;
    }
    if (!whole || (checksum_at(&in[size - EDGEGUARD_CHECKSUM]) !=
                   edgeguard_crc32(in, size - EDGEGUARD_CHECKSUM))) {
        return EDGEGUARD_DAMAGED;
    }
    frame->type = in[1];
    frame->size = (uint16_t)(in[2] | (uint16_t)((uint16_t)in[3] << 8));
    frame->sequence = (uint16_t)(in[4] | (uint16_t)((uint16_t)in[5] << 8));
    frame->payload = &in[EDGEGUARD_HEADER];
    if (frame->size != (size - EDGEGUARD_HEADER - EDGEGUARD_CHECKSUM)) {
        return EDGEGUARD_DAMAGED;
    }
    return (in[0] == EDGEGUARD_VERSION) ? EDGEGUARD_FRAME : EDGEGUARD_NOTHING;
}

edgeguard_decoded_t edgeguard_decode(edgeguard_decoder_t *decoder, uint8_t byte, edgeguard_frame_t *frame)
{
    if (byte == 0U) {
        return complete(decoder, frame);
    }
    if (decoder->left > 0U) {
        push(decoder, byte);
        decoder->left--;
    } else {
        if ((decoder->code > 0U) && (decoder->code <= LONGEST_RUN)) {
            push(decoder, 0U); /* what the last run ended with */
        }
        decoder->code = byte;
        decoder->left = (uint8_t)(byte - 1U);
    }
    return EDGEGUARD_NOTHING;
}

static bool out(const edgeguard_hal_t *hal, const uint8_t *bytes, uint32_t size)
{
    return hal->uart_write(hal->context, bytes, (uint16_t)size);
}

/* Send bytes in runs without a zero, each behind its length. */
static bool stuff(const edgeguard_hal_t *hal, const uint8_t *frame, uint32_t size)
{
    static const uint8_t end = 0U;
    uint32_t at = 0U;
    bool more = true;
    while (more) {
        uint32_t run = 0U;
        uint8_t code;
        while (((at + run) < size) && (run < LONGEST_RUN) && (frame[at + run] != 0U)) {
            run++;
        }
        code = (uint8_t)(run + 1U);
        if (!out(hal, &code, 1U) || !out(hal, &frame[at], run)) {
            return false;
        }
        at += run;
        more = at < size;
        if (more && (run < LONGEST_RUN)) {
            at++; /* the zero; one that is the last byte has an empty run of its own behind it */
        }
    }
    return out(hal, &end, 1U);
}

/* Put header and checksum around a payload that lies at frame[EDGEGUARD_HEADER], and send it. What does not go out is
 * sent again, asked for again, or out of date by then. */
static void send(const edgeguard_t *self, uint8_t *frame, uint32_t type, uint32_t payload, uint32_t sequence)
{
    const uint32_t size = EDGEGUARD_HEADER + payload;
    uint32_t crc;
    uint32_t i;
    frame[0] = EDGEGUARD_VERSION;
    frame[1] = (uint8_t)type;
    frame[2] = (uint8_t)payload;
    frame[3] = (uint8_t)(payload >> 8);
    frame[4] = (uint8_t)sequence;
    frame[5] = (uint8_t)(sequence >> 8);
    crc = edgeguard_crc32(frame, size);
    for (i = 0U; i < EDGEGUARD_CHECKSUM; i++) {
        frame[size + i] = (uint8_t)crc;
        crc >>= 8;
    }
    (void)stuff(self->hal, frame, size + EDGEGUARD_CHECKSUM);
}

/* -- what is said once */

static void say(edgeguard_t *self, uint8_t *frame, uint32_t type, uint32_t payload)
{
    send(self, frame, type, payload, self->sequence);
    self->sequence++;
}

static void say_hello(edgeguard_t *self)
{
    static const uint8_t end = 0U;
    uint8_t frame[EDGEGUARD_HEADER + EDGEGUARD_HELLO_MAX + EDGEGUARD_CHECKSUM];
    edgeguard_record_t record;
    const edgeguard_content_t *content;
    edgeguard_hello_t hello;

    edgeguard_slots_record(&self->slots, &record);
    content = edgeguard_slots_content(&self->slots, &record);
    hello.schema = EDGEGUARD_SCHEMA;
    hello.boot = self->boot;
    hello.name = self->name;
    hello.board = self->board;
    hello.library = EDGEGUARD_LIBRARY;
    hello.detectors = self->guard->detector_names;
    hello.file_digest = content->file_digest;
    hello.model_digest = content->model_digest;
    hello.guard_digest = content->guard_digest;
    hello.sequence = content->sequence;
    hello.slot_bytes = self->hal->slot_bytes;
    hello.standing = self->slots.standing;
    /* Whatever the line brought before ends here, and cannot take the hello with it. */
    (void)out(self->hal, &end, 1U);
    say(self, frame, EDGEGUARD_TYPE_HELLO, edgeguard_put_hello(&hello, &frame[EDGEGUARD_HEADER]));
    self->hello_at = self->clock_ms;
}

static void say_health(edgeguard_t *self)
{
    uint8_t frame[EDGEGUARD_HEADER + EDGEGUARD_HEALTH_MAX + EDGEGUARD_CHECKSUM];
    say(self, frame, EDGEGUARD_TYPE_HEALTH, edgeguard_put_health(&self->health, &frame[EDGEGUARD_HEADER]));
    self->health_at = self->clock_ms;
}

static void say_ack(edgeguard_t *self, uint16_t sequence)
{
    uint8_t frame[EDGEGUARD_HEADER + EDGEGUARD_ACK_MAX + EDGEGUARD_CHECKSUM];
    const edgeguard_ack_t ack = {sequence};
    say(self, frame, EDGEGUARD_TYPE_ACK, edgeguard_put_ack(&ack, &frame[EDGEGUARD_HEADER]));
}

/* `file_digest`: of the transfer that was asked about, or NULL for the one that is under way. */
static void say_status(edgeguard_t *self, const uint8_t *file_digest)
{
    uint8_t frame[EDGEGUARD_HEADER + EDGEGUARD_TRANSFER_STATUS_MAX + EDGEGUARD_CHECKSUM];
    edgeguard_record_t record;
    edgeguard_transfer_status_t status;

    status.file_digest = file_digest;
    if (file_digest == NULL) {
        edgeguard_slots_record(&self->slots, &record);
        status.file_digest = edgeguard_slots_incoming(&record)->file_digest;
    }
    status.phase = self->slots.phase;
    status.offset = self->slots.offset;
    status.cause = self->slots.cause;
    say(self, frame, EDGEGUARD_TYPE_TRANSFER_STATUS,
        edgeguard_put_transfer_status(&status, &frame[EDGEGUARD_HEADER]));
    if ((status.phase == EDGEGUARD_PHASE_STAGED) && !self->restart_soon) {
        self->restart_soon = true;
        self->restart_at = self->clock_ms;
    }
}

/* -- what is repeated until it is acknowledged */

/* The time at `then` on the board's clock. */
static uint64_t wall(const edgeguard_t *self, uint32_t then)
{
    return (self->unix_ms + self->health.uptime_ms) - (uint32_t)(self->clock_ms - then);
}

static void send_kept(edgeguard_t *self)
{
    send(self, self->kept, self->kept_type, self->kept_payload, self->kept_sequence);
    self->sendings++;
    self->sent_at = self->clock_ms;
}

static void keep(edgeguard_t *self, uint8_t type, uint8_t payload)
{
    self->kept_type = type;
    self->kept_payload = payload;
    self->kept_sequence = self->sequence;
    self->sequence++;
    self->sendings = 0U;
}

static uint32_t next_number(edgeguard_t *self)
{
    self->number++;
    return self->number;
}

static void keep_reply(edgeguard_t *self)
{
    const edgeguard_reply_t reply = {self->transaction, self->outcome, self->health.uptime_ms};
    keep(self, EDGEGUARD_TYPE_REPLY, (uint8_t)edgeguard_put_reply(&reply, &self->kept[EDGEGUARD_HEADER]));
    self->reply_waits = false;
}

/* How the last trial ended. The model that was on trial is the one that runs, or lies in the other slot. */
static void keep_confirm(edgeguard_t *self)
{
    edgeguard_record_t record;
    const edgeguard_content_t *content;
    edgeguard_transfer_confirm_t confirm;

    edgeguard_slots_record(&self->slots, &record);
    self->confirm_waits = false;
    content = (self->slots.standing == EDGEGUARD_STANDING_REVERTED) ? edgeguard_slots_incoming(&record)
                                                                    : edgeguard_slots_content(&self->slots, &record);
    confirm.number = next_number(self);
    confirm.file_digest = content->file_digest;
    confirm.sequence = content->sequence;
    confirm.standing = self->slots.standing;
    keep(self, EDGEGUARD_TYPE_TRANSFER_CONFIRM,
         (uint8_t)edgeguard_put_transfer_confirm(&confirm, &self->kept[EDGEGUARD_HEADER]));
}

static void keep_alert(edgeguard_t *self)
{
    edgeguard_alert_t alert;
    alert.number = next_number(self);
    alert.at_ms = wall(self, self->alert_at);
    alert.label = self->alert_label;
    alert.scores_count = self->guard->detectors;
    (void)memcpy(alert.scores, self->alert_scores, sizeof alert.scores);
    keep(self, EDGEGUARD_TYPE_ALERT, (uint8_t)edgeguard_put_alert(&alert, &self->kept[EDGEGUARD_HEADER]));
    self->alert_waits = false;
}

static void keep_report(edgeguard_t *self)
{
    edgeguard_window_t *const window = &self->window;
    window->report.number = next_number(self);
    window->report.started_ms = wall(self, self->window_at);
    window->report.ended_ms = wall(self, self->clock_ms);
    keep(self, EDGEGUARD_TYPE_REPORT, (uint8_t)edgeguard_put_report(&window->report, &self->kept[EDGEGUARD_HEADER]));
    edgeguard_window_clear(window);
    self->window_at = self->clock_ms;
    self->report_now = false;
}

/* -- time */

static bool since(const edgeguard_t *self, uint32_t then, uint32_t least)
{
    return (self->clock_ms - then) >= least;
}

static void tick(edgeguard_t *self)
{
    const uint32_t now = self->hal->clock_ms(self->hal->context);
    self->health.uptime_ms += (uint32_t)(now - self->clock_ms);
    self->clock_ms = now;
}

static void set_clock(edgeguard_t *self, uint64_t unix_ms)
{
    self->unix_ms = unix_ms - self->health.uptime_ms;
}

/* -- what the gateway says */

static void welcomed(edgeguard_t *self, const edgeguard_welcome_t *welcome)
{
    if (welcome->boot != self->boot) { /* meant for an earlier start, or from a gateway that does not know us yet */
        self->welcome = false;
        say_hello(self);
    } else if (welcome->schema != EDGEGUARD_SCHEMA) {
        self->welcome = false;
    } else {
        if (!self->welcome) {
            self->welcome = true;
            self->sendings = 0U; /* what waits has all its sendings again */
            self->sent_at = self->clock_ms - EDGEGUARD_REPEAT_MS;
            self->health_at = self->clock_ms - EDGEGUARD_HEARTBEAT_MS;
        }
        set_clock(self, welcome->unix_ms);
    }
}

/* What was kept is through, or has had all its sendings: if it was the reply to a restart, now is the time. */
static void replied(edgeguard_t *self)
{
    if (self->restart_after_reply && !self->reply_waits) {
        self->restart_now = true;
    }
}

static void acknowledged(edgeguard_t *self, uint16_t sequence)
{
    if ((self->kept_type != 0U) && (sequence == self->kept_sequence)) {
        replied(self);
        self->kept_type = 0U;
    }
}

static void commanded(edgeguard_t *self, const edgeguard_command_t *command, uint16_t sequence)
{
    if (!self->known || (self->transaction != command->transaction)) {
        if (self->reply_waits) { /* one at a time: the gateway comes again */
            return;
        }
        self->known = true;
        self->transaction = command->transaction;
        self->outcome = EDGEGUARD_OUTCOME_OK;
        if (command->order == EDGEGUARD_ORDER_RESTART) {
            self->restart_after_reply = true;
        } else if (command->order == EDGEGUARD_ORDER_REPORT) {
            self->report_now = true;
        } else {
            /* a ping: the reply is all */
        }
    }
    self->reply_waits = true;
    say_ack(self, sequence);
}

static void transfer(edgeguard_t *self, const edgeguard_frame_t *frame)
{
    edgeguard_transfer_begin_t begin;
    edgeguard_transfer_chunk_t chunk;
    edgeguard_transfer_end_t end;

    if ((frame->type == EDGEGUARD_TYPE_TRANSFER_BEGIN) &&
        edgeguard_get_transfer_begin(frame->payload, frame->size, &begin)) {
        edgeguard_slots_begin(&self->slots, &begin);
        say_status(self, begin.file_digest);
    } else if ((frame->type == EDGEGUARD_TYPE_TRANSFER_CHUNK) &&
               edgeguard_get_transfer_chunk(frame->payload, frame->size, &chunk)) {
        edgeguard_slots_chunk(&self->slots, chunk.offset, &frame->payload[chunk.data - frame->payload],
                              chunk.data_size);
        say_status(self, NULL);
    } else if ((frame->type == EDGEGUARD_TYPE_TRANSFER_END) &&
               edgeguard_get_transfer_end(frame->payload, frame->size, &end)) {
        edgeguard_slots_end(&self->slots, end.file_digest);
        say_status(self, end.file_digest);
    } else {
        /* no message of this schema */
    }
}

static void handle(edgeguard_t *self, const edgeguard_frame_t *frame)
{
    edgeguard_welcome_t welcome;
    edgeguard_ack_t ack;
    edgeguard_command_t command;
    edgeguard_clock_t clock;

    if ((frame->type == EDGEGUARD_TYPE_WELCOME) && edgeguard_get_welcome(frame->payload, frame->size, &welcome)) {
        self->heard_at = self->clock_ms;
        welcomed(self, &welcome);
        return;
    }
    if (!self->welcome || self->restart_now) {
        return;
    }
    self->heard_at = self->clock_ms;
    if ((frame->type == EDGEGUARD_TYPE_ACK) && edgeguard_get_ack(frame->payload, frame->size, &ack)) {
        acknowledged(self, ack.sequence);
    } else if ((frame->type == EDGEGUARD_TYPE_COMMAND) &&
               edgeguard_get_command(frame->payload, frame->size, &command)) {
        commanded(self, &command, frame->sequence);
    } else if ((frame->type == EDGEGUARD_TYPE_CLOCK) && edgeguard_get_clock(frame->payload, frame->size, &clock)) {
        set_clock(self, clock.unix_ms);
    } else {
        transfer(self, frame);
    }
}

void edgeguard_receive(edgeguard_t *self, const uint8_t *bytes, uint16_t size)
{
    edgeguard_frame_t frame;
    uint16_t i;

    tick(self);
    for (i = 0U; i < size; i++) {
        const edgeguard_decoded_t found = edgeguard_decode(&self->decoder, bytes[i], &frame);
        if (found == EDGEGUARD_FRAME) {
            handle(self, &frame);
        } else if (found == EDGEGUARD_DAMAGED) {
            self->health.damaged++;
        } else {
            /* not yet */
        }
    }
}

/* -- what the application calls */

bool edgeguard_init(edgeguard_t *self, const edgeguard_hal_t *hal, const edgeguard_guard_t *guard, const char *name,
                    const char *board, uint64_t boot)
{
    const uint32_t page = hal->page_bytes;
    const bool slots = (hal->slot_bytes == 0U) || ((page >= sizeof(edgeguard_record_t)) &&
                                                   (((page | hal->slot_bytes) & (page - 1U)) == 0U));
    if (!slots || (guard->detectors == 0U) || (guard->detectors > EDGEGUARD_DETECTORS)) {
        return false;
    }
    (void)memset(self, 0, sizeof *self);
    self->hal = hal;
    self->guard = guard;
    self->name = name;
    self->board = board;
    self->boot = boot;
    self->clock_ms = hal->clock_ms(hal->context);
    self->hello_at = self->clock_ms - EDGEGUARD_HELLO_MS;
    self->alert_at = self->clock_ms - EDGEGUARD_ALERT_MS;
    self->window_at = self->clock_ms;
    self->health.inference_us = EDGEGUARD_UNKNOWN;
    edgeguard_window_clear(&self->window);
    edgeguard_slots_open(&self->slots, hal, guard->content);
    self->confirm_waits = self->slots.standing == EDGEGUARD_STANDING_REVERTED;
    return true;
}

uint8_t edgeguard_running(const edgeguard_t *self)
{
    return self->slots.active;
}

bool edgeguard_on_trial(const edgeguard_t *self)
{
    return self->slots.standing == EDGEGUARD_STANDING_TRIAL;
}

void edgeguard_confirm(edgeguard_t *self, bool passed)
{
    if (edgeguard_on_trial(self)) {
        const bool written = edgeguard_slots_confirm(&self->slots, passed);
        self->confirm_waits = passed && written;
        self->restart_now = !passed || !written;
    }
}

static void alarm(edgeguard_t *self, const edgeguard_input_t *input)
{
    if (self->alert_waits || !since(self, self->alert_at, EDGEGUARD_ALERT_MS)) {
        self->health.alerts_lost++;
        return;
    }
    self->alert_waits = true;
    self->alert_at = self->clock_ms;
    self->alert_label = input->label;
    (void)memcpy(self->alert_scores, input->scores, self->guard->detectors * sizeof self->alert_scores[0]);
}

edgeguard_status_t edgeguard_observe(edgeguard_t *self, const edgeguard_input_t *input)
{
    int32_t joint;
    const edgeguard_status_t status = edgeguard_judge(self->guard, input, &joint);
    const bool described = self->slots.active == EDGEGUARD_BUILT_IN;
    bool counted;

    tick(self);
    self->health.inputs++;
    self->health.inference_us = input->inference_us;
    if (status == EDGEGUARD_NOT_CHECKED) {
        self->health.unchecked++;
    }
    counted = edgeguard_window_add(&self->window, self->guard, input, status, joint, described);
    if (!counted && (self->kept_type == 0U)) {
        keep_report(self);
        counted = edgeguard_window_add(&self->window, self->guard, input, status, joint, described);
    }
    if (!counted) {
        self->health.lost++;
    }
    if (status == EDGEGUARD_FLAGGED) {
        alarm(self, input);
    }
    return status;
}

static bool window_due(const edgeguard_t *self)
{
    return (self->window.inputs > 0U) &&
           (self->report_now || since(self, self->window_at, EDGEGUARD_WINDOW_MS));
}

static void pump(edgeguard_t *self)
{
    if (self->kept_type != 0U) {
        if ((self->sendings > 0U) && !since(self, self->sent_at, EDGEGUARD_REPEAT_MS)) {
            return;
        }
        if (self->sendings < EDGEGUARD_SENDINGS) {
            send_kept(self);
        } else {
            replied(self);
            self->welcome = false;
        }
        return;
    }
    if (self->reply_waits) {
        keep_reply(self);
    } else if (self->confirm_waits) {
        keep_confirm(self);
    } else if (self->alert_waits) {
        keep_alert(self);
    } else if (window_due(self)) {
        keep_report(self);
    } else {
        self->report_now = false;
        return;
    }
    send_kept(self);
}

bool edgeguard_poll(edgeguard_t *self)
{
    tick(self);
    if (self->welcome && since(self, self->heard_at, EDGEGUARD_SILENCE_MS)) {
        self->welcome = false;
    }
    if (self->welcome) {
        pump(self);
        if (since(self, self->health_at, EDGEGUARD_HEARTBEAT_MS)) {
            say_health(self);
        }
    } else if (since(self, self->hello_at, EDGEGUARD_HELLO_MS)) {
        say_hello(self);
    } else {
        /* the gateway has its time to answer */
    }
    if (edgeguard_slots_verify(&self->slots)) {
        say_status(self, NULL);
    }
    return self->restart_now || (self->restart_soon && since(self, self->restart_at, EDGEGUARD_RESTART_MS));
}
