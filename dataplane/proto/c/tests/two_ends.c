/* A tunnel of two ends in memory: a handshake, a packet each way, a re-key, and every wrong argument that can be checked. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wgsep_tunnel.h"

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

static const uint64_t SECOND = 1000000000;

struct end {
    wgsep_tunnel *tunnel;
    wgsep_address address;
};

static wgsep_now at(uint64_t seconds)
{
    wgsep_now now = { (1 + seconds) * SECOND, (1800000000 + seconds) * SECOND };
    return now;
}

/* Hands each datagram of `from` to `to`, whose memory is of just its length, so that any access beyond is an error.
 * Returns the length of the last packet that came out, which is copied to `packet`. */
static size_t carry(struct end *from, struct end *to, wgsep_now now, uint8_t *packet, unsigned *datagrams)
{
    uint8_t *buffer = malloc(65535);
    size_t len, received = 0;
    wgsep_address destination;
    wgsep_status status;

    CHECK(buffer);
    while ((status = wgsep_tunnel_poll_transmit(from->tunnel, buffer, 65535, &len, &destination)) == WGSEP_OK) {
        uint8_t *datagram = malloc(len);
        const uint8_t *inside;
        size_t inside_len;

        CHECK(datagram);
        CHECK(destination.port == to->address.port);
        memcpy(datagram, buffer, len);
        ++*datagrams;
        status = wgsep_tunnel_decapsulate(to->tunnel, &from->address, datagram, len, now, &inside, &inside_len);
        if (status == WGSEP_OK) {
            CHECK(inside >= datagram && inside + inside_len <= datagram + len);
            memcpy(packet, inside, inside_len);
            received = inside_len;
        } else {
            CHECK((status == WGSEP_NOTHING || status == WGSEP_ERROR_DROPPED) && !inside && !inside_len);
        }
        free(datagram);
    }
    CHECK(status == WGSEP_NOTHING);
    free(buffer);
    return received;
}

/* Sends a packet of `payload`, and checks that it comes out at the other end; returns the number of datagrams. */
static unsigned send_packet(struct end *from, struct end *to, wgsep_now now, const char *payload)
{
    uint8_t received[2048];
    size_t len = 20 + strlen(payload), got = 0;
    uint8_t *packet = calloc(1, len);
    unsigned datagrams = 0, round;

    CHECK(packet);
    packet[0] = 0x45;
    packet[3] = (uint8_t)len;
    memcpy(packet + 20, payload, len - 20);
    CHECK(wgsep_tunnel_encapsulate(from->tunnel, packet, len, now) == WGSEP_OK);
    for (round = 0; round < 4 && !got; round++) {
        got = carry(from, to, now, received, &datagrams);
        carry(to, from, now, received + 1024, &datagrams);
    }
    CHECK(got == len && !memcmp(received, packet, len));
    free(packet);
    return datagrams;
}

static void keys(wgsep_key privates[2], wgsep_key publics[2])
{
    wgsep_key again;
    char text[WGSEP_KEY_HEX_LEN];
    int i;

    for (i = 0; i < 2; i++) {
        CHECK(wgsep_key_generate_private(&privates[i]) == WGSEP_OK);
        CHECK(wgsep_key_public(&privates[i], &publics[i]) == WGSEP_OK);
        CHECK(wgsep_key_to_base64(&publics[i], text, WGSEP_KEY_BASE64_LEN) == WGSEP_OK);
        CHECK(strlen(text) == 44 && text[43] == '=');
        CHECK(wgsep_key_from_text(text, &again) == WGSEP_OK);
        CHECK(!memcmp(&again, &publics[i], sizeof again));
        CHECK(wgsep_key_to_hex(&publics[i], text, sizeof text) == WGSEP_OK);
        CHECK(strlen(text) == 64);
        CHECK(wgsep_key_from_text(text, &again) == WGSEP_OK);
        CHECK(!memcmp(&again, &publics[i], sizeof again));
    }
    CHECK(memcmp(&privates[0], &privates[1], sizeof privates[0]));
    CHECK(wgsep_key_generate_preshared(&again) == WGSEP_OK);
}

static void wrong_keys(void)
{
    wgsep_key key, zero = { { 0 } };
    char *text = malloc(WGSEP_KEY_HEX_LEN);

    CHECK(text);
    CHECK(wgsep_key_generate_private(NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_generate_preshared(NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_public(NULL, &key) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_public(&zero, NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_public(&zero, &key) == WGSEP_ERROR_KEY);
    CHECK(wgsep_key_from_text(NULL, &key) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_from_text("", NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_from_text("", &key) == WGSEP_ERROR_KEY);
    CHECK(wgsep_key_from_text("no key", &key) == WGSEP_ERROR_KEY);
    CHECK(wgsep_key_from_text("\xff\xfe", &key) == WGSEP_ERROR_KEY);
    CHECK(wgsep_key_to_base64(NULL, text, WGSEP_KEY_HEX_LEN) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_to_base64(&zero, NULL, WGSEP_KEY_HEX_LEN) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_to_base64(&zero, NULL, 0) == WGSEP_ERROR_NULL);
    CHECK(wgsep_key_to_base64(&zero, text, 0) == WGSEP_ERROR_BUFFER_TOO_SMALL);
    CHECK(wgsep_key_to_base64(&zero, text, WGSEP_KEY_BASE64_LEN - 1) == WGSEP_ERROR_BUFFER_TOO_SMALL);
    CHECK(wgsep_key_to_hex(&zero, text, WGSEP_KEY_HEX_LEN - 1) == WGSEP_ERROR_BUFFER_TOO_SMALL);
    CHECK(wgsep_key_to_hex(&zero, text, WGSEP_KEY_HEX_LEN) == WGSEP_OK);
    free(text);
}

static void wrong_arguments(struct end *end, const wgsep_config *config)
{
    wgsep_tunnel *tunnel = end->tunnel;
    wgsep_config wrong;
    wgsep_address address = { 0 };
    const uint8_t *inside;
    uint8_t byte = 0, room[1 + WGSEP_MAX_OVERHEAD] = { 0 };
    char name[WGSEP_CAUSE_LEN];
    size_t len, number;
    uint64_t due, count, drops = 0;
    wgsep_event event;
    wgsep_statistics statistics;
    wgsep_now now = at(0);

    CHECK(wgsep_tunnel_new(NULL, now, &tunnel) == WGSEP_ERROR_NULL && !tunnel);
    CHECK(wgsep_tunnel_new(config, now, NULL) == WGSEP_ERROR_NULL);
    wrong = *config;
    memset(&wrong.private_key, 0, sizeof wrong.private_key);
    CHECK(wgsep_tunnel_new(&wrong, now, &tunnel) == WGSEP_ERROR_KEY && !tunnel);
    wrong = *config;
    CHECK(wgsep_key_public(&wrong.private_key, &wrong.peer_public_key) == WGSEP_OK);
    CHECK(wgsep_tunnel_new(&wrong, now, &tunnel) == WGSEP_ERROR_OWN_KEY && !tunnel);
    wrong = *config;
    wrong.endpoint.version = 5;
    CHECK(wgsep_tunnel_new(&wrong, now, &tunnel) == WGSEP_ERROR_ADDRESS && !tunnel);
    wgsep_tunnel_free(NULL);

    tunnel = end->tunnel;
    CHECK(wgsep_tunnel_encapsulate(NULL, &byte, 1, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_encapsulate(tunnel, NULL, 1, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_encapsulate(tunnel, &byte, SIZE_MAX, now) == WGSEP_ERROR_LENGTH);
    CHECK(wgsep_tunnel_decapsulate(NULL, &end->address, &byte, 1, now, &inside, &len) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_decapsulate(tunnel, NULL, &byte, 1, now, &inside, &len) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_decapsulate(tunnel, &end->address, NULL, 1, now, &inside, &len) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_decapsulate(tunnel, &end->address, &byte, 1, now, NULL, &len) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_decapsulate(tunnel, &end->address, &byte, 1, now, &inside, NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_decapsulate(tunnel, &end->address, &byte, SIZE_MAX, now, &inside, &len) == WGSEP_ERROR_LENGTH);
    CHECK(wgsep_tunnel_decapsulate(tunnel, &address, &byte, 1, now, &inside, &len) == WGSEP_ERROR_ADDRESS);
    CHECK(wgsep_tunnel_poll_transmit(NULL, &byte, 1, &len, &address) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_poll_transmit(tunnel, &byte, 1, NULL, &address) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_poll_transmit(tunnel, &byte, 1, &len, NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_next_timeout(NULL, &due) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_next_timeout(tunnel, NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_handle_timeout(NULL, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_set_persistent_keepalive(NULL, 1, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_set_mtu(NULL, 1420) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_vm_notification(NULL, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_encapsulate(tunnel, &byte, 1, now) == WGSEP_ERROR_DROPPED);
    CHECK(wgsep_tunnel_decapsulate(tunnel, &end->address, &byte, 1, now, &inside, &len) == WGSEP_ERROR_DROPPED);
    CHECK(wgsep_tunnel_encapsulate_into(NULL, &byte, 1, room, sizeof room, now, &len, &address) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_encapsulate_into(tunnel, NULL, 1, room, sizeof room, now, &len, &address) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_encapsulate_into(tunnel, &byte, 1, NULL, 48, now, &len, &address) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_encapsulate_into(tunnel, &byte, 1, room, sizeof room, now, NULL, &address) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_encapsulate_into(tunnel, &byte, 1, room, sizeof room, now, &len, NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_encapsulate_into(tunnel, &byte, SIZE_MAX, room, sizeof room, now, &len, &address) ==
          WGSEP_ERROR_LENGTH);
    CHECK(wgsep_tunnel_encapsulate_into(tunnel, &byte, 1, room, sizeof room - 1, now, &len, &address) ==
          WGSEP_ERROR_BUFFER_TOO_SMALL);
    CHECK(wgsep_tunnel_encapsulate_into(tunnel, &byte, 1, room, sizeof room, now, &len, &address) ==
          WGSEP_ERROR_DROPPED);
    CHECK(wgsep_tunnel_read_drops(NULL, 0, name, sizeof name, &count) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_read_drops(tunnel, 0, NULL, sizeof name, &count) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_read_drops(tunnel, 0, name, sizeof name, NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_read_drops(tunnel, 0, name, 1, &count) == WGSEP_ERROR_BUFFER_TOO_SMALL);
    for (number = 0; wgsep_tunnel_read_drops(tunnel, number, name, sizeof name, &count) == WGSEP_OK; number++)
        drops += count;
    CHECK(drops == 3 && number > 10);
    CHECK(wgsep_tunnel_set_endpoint(NULL, &end->address, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_set_endpoint(tunnel, NULL, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_set_endpoint(tunnel, &address, now) == WGSEP_ERROR_ADDRESS);
    CHECK(wgsep_tunnel_set_preshared_key(NULL, &wrong.private_key, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_set_preshared_key(tunnel, NULL, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_start_handshake(NULL, now) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_read_statistics(NULL, now, &statistics) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_read_statistics(tunnel, now, NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_poll_event(NULL, &event) == WGSEP_ERROR_NULL);
    CHECK(wgsep_tunnel_poll_event(tunnel, NULL) == WGSEP_ERROR_NULL);
    CHECK(wgsep_read_clocks(NULL) == WGSEP_ERROR_NULL);
}

/* A datagram stays when the buffer is too small for it. */
static void small_buffer(struct end *from)
{
    uint8_t packet[21] = { 0x45, 0, 0, 21 }, byte, buffer[148];
    size_t len;
    wgsep_address destination;

    CHECK(wgsep_tunnel_encapsulate(from->tunnel, packet, sizeof packet, at(0)) == WGSEP_OK);
    CHECK(wgsep_tunnel_poll_transmit(from->tunnel, &byte, 1, &len, &destination) == WGSEP_ERROR_BUFFER_TOO_SMALL);
    CHECK(len == sizeof buffer);
    CHECK(wgsep_tunnel_poll_transmit(from->tunnel, NULL, 0, &len, &destination) == WGSEP_ERROR_NULL);
    CHECK(len == sizeof buffer);
    CHECK(wgsep_tunnel_poll_transmit(from->tunnel, buffer, len, &len, &destination) == WGSEP_OK);
    CHECK(buffer[0] == 1 && destination.version == 4);
    CHECK(wgsep_tunnel_poll_transmit(from->tunnel, buffer, sizeof buffer, &len, &destination) == WGSEP_NOTHING);
}

/* A packet that is sealed into memory of the caller comes out at the other end. */
static void without_copy(struct end *from, struct end *to, wgsep_now now)
{
    uint8_t packet[40] = { 0x45, 0, 0, 40 };
    uint8_t *datagram = calloc(1, sizeof packet + WGSEP_MAX_OVERHEAD);
    const uint8_t *inside;
    size_t len, inside_len;
    wgsep_address destination;

    CHECK(datagram);
    CHECK(wgsep_tunnel_encapsulate_into(from->tunnel, packet, sizeof packet, datagram,
                                        sizeof packet + WGSEP_MAX_OVERHEAD, now, &len, &destination) == WGSEP_OK);
    CHECK(len > sizeof packet && destination.port == to->address.port);
    CHECK(wgsep_tunnel_decapsulate(to->tunnel, &from->address, datagram, len, now, &inside, &inside_len) == WGSEP_OK);
    CHECK(inside_len == sizeof packet && !memcmp(inside, packet, sizeof packet));
    free(datagram);
}

/* A packet is padded to 16 bytes, but not beyond the MTU. */
static void padding(struct end *from, struct end *to, wgsep_now now)
{
    uint8_t packet[41] = { 0x45, 0, 0, 41 }, datagram[41 + WGSEP_MAX_OVERHEAD] = { 0 };
    size_t len;
    wgsep_address destination;
    const uint32_t mtus[] = { 1420, 41, 0 };
    const size_t lens[] = { 48 + 32, 41 + 32, 48 + 32 };
    int i;

    for (i = 0; i < 3; i++) {
        CHECK(wgsep_tunnel_set_mtu(from->tunnel, mtus[i]) == WGSEP_OK);
        CHECK(wgsep_tunnel_encapsulate_into(from->tunnel, packet, sizeof packet, datagram, sizeof datagram, now, &len,
                                            &destination) == WGSEP_OK);
        CHECK(len == lens[i] && destination.port == to->address.port);
    }
}

/* Reads events until one of a kind, and returns it. */
static wgsep_event until_event(const struct end *end, wgsep_event_kind kind)
{
    wgsep_event event;

    do {
        CHECK(wgsep_tunnel_poll_event(end->tunnel, &event) == WGSEP_OK);
    } while (event.kind != kind);
    return event;
}

/* Both ends have the same statistics, each from its side. */
static void check_statistics(struct end ends[2], wgsep_now now)
{
    wgsep_statistics statistics[2];
    int i;

    for (i = 0; i < 2; i++) {
        CHECK(wgsep_tunnel_read_statistics(ends[i].tunnel, now, &statistics[i]) == WGSEP_OK);
        CHECK(statistics[i].state == WGSEP_STATE_ESTABLISHED);
        CHECK(statistics[i].completed == 1 && statistics[i].failed == 0);
        CHECK(statistics[i].endpoint.port == ends[1 - i].address.port);
        CHECK(statistics[i].latest_handshake >= at(0).wall);
    }
    CHECK(statistics[0].initiations == 1 && statistics[1].responses == 1);
    CHECK(statistics[0].tx_bytes && statistics[0].tx_bytes == statistics[1].rx_bytes);
    CHECK(statistics[1].tx_bytes && statistics[1].tx_bytes == statistics[0].rx_bytes);
    CHECK(statistics[0].tx_packets == statistics[1].rx_packets);
}

/* An end whose preshared key differs refuses the response; one that has moved is found. */
static void changes(struct end ends[2], const wgsep_config *config)
{
    uint8_t packet[2048];
    unsigned datagrams = 0;
    wgsep_key zero = { { 0 } };
    wgsep_address there = ends[1].address;

    CHECK(wgsep_tunnel_set_preshared_key(ends[0].tunnel, &zero, at(200)) == WGSEP_OK);
    CHECK(wgsep_tunnel_start_handshake(ends[0].tunnel, at(200)) == WGSEP_OK);
    CHECK(wgsep_tunnel_start_handshake(ends[0].tunnel, at(201)) == WGSEP_ERROR_TOO_SOON);
    carry(&ends[0], &ends[1], at(200), packet, &datagrams);
    carry(&ends[1], &ends[0], at(200), packet, &datagrams);
    until_event(&ends[0], WGSEP_EVENT_RESPONSE_REFUSED);
    CHECK(wgsep_tunnel_set_preshared_key(ends[0].tunnel, &config->preshared_key, at(200)) == WGSEP_OK);

    ends[1].address.port = 1;
    CHECK(wgsep_tunnel_set_endpoint(ends[0].tunnel, &ends[1].address, at(210)) == WGSEP_OK);
    CHECK(wgsep_tunnel_start_handshake(ends[0].tunnel, at(210)) == WGSEP_OK);
    carry(&ends[0], &ends[1], at(210), packet, &datagrams);
    ends[1].address = there;
    carry(&ends[1], &ends[0], at(210), packet, &datagrams);
    CHECK(until_event(&ends[0], WGSEP_EVENT_ENDPOINT_MOVED).address.port == there.port);
    until_event(&ends[0], WGSEP_EVENT_HANDSHAKE_COMPLETE);
}

/* A copy of a virtual machine sends nothing with the keys that it has. */
static void copied(struct end ends[2], wgsep_now now)
{
    wgsep_statistics statistics;

    CHECK(wgsep_tunnel_read_statistics(ends[0].tunnel, now, &statistics) == WGSEP_OK);
    CHECK(statistics.state == WGSEP_STATE_ESTABLISHED);
    CHECK(wgsep_tunnel_vm_notification(ends[0].tunnel, now) == WGSEP_OK);
    CHECK(wgsep_tunnel_read_statistics(ends[0].tunnel, now, &statistics) == WGSEP_OK);
    CHECK(statistics.state != WGSEP_STATE_ESTABLISHED);
    send_packet(&ends[0], &ends[1], now, "a copy");
}

/* A tunnel that waits for its peer starts nothing by itself. */
static void without_endpoint(const wgsep_config *config)
{
    wgsep_config waiting = *config;
    struct end end;
    uint64_t due;
    wgsep_event event;

    memset(&waiting.endpoint, 0, sizeof waiting.endpoint);
    CHECK(wgsep_tunnel_new(&waiting, at(0), &end.tunnel) == WGSEP_OK);
    CHECK(wgsep_tunnel_start_handshake(end.tunnel, at(0)) == WGSEP_ERROR_NO_ENDPOINT);
    CHECK(wgsep_tunnel_next_timeout(end.tunnel, &due) == WGSEP_NOTHING);
    CHECK(wgsep_tunnel_poll_event(end.tunnel, &event) == WGSEP_NOTHING);
    wgsep_tunnel_free(end.tunnel);
}

int main(void)
{
    wgsep_key privates[2], publics[2];
    struct end ends[2];
    wgsep_config configs[2];
    wgsep_now now;
    uint64_t due;
    int i;

    keys(privates, publics);
    wrong_keys();
    memset(configs, 0, sizeof configs);
    for (i = 0; i < 2; i++) {
        wgsep_address address = { .version = 4, .ip = { 192, 0, 2, 1 }, .port = (uint16_t)(51820 + i) };
        ends[i].address = address;
        configs[i].private_key = privates[i];
        configs[i].peer_public_key = publics[1 - i];
        configs[i].preshared_key = privates[0];
        configs[1 - i].endpoint = address;
    }
    for (i = 0; i < 2; i++)
        CHECK(wgsep_tunnel_new(&configs[i], at(0), &ends[i].tunnel) == WGSEP_OK);
    wrong_arguments(&ends[0], &configs[0]);
    CHECK(wgsep_read_clocks(&now) == WGSEP_OK && now.monotonic && now.wall);

    /* A handshake comes first: an initiation, a response, and the packet. */
    CHECK(send_packet(&ends[0], &ends[1], at(0), "hello") == 3);
    CHECK(send_packet(&ends[1], &ends[0], at(1), "hello to you") == 1);
    without_copy(&ends[0], &ends[1], at(1));
    check_statistics(ends, at(1));
    for (i = 0; i < 2; i++)
        until_event(&ends[i], WGSEP_EVENT_HANDSHAKE_COMPLETE);
    CHECK(wgsep_tunnel_next_timeout(ends[0].tunnel, &due) == WGSEP_OK && due > at(0).monotonic);
    /* After two minutes the keypair is replaced, with the next packet. */
    for (i = 0; i < 2; i++)
        CHECK(wgsep_tunnel_handle_timeout(ends[i].tunnel, at(130)) == WGSEP_OK);
    send_packet(&ends[0], &ends[1], at(130), "still there?");
    CHECK(wgsep_tunnel_set_persistent_keepalive(ends[0].tunnel, 25, at(131)) == WGSEP_OK);
    padding(&ends[0], &ends[1], at(131));
    changes(ends, &configs[0]);
    copied(ends, at(220));
    for (i = 0; i < 2; i++)
        wgsep_tunnel_free(ends[i].tunnel);

    CHECK(wgsep_tunnel_new(&configs[0], at(0), &ends[0].tunnel) == WGSEP_OK);
    small_buffer(&ends[0]);
    wgsep_tunnel_free(ends[0].tunnel);
    without_endpoint(&configs[0]);
    puts("two ends agree");
    return 0;
}
