//! A tunnel between a TUN device and a UDP socket, on Linux:
//!
//! ```text
//! tunnel INTERFACE FILE
//! ```
//!
//! FILE is one for wg-quick(8). The interface is new, gone with the program, and without an address: that and its routes
//! are for ip(8), as the program says once it runs.
#![allow(clippy::print_stdout)]

#[cfg(target_os = "linux")]
mod common;
#[cfg(target_os = "linux")]
mod tun;

#[cfg(target_os = "linux")]
#[tokio::main(flavor = "current_thread")]
async fn main() -> std::process::ExitCode {
    common::exit(run().await)
}

#[cfg(target_os = "linux")]
async fn run() -> Result<(), Box<dyn std::error::Error>> {
    use wgsep_tokio::{MAX_DATAGRAM, UdpDevice};

    let name = common::argument(1, "the name of an interface")?;
    let common::Tunnel { addresses, bind, configuration } = common::read(2)?;
    let tun = tun::Tun::create(&name)?;
    let mut udp = UdpDevice::bind(configuration, bind).await?;
    udp.set_mtu(common::MTU.into());
    for (address, cidr) in addresses {
        println!("ip address add {address}/{cidr} dev {name}");
    }
    println!("ip link set {name} mtu {} up", common::MTU);

    let (mut packet, mut buffer) = (vec![0; MAX_DATAGRAM], vec![0; MAX_DATAGRAM]);
    loop {
        tokio::select! {
            received = udp.recv(&mut buffer) => tun.write(received?.packet)?,
            // A packet that is dropped is counted, as by any interface.
            read = tun.read(&mut packet) => drop(udp.send(&packet[..read?]).await),
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("this example has a TUN device of Linux alone");
}
