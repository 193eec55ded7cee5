//! What /proc says of a process.

use nix::errno::Errno;
use nix::sys::stat::makedev;
use nix::sys::statvfs::{FsFlags, statvfs};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use wgsep_policy::ThreadStatus;
use wgsep_policy::descriptors::socket_protocol;
use wgsep_policy::namespaces::KINDS;

/// A fact, or the reason why it could not be read.
pub(super) type Fact<T> = Result<T, String>;

/// Namespaces a dataplane has to itself.
pub(super) const NAMESPACES: [&str; 5] = {
    let [mnt, net, ipc, uts, cgroup] = KINDS;
    [mnt.0, net.0, ipc.0, uts.0, cgroup.0]
};

/// What is read of one process.
pub(super) struct Facts {
    /// The fields of each thread's `status`.
    pub(super) threads: Fact<Vec<BTreeMap<String, String>>>,
    /// Which of [`NAMESPACES`], and `user`, are the same as the helper's.
    pub(super) shared_namespaces: Fact<Vec<&'static str>>,
    /// Entries of its root directory, and whether that is read-only.
    pub(super) root: Fact<(usize, bool)>,
    /// Soft and hard limits by their names in /proc.
    pub(super) limits: Fact<BTreeMap<String, (String, String)>>,
    /// Uid that owns its files in /proc: its own only if it is dumpable.
    pub(super) owner: Fact<u32>,
    /// Its descriptors by kind.
    pub(super) descriptors: Fact<BTreeMap<String, usize>>,
    /// Bytes of memory that not even the kernel maps (memfd_secret).
    pub(super) secret_memory: Fact<u64>,
    /// KiB of memory that can be executed, and how many of them are sealed (mseal).
    pub(super) code: Fact<(u64, u64)>,
}

impl Facts {
    /// Reads all there is of `pid`, and what of it is the same as the helper's.
    pub(super) fn read(pid: i32, helper: i32) -> Self {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let helpers = PathBuf::from(format!("/proc/{helper}"));
        let maps = proc.join("maps");
        Self {
            threads: threads(&proc),
            shared_namespaces: shared_namespaces(&proc, &helpers),
            root: root(&proc.join("root")),
            limits: text(&proc.join("limits")).map(|text| limits(&text)),
            owner: because(&maps, fs::metadata(&maps)).map(|metadata| metadata.uid()),
            descriptors: descriptors(&proc),
            secret_memory: text(&maps).map(|text| secret_memory(&text)),
            code: text(&proc.join("smaps")).map(|text| code(&text)),
        }
    }

    /// The real uid of all its threads.
    pub(super) fn uid(&self) -> Option<u32> {
        self.field("Uid").ok()?.split_whitespace().next()?.parse().ok()
    }

    /// A field that must be the same on every thread.
    pub(super) fn field(&self, name: &str) -> Fact<&str> {
        let threads = self.threads.as_ref().map_err(Clone::clone)?;
        let values: BTreeSet<_> = threads
            .iter()
            .map(|fields| fields.get(name).map_or("missing", String::as_str))
            .collect();
        match values.iter().collect::<Vec<_>>()[..] {
            [value] => Ok(value),
            _ => Ok("not the same on every thread"),
        }
    }
}

fn because<T>(path: &Path, result: io::Result<T>) -> Fact<T> {
    result.map_err(|error| format!("{}: {error}", path.display()))
}

fn text(path: &Path) -> Fact<String> {
    because(path, fs::read_to_string(path))
}

fn entries(path: &Path) -> Fact<Vec<PathBuf>> {
    let entries = because(path, fs::read_dir(path))?;
    Ok(entries.filter_map(Result::ok).map(|entry| entry.path()).collect())
}

/// A thread that ends while it is looked at is left out: it is no longer there to be confined.
fn threads(proc: &Path) -> Fact<Vec<BTreeMap<String, String>>> {
    let status = |task: PathBuf| match ThreadStatus::read(&task) {
        Err(error) if has_ended(&error) => None,
        read => Some(because(&task.join("status"), read).map(|status| fields(&status))),
    };
    entries(&proc.join("task"))?.into_iter().filter_map(status).collect()
}

fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

fn fields(status: &ThreadStatus) -> BTreeMap<String, String> {
    status.fields().map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

fn shared_namespaces(proc: &Path, helpers: &Path) -> Fact<Vec<&'static str>> {
    let mut shared = Vec::new();
    for name in NAMESPACES.into_iter().chain(["user"]) {
        let [its, helpers] = [proc, helpers].map(|proc| {
            let path = proc.join("ns").join(name);
            match fs::read_link(&path) {
                // Of a kind that the kernel was built without all have the same one.
                Err(error) if error.kind() == io::ErrorKind::NotFound && proc.exists() => Ok(None),
                read => because(&path, read).map(Some),
            }
        });
        if its? == helpers? {
            shared.push(name);
        }
    }
    Ok(shared)
}

fn root(path: &Path) -> Fact<(usize, bool)> {
    let count = entries(path)?.len();
    let flags = statvfs(path).map_err(|errno| format!("{}: {}", path.display(), errno.desc()))?;
    Ok((count, flags.flags().contains(FsFlags::ST_RDONLY)))
}

/// Lines of a name of several words, then soft limit, hard limit and mostly a unit.
fn limits(text: &str) -> BTreeMap<String, (String, String)> {
    let line = |line: &str| {
        let (name, values) = line.split_at_checked(26)?;
        let mut values = values.split_whitespace().map(str::to_owned);
        Some((name.trim().to_owned(), (values.next()?, values.next()?)))
    };
    text.lines().skip(1).filter_map(line).collect()
}

fn secret_memory(maps: &str) -> u64 {
    let size = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        rest.contains("/secretmem").then(|| len(range)).flatten()
    };
    maps.lines().filter_map(size).sum()
}

/// A mapping is a line with its addresses and permissions, and lines with a name and a value, the last of
/// which is `VmFlags`. What is in brackets the kernel maps by itself, and seals where it is built to.
fn code(smaps: &str) -> (u64, u64) {
    let (mut whole, mut sealed, mut executable) = (0, 0, None);
    for line in smaps.lines() {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["VmFlags:", ref flags @ ..] => {
                let bytes = executable.take().unwrap_or(0);
                whole += bytes;
                sealed += if flags.contains(&"sl") { bytes } else { 0 };
            }
            [range, access, _, _, _, ref name @ ..] if access.contains('x') => {
                let is_kernels = name.first().is_some_and(|name| name.starts_with('['));
                executable = len(range).filter(|_| !is_kernels);
            }
            _ => {}
        }
    }
    (whole / 1024, sealed / 1024)
}

/// Bytes of a mapping, by its addresses.
fn len(range: &str) -> Option<u64> {
    let (start, end) = range.split_once('-')?;
    let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).ok());
    end?.checked_sub(start?)
}

fn descriptors(proc: &Path) -> Fact<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for path in entries(&proc.join("fd"))? {
        match kind(&path) {
            Ok(kind) => *kinds.entry(kind).or_insert(0) += 1,
            // Closed meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("{}: {error}", path.display())),
        }
    }
    Ok(kinds)
}

/// What a descriptor is: a device by its number, because its node may have another name, or have been made anew since;
/// anything else by its link.
fn kind(path: &Path) -> std::io::Result<String> {
    let target = fs::read_link(path)?.display().to_string();
    if target.starts_with("socket:[") {
        let protocol = socket_protocol(path)?.to_ascii_lowercase();
        // `udpv6` and `unix-stream` are kinds of their own to the kernel only.
        let family =
            ["udp", "unix", "netlink"].into_iter().find(|known| protocol.starts_with(known));
        return Ok(format!("{} socket", family.unwrap_or(&protocol)));
    }
    let is_device = |major, minor| {
        let is_it = |status: fs::Metadata| status.rdev() == makedev(major, minor);
        fs::metadata(path)
            .ok()
            .filter(|status| status.file_type().is_char_device())
            .is_some_and(is_it)
    };
    Ok(match () {
        () if is_device(10, 200) => "tun".to_owned(),
        () if is_device(1, 3) => "null".to_owned(),
        () => named(&target),
    })
}

fn named(target: &str) -> String {
    match target {
        _ if target.starts_with("pipe:") => "pipe".to_owned(),
        _ => match target.strip_prefix("anon_inode:") {
            Some(kind) => kind.trim_matches(['[', ']']).to_owned(),
            None => format!("file {target}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_by_their_names() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max core file size        0                    unlimited            bytes     \n\
                    Max processes             7                    8                    processes \n";
        let limits = limits(text);
        assert_eq!(limits["Max core file size"], ("0".to_owned(), "unlimited".to_owned()));
        assert_eq!(limits["Max processes"], ("7".to_owned(), "8".to_owned()));
    }

    #[test]
    fn secret_memory_is_summed() {
        let maps = "7f00-7f10 rw-s 00000000 00:0f 1 /secretmem (deleted)\n\
                    8000-9000 rw-p 00000000 00:00 0 [heap]\n\
                    a000-a020 rw-s 00000000 00:0f 2 /secretmem (deleted)\n";
        assert_eq!(secret_memory(maps), 0x30);
    }

    #[test]
    fn code_is_sealed_by_the_flag_of_each_mapping_but_the_kernels_own() {
        let mapping = |access: &str, name: &str, flags: &str| {
            format!(
                "400000-402000 {access} 00000000 fe:00 9 {name}\nSize: 8 kB\nVmFlags: {flags}\n"
            )
        };
        let data = mapping("rw-p", "/x", "rd wr mr mw me ac");
        let of_kernel = mapping("r-xp", "[vdso]", "rd ex mr mw me de");
        let sealed = mapping("r-xp", "/x", "rd ex mr mw me sl");
        let unsealed = mapping("r-xp", "/y", "rd ex mr mw me");
        assert_eq!(code(&[&*data, &sealed, &of_kernel].concat()), (8, 8));
        assert_eq!(code(&[&*data, &sealed, &unsealed].concat()), (16, 8));
    }

    #[test]
    fn descriptors_are_recognised_by_kind() {
        for (target, expected) in [
            ("anon_inode:[eventpoll]", "eventpoll"),
            ("anon_inode:inotify", "inotify"),
            ("pipe:[4]", "pipe"),
            ("/etc/passwd", "file /etc/passwd"),
        ] {
            assert_eq!(named(target), expected);
        }
        for (device, expected) in
            [("/dev/null", "null"), ("/dev/net/tun", "tun"), ("/dev/zero", "file /dev/zero")]
        {
            // A container may have no TUN device.
            let Ok(device) = fs::File::open(device) else { continue };
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&device));
            assert_eq!(kind(Path::new(&path)).unwrap(), expected);
        }
    }

    #[test]
    fn this_process_can_be_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let facts = Facts::read(pid, pid);
        assert!(facts.threads.as_ref().is_ok_and(|threads| !threads.is_empty()));
        assert_eq!(facts.shared_namespaces.as_ref().map(Vec::len), Ok(NAMESPACES.len() + 1));
        assert!(facts.field("Uid").is_ok_and(|uid| uid != "missing"));
        assert!(facts.descriptors.is_ok_and(|kinds| !kinds.is_empty()));
    }
}
