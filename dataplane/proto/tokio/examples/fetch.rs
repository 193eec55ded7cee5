//! Fetches a page through a tunnel, as curl would, without any privilege: TCP is smoltcp's, in the program.
//!
//! ```text
//! fetch FILE http://ADDRESS[:PORT]/PATH
//! ```
//!
//! FILE is one for wg-quick(8). The page goes to stdout.

mod common;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr};
use std::collections::VecDeque;
use std::error::Error;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use wgsep_tokio::proto::{Random, SystemRandom};
use wgsep_tokio::{MAX_DATAGRAM, UdpDevice};

/// Bytes of each buffer of the connection.
const WINDOW: usize = 65_535;
/// A connection on which nothing comes for so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    common::exit(run().await)
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let tunnel = common::read(1)?;
    let url = common::argument(2, "http://ADDRESS[:PORT]/PATH")?;
    let (server, host, path) = parse(&url)?;
    let mut udp = UdpDevice::bind(tunnel.configuration, tunnel.bind).await?;
    udp.set_mtu(common::MTU.into());
    let mut stack = Stack::new(&tunnel.addresses)?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n");
    let response = stack.exchange(&mut udp, server, request.as_bytes()).await?;

    let end = response.windows(4).position(|window| window == b"\r\n\r\n");
    let (head, body) = response.split_at(end.ok_or("the response has no end of its header")? + 4);
    let head = String::from_utf8_lossy(head);
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(format!("{server} answers: {status}").into());
    }
    std::io::stdout().write_all(body)?;
    Ok(())
}

/// Server, host and path of a URL.
fn parse(url: &str) -> Result<(SocketAddr, &str, String), Box<dyn Error>> {
    let rest = url.strip_prefix("http://").ok_or("the URL must begin with http://")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let with_port: Result<SocketAddr, _> = host.parse();
    let alone = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let server = with_port.or_else(|_| alone.map(|address| SocketAddr::new(address, 80)));
    let server = server.map_err(|_| format!("{host} is no address; names are not looked up"))?;
    Ok((server, host, format!("/{path}")))
}

/// TCP and IP, with queues of packets for an interface.
struct Stack {
    interface: Interface,
    queues: Queues,
    sockets: SocketSet<'static>,
    connection: SocketHandle,
}

impl Stack {
    fn new(addresses: &[(IpAddr, u8)]) -> Result<Self, Box<dyn Error>> {
        let (mut config, mut seed) = (Config::new(HardwareAddress::Ip), [0; 8]);
        SystemRandom.fill(&mut seed);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut queues = Queues::default();
        let mut interface = Interface::new(config, &mut queues, Instant::now());
        let mut all_fit = true;
        interface.update_ip_addrs(|list| {
            for (address, cidr) in addresses {
                all_fit &= list.push(IpCidr::new((*address).into(), *cidr)).is_ok();
            }
        });
        if !all_fit {
            return Err("more addresses than the TCP stack takes".into());
        }
        // The tunnel is a link without neighbours: any gateway is as good as another.
        interface.routes_mut().add_default_ipv4_route(Ipv4Addr::UNSPECIFIED)?;
        interface.routes_mut().add_default_ipv6_route(Ipv6Addr::UNSPECIFIED)?;
        let buffer = || tcp::SocketBuffer::new(vec![0; WINDOW]);
        let mut sockets = SocketSet::new(Vec::new());
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_timeout(Some(PATIENCE.into()));
        let connection = sockets.add(socket);
        Ok(Self { interface, queues, sockets, connection })
    }

    /// Connects, sends all of a request, and returns all that is answered.
    async fn exchange(
        &mut self,
        udp: &mut UdpDevice,
        server: SocketAddr,
        mut request: &[u8],
    ) -> Result<Vec<u8>, Box<dyn Error>> {
        let mut port = [0; 2];
        SystemRandom.fill(&mut port);
        let port = 49_152 + u16::from_ne_bytes(port) % 16_384;
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.connection);
        socket.connect(self.interface.context(), server, port)?;

        let (mut response, mut buffer) = (Vec::new(), vec![0; MAX_DATAGRAM]);
        loop {
            self.interface.poll(Instant::now(), &mut self.queues, &mut self.sockets);
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.connection);
            if socket.can_send() && !request.is_empty() {
                let sent = socket.send_slice(request)?;
                request = &request[sent..];
            }
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), response.extend_from_slice(bytes)))?;
            }
            // The server closes once it has answered.
            if socket.state() == tcp::State::CloseWait {
                socket.close();
            }
            let is_over = !socket.is_open() || socket.state() == tcp::State::TimeWait;
            self.interface.poll(Instant::now(), &mut self.queues, &mut self.sockets);
            for packet in self.queues.to_send.drain(..) {
                udp.send(&packet)
                    .await
                    .map_err(|cause| format!("the tunnel drops a packet: {cause}"))?;
            }
            if is_over {
                break;
            }
            let delay = self.interface.poll_delay(Instant::now(), &self.sockets);
            let delay = delay.map_or(PATIENCE, Into::into);
            // Either is a reason to go round.
            if let Ok(packet) = tokio::time::timeout(delay, udp.recv(&mut buffer)).await {
                self.queues.received.push_back(packet?.packet.to_vec());
            }
        }
        if response.is_empty() {
            return Err(format!(
                "{server} does not answer; is the tunnel up, and the address right?"
            )
            .into());
        }
        Ok(response)
    }
}

/// Packets on their way between the stack and the tunnel.
#[derive(Default)]
struct Queues {
    received: VecDeque<Vec<u8>>,
    to_send: VecDeque<Vec<u8>>,
}

impl phy::Device for Queues {
    type RxToken<'q> = Received;
    type TxToken<'q> = ToSend<'q>;

    fn receive(&mut self, _: Instant) -> Option<(Received, ToSend<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), ToSend(&mut self.to_send)))
    }

    fn transmit(&mut self, _: Instant) -> Option<ToSend<'_>> {
        Some(ToSend(&mut self.to_send))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = common::MTU.into();
        capabilities
    }
}

struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct ToSend<'q>(&'q mut VecDeque<Vec<u8>>);

impl phy::TxToken for ToSend<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut packet = vec![0; len];
        let result = write(&mut packet);
        self.0.push_back(packet);
        result
    }
}
