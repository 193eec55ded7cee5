//! The vmclock page, in which a host publishes time and a generation counter to its virtual machines
//! (linux/vmclock-abi.h; the counter since Linux 7.0). Reading it costs a load, so it is read for each
//! batch of packets: a restored copy never seals a packet with an earlier key.

use crate::sys::DevicePage;
use std::os::fd::{AsFd, OwnedFd};
use wgsep_proto::path::data_path::GenerationCounter;

/// `VCLK`, then a size that includes the counter.
const MAGIC: u32 = 0x4b4c_4356;
const LEAST_SIZE: u32 = 112;
const VERSION: u16 = 1;
/// VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT
const HAS_COUNTER: u64 = 1 << 8;

/// Offsets of the fields: magic (u32) and size (u32); version (u16) and more; flags; the counter.
const MAGIC_AND_SIZE: usize = 0;
const VERSION_AND_MORE: usize = 8;
const FLAGS: usize = 24;
const COUNTER: usize = 104;

/// The page, mapped.
pub(crate) struct VmClock(DevicePage);

impl VmClock {
    /// Maps the page of the device; `None` if it is not a vmclock page or has no counter.
    pub(crate) fn map(device: &OwnedFd) -> Option<Self> {
        let page = DevicePage::map(device.as_fd()).ok()?;
        let first = page.read_u64(MAGIC_AND_SIZE).to_le_bytes();
        let [m0, m1, m2, m3, s0, s1, s2, s3] = first;
        let [v0, v1, ..] = page.read_u64(VERSION_AND_MORE).to_le_bytes();
        let is_known = u32::from_le_bytes([m0, m1, m2, m3]) == MAGIC
            && u32::from_le_bytes([s0, s1, s2, s3]) >= LEAST_SIZE
            && u16::from_le_bytes([v0, v1]) == VERSION;
        (is_known && page.read_u64(FLAGS) & HAS_COUNTER != 0).then_some(Self(page))
    }
}

impl GenerationCounter for VmClock {
    fn read(&self) -> u64 {
        self.0.read_u64(COUNTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    /// A file that looks like the page.
    fn page(name: &str) -> File {
        let path = std::env::temp_dir().join(format!("wgsep-{name}-{}", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.set_len(4096).unwrap();
        file.write_all_at(b"VCLK\x70\0\0\0\x01\0", 0).unwrap();
        file.write_all_at(&HAS_COUNTER.to_le_bytes(), 24).unwrap();
        file
    }

    #[test]
    fn the_counter_is_what_the_host_last_wrote() {
        let file = page("vmclock");
        let clock = VmClock::map(&file.try_clone().unwrap().into()).unwrap();
        assert_eq!(clock.read(), 0);
        for number in [1_u64, u64::MAX] {
            file.write_all_at(&number.to_le_bytes(), 104).unwrap();
            assert_eq!(clock.read(), number);
        }
    }

    #[test]
    fn a_page_of_another_kind_or_without_a_counter_is_not_used() {
        for (offset, byte) in [(0, b'X'), (4, 0x68), (8, 2), (25, 0)] {
            let file = page(&format!("vmclock-{offset}"));
            file.write_all_at(&[byte], offset).unwrap();
            assert!(VmClock::map(&file.into()).is_none(), "byte {offset}");
        }
        assert!(VmClock::map(&File::open("/dev/null").unwrap().into()).is_none());
    }
}
