//! Resource limits.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// Descriptors that a process may have: UAPI clients, workers, sockets, TUN queues, and spare capacity.
pub const MAX_DESCRIPTORS: u64 = 256;
/// Of those, what a dataplane of no workers needs for anything but clients.
const DESCRIPTORS: u64 = 42;
/// What each worker adds to that: an epoll instance and an eventfd.
const DESCRIPTORS_PER_WORKER: u64 = 2;
/// UAPI clients that there must be descriptors for; fewer than one wg(8) and its watchers are no service.
const MIN_CLIENTS: u64 = 8;
/// Clients of the status socket that there must be descriptors for, and most that there are.
const MIN_STATUS_CLIENTS: u64 = 6;
const MAX_STATUS_CLIENTS: u64 = 16;
/// Clients of the socket for preshared keys. Their descriptors are reserved where there is no such socket, too.
const PSK_CLIENTS: u64 = 4;

/// Bytes of secret memory that the dataplane reserves, or as many as its limit on locked memory allows.
pub const SECRET_MEMORY: usize = 96 << 20;
/// Bytes of memory for what does not fit into it, locked if the limit allows that too.
pub const LOCKED_MEMORY: usize = 256 << 20;
/// Both.
const LOCKED_TOTAL: u64 = (SECRET_MEMORY + LOCKED_MEMORY) as u64;

/// No core file.
///
/// # Errors
/// As setrlimit(2).
pub fn no_core() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
}

/// What the dataplane lives with from before it is executed, and may take privileges: no core file, and, as far
/// as the launcher's allow, room for its secrets in memory that is never swapped.
///
/// # Errors
/// As setrlimit(2).
pub fn limit_dataplane() -> nix::Result<()> {
    no_core()?;
    allow_locked_memory()
}

/// Lets files grow as far as the launcher's limit allows, which secret memory has to; returns the limit.
///
/// # Errors
/// As setrlimit(2).
pub fn allow_file_growth() -> nix::Result<u64> {
    let fsize = Resource::RLIMIT_FSIZE;
    let raised = setrlimit(fsize, RLIM_INFINITY, RLIM_INFINITY).or_else(|_| {
        let (_, most) = getrlimit(fsize)?;
        setrlimit(fsize, most, most)
    });
    raised.and_then(|()| getrlimit(fsize)).map(|(limit, _)| limit)
}

/// Lets this process have as many descriptors as its hard limit allows, [`MAX_DESCRIPTORS`] at least where
/// that may be raised; returns the limit.
///
/// # Errors
/// As setrlimit(2).
pub fn allow_descriptors() -> nix::Result<u64> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let enough = most.max(MAX_DESCRIPTORS);
    set_descriptors(enough).or_else(|_| set_descriptors(most)).map(|()| descriptors())
}

/// Limits this process to so many descriptors, to [`MAX_DESCRIPTORS`], and to what [`allow_descriptors`] has left it.
///
/// # Errors
/// As setrlimit(2).
pub fn limit_descriptors(most: u64) -> nix::Result<()> {
    set_descriptors(descriptors().min(MAX_DESCRIPTORS).min(most))
}

fn set_descriptors(limit: u64) -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit)
}

/// The limit that the kernel goes by.
pub(crate) fn descriptors() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(limit, _)| limit)
}

/// Clients of the UAPI socket, the status socket and the socket for preshared keys that a dataplane of so many workers can
/// have with this process's limit on descriptors.
#[must_use]
pub fn max_clients(workers: usize) -> [usize; 3] {
    let (uapi, status) = clients(descriptors(), workers);
    [uapi, status, PSK_CLIENTS].map(|most| usize::try_from(most).unwrap_or(usize::MAX))
}

/// Clients of the UAPI and of the status socket, of which neither can have the other's descriptors.
const fn clients(limit: u64, workers: usize) -> (u64, u64) {
    let left = limit.saturating_sub(other_descriptors(workers));
    let status = left.saturating_sub(MIN_CLIENTS);
    let status = if status < MAX_STATUS_CLIENTS { status } else { MAX_STATUS_CLIENTS };
    (left.saturating_sub(status), status)
}

/// The lowest limit on descriptors that a dataplane of so many workers can serve with.
#[must_use]
pub const fn min_descriptors(workers: usize) -> u64 {
    other_descriptors(workers) + MIN_CLIENTS + MIN_STATUS_CLIENTS
}

const fn other_descriptors(workers: usize) -> u64 {
    DESCRIPTORS + PSK_CLIENTS + DESCRIPTORS_PER_WORKER * workers as u64
}

/// Raises the limit on locked memory; without the privilege, to what the launcher was allowed.
fn allow_locked_memory() -> nix::Result<()> {
    let memlock = Resource::RLIMIT_MEMLOCK;
    setrlimit(memlock, LOCKED_TOTAL, LOCKED_TOTAL).or_else(|_| {
        let (_, most) = getrlimit(memlock)?;
        setrlimit(memlock, most, most)
    })
}

/// Bytes of locked memory that this process may have.
#[must_use]
pub fn locked_memory() -> usize {
    getrlimit(Resource::RLIMIT_MEMLOCK)
        .map_or(0, |(now, _)| usize::try_from(now).unwrap_or(usize::MAX))
}

/// No file can grow; only once secret memory has its size, which counts as a file's.
///
/// # Errors
/// As setrlimit(2).
pub fn no_file_growth() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_FSIZE, 0, 0)
}

/// No new process or thread; only once all threads run.
///
/// # Errors
/// As setrlimit(2).
pub fn no_processes() -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NPROC, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_either_socket_have_descriptors_of_their_own() {
        for workers in [1, 2, 64] {
            assert_eq!(clients(min_descriptors(workers), workers), (8, 6));
            for limit in min_descriptors(workers)..=1024 {
                let (uapi, status) = clients(limit, workers);
                assert_eq!(uapi + status + other_descriptors(workers), limit);
                assert!(uapi >= MIN_CLIENTS && status >= MIN_STATUS_CLIENTS);
            }
        }
        assert_eq!(clients(256, 2), (256 - 50 - 16, 16));
        assert_eq!(clients(0, 2), (0, 0));
    }

    /// A helper of so many descriptors has room for the queues of the TUN device above all others.
    #[test]
    fn the_lowest_limit_has_room_for_the_queues() {
        const QUEUES: u64 = 17;
        assert!(u64::from(crate::filters::FIRST_QUEUE) + QUEUES <= min_descriptors(1));
    }
}
