/*
 * A WireGuard tunnel, without sockets, threads or clock. README.md of this crate is its manual.
 *
 * Written by cbindgen from the source; `make c-header` writes it anew.
 */

#ifndef WGSEP_TUNNEL_H
#define WGSEP_TUNNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 Bytes of a key in base64, with the zero byte at its end.
 */
#define WGSEP_KEY_BASE64_LEN 45

/*
 Bytes of a key in hexadecimal, with the zero byte at its end.
 */
#define WGSEP_KEY_HEX_LEN 65

/*
 Most bytes by which a datagram is longer than its packet.
 */
#define WGSEP_MAX_OVERHEAD 47

/*
 Bytes that hold the name of any cause of drops, with the zero byte at its end.
 */
#define WGSEP_CAUSE_LEN 64

/*
 The result of a call. Errors are negative, and a call that fails has no effect unless its description says so.
 */
typedef enum wgsep_status {
    /*
     Done.
     */
    WGSEP_OK = 0,
    /*
     Done, and there is nothing to return: no packet in the datagram, no datagram to send, no event, no timer.
     */
    WGSEP_NOTHING = 1,
    /*
     A pointer is NULL that must not be.
     */
    WGSEP_ERROR_NULL = -1,
    /*
     A length is impossible.
     */
    WGSEP_ERROR_LENGTH = -2,
    /*
     The buffer is too small; nothing was written to it.
     */
    WGSEP_ERROR_BUFFER_TOO_SMALL = -3,
    /*
     A text is no key, or a private key is all zeros.
     */
    WGSEP_ERROR_KEY = -4,
    /*
     An address is neither of IPv4 nor of IPv6.
     */
    WGSEP_ERROR_ADDRESS = -5,
    /*
     The peer has no endpoint.
     */
    WGSEP_ERROR_NO_ENDPOINT = -6,
    /*
     Less than five seconds have passed since the last message of a handshake.
     */
    WGSEP_ERROR_TOO_SOON = -7,
    /*
     The peer's public key is our own.
     */
    WGSEP_ERROR_OWN_KEY = -8,
    /*
     The packet or the datagram was dropped, and counted: `wgsep_tunnel_read_drops` has the causes.
     */
    WGSEP_ERROR_DROPPED = -9,
    /*
     A bug of the library, or a system without random numbers. Free the tunnel; every other call of it fails from now on.
     */
    WGSEP_ERROR_INTERNAL = -100,
} wgsep_status;

/*
 How far a tunnel is.
 */
typedef enum wgsep_state {
    /*
     There was no handshake yet, and none is under way.
     */
    WGSEP_STATE_IDLE = 0,
    /*
     A handshake is under way, and nothing can be sent before it completes.
     */
    WGSEP_STATE_HANDSHAKING = 1,
    /*
     There is a keypair to send with.
     */
    WGSEP_STATE_ESTABLISHED = 2,
    /*
     There was a handshake, and its keypair can send no more.
     */
    WGSEP_STATE_EXPIRED = 3,
} wgsep_state;

/*
 What happened to a tunnel.
 */
typedef enum wgsep_event_kind {
    /*
     Something that this version of the header has no name for.
     */
    WGSEP_EVENT_OTHER = 0,
    /*
     A handshake completed.
     */
    WGSEP_EVENT_HANDSHAKE_COMPLETE = 1,
    /*
     Three initiations in a row went unanswered; the last was sent to the address.
     */
    WGSEP_EVENT_HANDSHAKE_UNANSWERED = 2,
    /*
     The handshake was given up. The next packet starts another.
     */
    WGSEP_EVENT_HANDSHAKE_GIVEN_UP = 3,
    /*
     The peer used none of three responses: its preshared key differs, or they get lost.
     */
    WGSEP_EVENT_NEVER_CONFIRMED = 4,
    /*
     The peer's initiation was not newer than one before it: replayed, or its clock went back.
     */
    WGSEP_EVENT_INITIATION_REPLAYED = 5,
    /*
     An initiation from the address by another public key than the peer's.
     */
    WGSEP_EVENT_UNKNOWN_PEER = 6,
    /*
     A handshake message from the address for another public key than ours.
     */
    WGSEP_EVENT_INVALID_MAC = 7,
    /*
     A response that is not authentic, mostly because the preshared keys differ.
     */
    WGSEP_EVENT_RESPONSE_REFUSED = 8,
    /*
     The peer moved to the address.
     */
    WGSEP_EVENT_ENDPOINT_MOVED = 9,
    /*
     No handshake completed for nine minutes: the keypairs that were left were erased.
     */
    WGSEP_EVENT_SESSION_EXPIRED = 10,
    /*
     Too many handshake messages: from now on, senders have to prove their address.
     */
    WGSEP_EVENT_UNDER_LOAD = 11,
} wgsep_event_kind;

/*
 A tunnel to one peer. Threads may share it: each call waits for those before it.
 */
typedef struct wgsep_tunnel wgsep_tunnel;

/*
 A private key, a public key or a preshared key. A program erases its copies of those that are secret.
 */
typedef struct wgsep_key {
    /*
     Its bytes.
     */
    uint8_t bytes[32];
} wgsep_key;

/*
 Both clocks.
 */
typedef struct wgsep_now {
    /*
     Nanoseconds on a clock that never goes back, and counts while the machine is suspended, such as CLOCK_BOOTTIME
     on Linux. All calls of a tunnel must have it of one clock.
     */
    uint64_t monotonic;
    /*
     Nanoseconds since 1970-01-01 00:00:00 UTC.
     */
    uint64_t wall;
} wgsep_now;

/*
 An address of UDP.
 */
typedef struct wgsep_address {
    /*
     4 or 6.
     */
    uint8_t version;
    /*
     The IP address, in network byte order; of IPv4, the first four bytes.
     */
    uint8_t ip[16];
    /*
     The port, in the byte order of the machine.
     */
    uint16_t port;
    /*
     The interface of a link-local address of IPv6, as in `sin6_scope_id`; otherwise 0.
     */
    uint32_t scope_id;
} wgsep_address;

/*
 What a tunnel is created with. All bytes that a program does not set must be zero.
 */
typedef struct wgsep_config {
    /*
     The private key of this end.
     */
    struct wgsep_key private_key;
    /*
     The public key of the peer.
     */
    struct wgsep_key peer_public_key;
    /*
     The preshared key; all zeros for none.
     */
    struct wgsep_key preshared_key;
    /*
     Where the peer is. With version 0 the tunnel waits for the peer's initiation.
     */
    struct wgsep_address endpoint;
    /*
     Seconds between persistent keepalives; 0 for none.
     */
    uint16_t persistent_keepalive;
} wgsep_config;

/*
 Statistics of a tunnel, since it was created.
 */
typedef struct wgsep_statistics {
    /*
     How far it is.
     */
    enum wgsep_state state;
    /*
     Where the peer is; version 0 if that is not known yet.
     */
    struct wgsep_address endpoint;
    /*
     UDP payload bytes received and authenticated.
     */
    uint64_t rx_bytes;
    /*
     UDP payload bytes of the datagrams to send.
     */
    uint64_t tx_bytes;
    /*
     Authenticated datagrams received.
     */
    uint64_t rx_packets;
    /*
     Datagrams to send.
     */
    uint64_t tx_packets;
    /*
     When the last handshake completed, in nanoseconds since 1970-01-01 00:00:00 UTC; 0 if none did.
     */
    uint64_t latest_handshake;
    /*
     Nanoseconds from our last handshake message to the peer's answer, of the last complete handshake; 0 if unknown.
     */
    uint64_t round_trip;
    /*
     Initiations sent.
     */
    uint64_t initiations;
    /*
     Responses sent.
     */
    uint64_t responses;
    /*
     Handshakes that completed.
     */
    uint64_t completed;
    /*
     Handshakes that failed, of any cause.
     */
    uint64_t failed;
} wgsep_statistics;

/*
 Something that happened to a tunnel.
 */
typedef struct wgsep_event {
    /*
     What it was.
     */
    enum wgsep_event_kind kind;
    /*
     The address that is part of it; version 0 if none is.
     */
    struct wgsep_address address;
} wgsep_event;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Generates a private key.
 */
enum wgsep_status wgsep_key_generate_private(struct wgsep_key *key);

/*
 Generates a preshared key.
 */
enum wgsep_status wgsep_key_generate_preshared(struct wgsep_key *key);

/*
 Computes the public key of a private key. `WGSEP_ERROR_KEY` if that is all zeros.
 */
enum wgsep_status wgsep_key_public(const struct wgsep_key *private_key,
                                   struct wgsep_key *public_key);

/*
 Reads a key from a zero-terminated text, in base64 or hexadecimal. `WGSEP_ERROR_KEY` if it is none.

 # Safety

 `text` is NULL or ends with a zero byte.
 */
enum wgsep_status wgsep_key_from_text(const char *text, struct wgsep_key *key);

/*
 Writes a key in base64, with a zero byte at its end, to a buffer of at least `WGSEP_KEY_BASE64_LEN` bytes.

 # Safety

 `capacity` bytes at `text` may be written.
 */
enum wgsep_status wgsep_key_to_base64(const struct wgsep_key *key,
                                      char *text,
                                      size_t capacity);

/*
 Writes a key in hexadecimal, with a zero byte at its end, to a buffer of at least `WGSEP_KEY_HEX_LEN` bytes.

 # Safety

 `capacity` bytes at `text` may be written.
 */
enum wgsep_status wgsep_key_to_hex(const struct wgsep_key *key,
                                   char *text,
                                   size_t capacity);

/*
 Reads the clocks of the standard library into `now`, for a program that has none of its own. That clock does not count
 in suspend on Linux and macOS: peers are then silent for up to two minutes after a resume.
 */
enum wgsep_status wgsep_read_clocks(struct wgsep_now *now);

/*
 Creates a tunnel, which the caller frees with `wgsep_tunnel_free`. It sends nothing before the first packet, unless
 there is a persistent keepalive. `WGSEP_ERROR_KEY` if the private key is all zeros, `WGSEP_ERROR_OWN_KEY` if the
 public key belongs to it, `WGSEP_ERROR_ADDRESS` for an endpoint of a version that is not 0, 4 or 6.
 */
enum wgsep_status wgsep_tunnel_new(const struct wgsep_config *config,
                                   struct wgsep_now now,
                                   struct wgsep_tunnel **tunnel);

/*
 Frees a tunnel, and erases its keys. NULL is nothing to free.
 */
void wgsep_tunnel_free(struct wgsep_tunnel *tunnel);

/*
 Sends an IP packet. Datagrams come out of `wgsep_tunnel_poll_transmit`: one with the packet, or those of a handshake, for
 which the packet waits. `WGSEP_ERROR_DROPPED` if it is no IP packet.

 # Safety

 `len` bytes at `packet` are initialized.
 */
enum wgsep_status wgsep_tunnel_encapsulate(const struct wgsep_tunnel *tunnel,
                                           const uint8_t *packet,
                                           size_t len,
                                           struct wgsep_now now);

/*
 Sends an IP packet, sealed into a buffer of at least `len + WGSEP_MAX_OVERHEAD` bytes, which saves a copy. With `WGSEP_OK`
 the datagram has `datagram_len` bytes and goes to `destination`; with `WGSEP_NOTHING` the packet waits for a
 handshake. After either, `wgsep_tunnel_poll_transmit` may have datagrams to send.

 # Safety

 `len` bytes at `packet` are initialized, and so are `capacity` bytes at `datagram`, which is other memory.
 */
enum wgsep_status wgsep_tunnel_encapsulate_into(const struct wgsep_tunnel *tunnel,
                                                const uint8_t *packet,
                                                size_t len,
                                                uint8_t *datagram,
                                                size_t capacity,
                                                struct wgsep_now now,
                                                size_t *datagram_len,
                                                struct wgsep_address *destination);

/*
 Takes a datagram that came from `source`, decrypting it in place. With `WGSEP_OK` there was an IP packet in it,
 of `packet_len` bytes at `packet`, which is within the datagram; otherwise `packet` is NULL. `WGSEP_NOTHING` for a keepalive
 and for a message of a handshake, `WGSEP_ERROR_DROPPED` for a datagram that is not authentic or not of this tunnel.
 After any of these, `wgsep_tunnel_poll_transmit` may have datagrams to send.

 # Safety

 `len` bytes at `datagram` are initialized, and no other thread uses them.
 */
enum wgsep_status wgsep_tunnel_decapsulate(const struct wgsep_tunnel *tunnel,
                                           const struct wgsep_address *source,
                                           uint8_t *datagram,
                                           size_t len,
                                           struct wgsep_now now,
                                           const uint8_t **packet,
                                           size_t *packet_len);

/*
 Copies the next datagram to send to a buffer, its length to `len` and its destination to `destination`. `WGSEP_NOTHING` if
 there is none. If the buffer is too small, `len` is what the datagram needs, and the next call returns it again; 65,535
 bytes hold any.

 # Safety

 `capacity` bytes at `datagram` may be written.
 */
enum wgsep_status wgsep_tunnel_poll_transmit(const struct wgsep_tunnel *tunnel,
                                             uint8_t *datagram,
                                             size_t capacity,
                                             size_t *len,
                                             struct wgsep_address *destination);

/*
 Writes when `wgsep_tunnel_handle_timeout` is due to `at`, in nanoseconds of the monotonic clock. `WGSEP_NOTHING` if no
 timer is pending; another call may start one.
 */
enum wgsep_status wgsep_tunnel_next_timeout(const struct wgsep_tunnel *tunnel,
                                            uint64_t *at);

/*
 Expires the timers that are due. `wgsep_tunnel_poll_transmit` may have datagrams to send afterwards.
 */
enum wgsep_status wgsep_tunnel_handle_timeout(const struct wgsep_tunnel *tunnel,
                                              struct wgsep_now now);

/*
 Sets the seconds between persistent keepalives; 0 for none.
 */
enum wgsep_status wgsep_tunnel_set_persistent_keepalive(const struct wgsep_tunnel *tunnel,
                                                        uint16_t seconds,
                                                        struct wgsep_now now);

/*
 Sets the MTU of the packets inside, in bytes, which bounds their padding; 0, as at first, is no bound. It is the MTU of the
 path less 60 over IPv4 and less 80 over IPv6, so usually 1420.
 */
enum wgsep_status wgsep_tunnel_set_mtu(const struct wgsep_tunnel *tunnel,
                                       uint32_t mtu);

/*
 Drops every keypair and handshake, and starts anew: for a virtual machine that was cloned or restored from a snapshot,
 another copy of which may use the same keys with the same nonces.
 */
enum wgsep_status wgsep_tunnel_vm_notification(const struct wgsep_tunnel *tunnel,
                                               struct wgsep_now now);

/*
 Sets where the peer is. Until it sends from another address.
 */
enum wgsep_status wgsep_tunnel_set_endpoint(const struct wgsep_tunnel *tunnel,
                                            const struct wgsep_address *endpoint,
                                            struct wgsep_now now);

/*
 Sets the preshared key, of which all zeros is none. The next handshake has it.
 */
enum wgsep_status wgsep_tunnel_set_preshared_key(const struct wgsep_tunnel *tunnel,
                                                 const struct wgsep_key *key,
                                                 struct wgsep_now now);

/*
 Starts a handshake that no packet waits for. `WGSEP_ERROR_NO_ENDPOINT` if the peer's address is not known, and
 `WGSEP_ERROR_TOO_SOON` within five seconds of the last message of a handshake.
 */
enum wgsep_status wgsep_tunnel_start_handshake(const struct wgsep_tunnel *tunnel,
                                               struct wgsep_now now);

/*
 Reads the statistics of a tunnel.
 */
enum wgsep_status wgsep_tunnel_read_statistics(const struct wgsep_tunnel *tunnel,
                                               struct wgsep_now now,
                                               struct wgsep_statistics *statistics);

/*
 Reads how many packets and datagrams were dropped of the cause of a number, from 0 on, and writes the name of the cause to a
 buffer; `WGSEP_CAUSE_LEN` bytes hold any. `WGSEP_NOTHING` behind the last cause.

 # Safety

 `capacity` bytes at `name` may be written.
 */
enum wgsep_status wgsep_tunnel_read_drops(const struct wgsep_tunnel *tunnel,
                                          size_t number,
                                          char *name,
                                          size_t capacity,
                                          uint64_t *count);

/*
 Reads the next event. `WGSEP_NOTHING` if there is none. At most 256 are kept; the oldest are dropped first.
 */
enum wgsep_status wgsep_tunnel_poll_event(const struct wgsep_tunnel *tunnel,
                                          struct wgsep_event *event);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* WGSEP_TUNNEL_H */
