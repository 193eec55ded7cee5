//! The packet path on one thread, for a library or a simulation.
//!
//! The daemon's workers call the same functions, on several threads and in batches.

use crate::data_path::DropCause;
use crate::device::{Device, Transmit};
use crate::ip::{Ecn, InnerPacket};
use crate::messages::TAG_LEN;
use crate::messages::{Message, TRANSPORT_HEADER_LEN, TransportHeader};
use crate::peer::{Endpoint, Peer};
use crate::receive::Received;
use crate::send::{NonceReservation, seal};
use crate::time::Now;
use std::sync::Arc;

impl Device {
    /// Sends a packet from the TUN side: datagrams come out of [`Device::poll_transmit`], now or
    /// when a handshake has completed.
    pub fn encapsulate(&mut self, packet: &[u8], now: Now) {
        let data_path = Arc::clone(self.data_path());
        let allowed_ips = data_path.allowed_ips.reader();
        if let Ok((peer, inner)) = data_path.route(allowed_ips.value(), packet) {
            let packet = packet.get(..inner.len).unwrap_or(packet);
            let reservation = data_path
                .reserve_nonces(peer, 1, now.instant, |staged| staged.stage_packet(packet));
            if let Some(reservation) = reservation {
                self.send_reserved(peer, &reservation, Some((packet, inner.ecn)));
            }
        }
        self.flush(now);
    }

    /// Takes a datagram from the network, decrypting in place; returns the packet for the TUN side.
    pub fn decapsulate<'d>(
        &mut self,
        source: Endpoint,
        ecn: Ecn,
        datagram: &'d mut [u8],
        now: Now,
    ) -> Option<&'d [u8]> {
        let packet = match Message::parse(datagram) {
            Some(Message::Transport(header)) => {
                let sealed = datagram.get_mut(TRANSPORT_HEADER_LEN..)?;
                self.open(header, source, ecn, sealed, now)
            }
            Some(_) => {
                self.receive_handshake(source, datagram, 0, now);
                None
            }
            None => {
                self.data_path().drops.add(DropCause::InboundMalformed, 1);
                None
            }
        };
        self.flush(now);
        packet
    }

    /// Expires timers and sends what they cause; see [`Device::next_timeout`].
    pub fn advance(&mut self, now: Now) {
        self.handle_timeout(now);
        self.flush(now);
    }

    fn open<'d>(
        &self,
        header: TransportHeader,
        endpoint: Endpoint,
        ecn: Ecn,
        sealed: &'d mut [u8],
        now: Now,
    ) -> Option<&'d [u8]> {
        let data_path = self.data_path();
        let Some((peer, keypair)) = data_path.index_table.lookup_keypair(header.receiver_index)
        else {
            data_path.drops.add(DropCause::UnknownIndex, 1);
            return None;
        };
        if let Err(error) = keypair.open(header.counter, sealed, now.instant) {
            data_path.drops.add(error.into(), 1);
            return None;
        }
        let plaintext = sealed.len().checked_sub(TAG_LEN).and_then(|len| sealed.get_mut(..len))?;
        let received =
            Received { peer: &peer, keypair: &keypair, counter: header.counter, endpoint, ecn };
        let allowed_ips = data_path.allowed_ips.reader();
        data_path
            .accept(&received, allowed_ips.value(), plaintext, now.instant)
            .map(|packet| &*packet)
    }

    /// Handles the events of the packet path, and sends the staged packets that have a keypair now.
    pub fn flush(&mut self, now: Now) {
        self.handle_dirty_peers(now);
        while let Some(peer) = self.poll_flush() {
            let reservation = self.data_path().reserve_nonces(&peer, 0, now.instant, |_| 0);
            if let Some(reservation) = reservation {
                self.send_reserved(&peer, &reservation, None);
            }
            self.handle_dirty_peers(now);
        }
    }

    fn send_reserved(
        &mut self,
        peer: &Peer,
        reservation: &NonceReservation,
        last: Option<(&[u8], Ecn)>,
    ) {
        let data_path = Arc::clone(self.data_path());
        let staged = reservation.staged.iter().map(|packet| {
            let ecn = InnerPacket::parse(packet).map_or(Ecn::NOT_CAPABLE, |inner| inner.ecn);
            (packet.as_slice(), ecn)
        });
        for (counter, (packet, ecn)) in (reservation.first_counter..).zip(staged.chain(last)) {
            let mut datagram = vec![0; data_path.datagram_len(packet)];
            if let Some(destination) =
                datagram.get_mut(TRANSPORT_HEADER_LEN..TRANSPORT_HEADER_LEN + packet.len())
            {
                destination.copy_from_slice(packet);
            }
            if seal(&reservation.keypair, counter, &mut datagram, packet.len()) {
                peer.add_tx_bytes(u64::try_from(datagram.len()).unwrap_or(0));
                self.push_transmit(Transmit {
                    endpoint: reservation.endpoint,
                    traffic_class: ecn.encapsulated().bits(),
                    datagram,
                    peer: Some(peer.id()),
                });
            } else {
                data_path.drops.add(DropCause::SendTooLong, 1);
            }
        }
    }
}
