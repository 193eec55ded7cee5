//! Watching for a new generation of this virtual machine: it was cloned, or restored from a snapshot.
//!
//! The kernel learns of that from the host (the devices vmgenid and vmclock). What it passes on differs:
//! a uevent in some kernels (6.8, Amazon Linux), and in all since 5.18 a line of its log.

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, NetlinkAddr, recvmsg};
use nix::unistd::read;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The line of the kernel's log (linux/drivers/char/random.c, add_vmfork_randomness).
const LINE: &[u8] = b"random: crng reseeded due to virtual machine fork";
/// The variable of the uevent (vmgenid_notify).
const VARIABLE: &[u8] = b"NEW_VMGENID=1";
/// Messages read at once, so that a burst of others does not hold up the dataplane's requests.
const AT_ONCE: usize = 16;
/// As long as a record of the kernel's log can be; a uevent is shorter.
const BUFFER_LEN: usize = 8192;

/// Descriptors that report a new generation, where there are any.
#[derive(Default)]
pub struct Generation {
    /// A netlink socket in the group of the kernel's uevents.
    pub uevents: Option<OwnedFd>,
    /// `/dev/kmsg`, at its end.
    pub kernel_log: Option<OwnedFd>,
}

impl Generation {
    /// Descriptors to wait for.
    pub fn sources(&self) -> [Option<BorrowedFd<'_>>; 2] {
        [&self.uevents, &self.kernel_log].map(|source| source.as_ref().map(AsFd::as_fd))
    }

    /// True if the kernel has announced a new generation since the call before, or may have.
    pub fn has_changed(&self) -> bool {
        let [uevents, kernel_log] = self.sources();
        uevents.is_some_and(has_uevent) | kernel_log.is_some_and(has_line)
    }
}

/// Reads uevents. What was lost to a full socket may have been the one: only root causes uevents.
fn has_uevent(socket: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; BUFFER_LEN];
    let mut changed = false;
    for _ in 0..AT_ONCE {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_DONTWAIT;
        match recvmsg::<NetlinkAddr>(socket.as_raw_fd(), &mut parts, None, flags) {
            Ok(message) => {
                let is_kernels = message.address.is_some_and(|sender| sender.pid() == 0);
                let len = message.bytes;
                changed |= is_kernels && is_uevent(buffer.get(..len).unwrap_or_default());
            }
            Err(Errno::ENOBUFS) => changed = true,
            Err(_) => break,
        }
    }
    changed
}

/// Reads lines of the kernel's log. Lines that were overwritten before they were read are lost; they do
/// not count, because packets from the network can cause lines.
fn has_line(log: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; BUFFER_LEN];
    let mut changed = false;
    for _ in 0..AT_ONCE {
        match read(log, &mut buffer) {
            Ok(len) => changed |= is_line(buffer.get(..len).unwrap_or_default()),
            Err(Errno::EPIPE | Errno::EINVAL) => {}
            Err(_) => break,
        }
    }
    changed
}

/// A header, then variables, each with a NUL after it.
fn is_uevent(message: &[u8]) -> bool {
    message.split(|byte| *byte == 0).skip(1).any(|variable| variable == VARIABLE)
}

/// `PRIORITY,NUMBER,TIME,FLAGS;LINE` and more lines. The kernel keeps priorities without a facility to
/// itself, so that no program can write such a line (linux/kernel/printk, devkmsg_write).
fn is_line(record: &[u8]) -> bool {
    let mut halves = record.splitn(2, |byte| *byte == b';');
    let (header, text) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
    let is_kernels = matches!(header, [b'0'..=b'7', b',', ..]);
    is_kernels && text.split(|byte| *byte == b'\n').next() == Some(LINE)
}

/// The device number of `/dev/kmsg`: containers put other files in its place, and poll(2) finds some of
/// them readable for ever.
#[must_use]
pub const fn kernel_log_number() -> libc::dev_t {
    libc::makedev(1, 11)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_uevent_is_distinguished_from_others() {
        let uevent = |variables: &str| is_uevent(variables.replace('|', "\0").as_bytes());
        let path = "/devices/LNXSYSTM:00/LNXSYBUS:00/QEMUVGID:00";
        let before = format!("change@{path}|ACTION=change|DEVPATH={path}|SUBSYSTEM=acpi|");
        assert!(uevent(&format!("{before}NEW_VMGENID=1|MODALIAS=acpi:QEMUVGID:|SEQNUM=9|")));
        assert!(uevent(&format!("{before}NEW_VMGENID=1")));
        for other in ["NEW_VMGENID=0|", "NEW_VMGENID=11|", "XNEW_VMGENID=1|", ""] {
            assert!(!uevent(&format!("{before}{other}SEQNUM=9|")), "{other}");
        }
        // A device may have any name.
        assert!(!uevent("NEW_VMGENID=1|ACTION=change|"));
        assert!(!is_uevent(&[]));
    }

    #[test]
    fn the_kernel_s_line_is_distinguished_from_others() {
        let line = "random: crng reseeded due to virtual machine fork";
        for record in [
            format!("5,742,81234567,-;{line}\n"),
            format!("5,742,81234567,-,caller=T1;{line}\n SUBSYSTEM=acpi\n"),
            format!("4,742,81234567,-;{line}"),
        ] {
            assert!(is_line(record.as_bytes()), "{record}");
        }
        for record in [
            // Facilities other than the kernel's: 1 and 3.
            format!("13,742,81234567,-;{line}\n"),
            format!("29,742,81234567,-;{line}\n"),
            format!("5,742,81234567,-;x {line}\n"),
            format!("5,742,81234567,-;{line} x\n"),
            format!("5,742,81234567,-;x\n{line}\n"),
            format!("{line}\n"),
            "5,742".to_owned(),
            String::new(),
        ] {
            assert!(!is_line(record.as_bytes()), "{record}");
        }
    }

    #[test]
    fn without_a_source_nothing_changes() {
        assert!(!Generation::default().has_changed());
    }
}
