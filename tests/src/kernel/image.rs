//! What the virtual machine boots: Debian's kernel from the cache, and a file system in memory
//! with its WireGuard, a shell, wg(8), ping and iperf3.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;
use crate::implementation::in_path;
use crate::process::{self, run};
use crate::scratch::Scratch;

/// The emulator. It translates: nothing here has hardware virtualisation to give.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// What the kernel lacks without modules: a network card, WireGuard, and TUN devices. They bring others
/// along.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_net", "wireguard", "tun"];

/// Programs of this machine that the guest has too.
const PROGRAMS: [&str; 3] = ["wg", "ping", "iperf3"];

/// The guest's first and only process beside what it is told to run: a line at a time from the
/// second serial port, and after what the line printed one with its status. Each line comes with its
/// length, because a guest on a busy machine can lose characters of it.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
for module in $(cat /modules/order); do insmod "/modules/$module.ko" || exit 1; done
ip link set lo up
ip link set eth0 up || exit 1
stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1
echo ready
while read -r length line; do
	if [ "${#line}" != "$length" ]; then
		printf '\ngarbled\n'
		continue
	fi
	sh -c "$line" </dev/null 2>&1
	printf '\nstatus %d\n' $?
done
"#;

/// A kernel, and the archive of its first file system.
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    /// Keeps the archive until the machine is gone.
    _directory: Scratch,
}

/// The kernel package in the cache, as `make deps` unpacked it; or why there is none.
pub(super) fn package() -> Result<PathBuf, String> {
    let qemu = in_path(QEMU);
    for needed in [&qemu, &in_path("busybox"), &in_path("cpio"), &in_path("modinfo")] {
        if !needed.is_file() {
            return Err(format!("{} is missing: run `make deps`", needed.display()));
        }
    }
    cache::entry("kernel")
}

/// The configuration that the kernel was built with.
pub(super) fn config(package: &Path) -> String {
    let config = only_entry(&package.join("boot"), "config-");
    must(fs::read_to_string(config), "configuration")
}

impl Image {
    /// Puts the archive together, with some more programs.
    ///
    /// # Panics
    ///
    /// When the package or a program is not what it was.
    pub(super) fn build(package: &Path, more_programs: &[PathBuf]) -> Self {
        let directory = Scratch::new();
        let root = directory.join("root");
        for part in ["bin", "dev", "proc", "sys", "tmp", "lib", "modules"] {
            must(fs::create_dir_all(root.join(part)), part);
        }
        install_modules(package, &root.join("modules"));
        install(&in_path("busybox"), &root.join("bin/busybox"));
        for program in PROGRAMS.map(in_path).iter().chain(more_programs) {
            install_with_libraries(program, &root);
        }
        let init = root.join("init");
        must(fs::write(&init, INIT), "init");
        must(fs::set_permissions(&init, Permissions::from_mode(0o755)), "init");
        let initramfs = directory.join("initramfs");
        let archive = "cd \"$0\" && find . | cpio --quiet -o -H newc >\"$1\"";
        run(Command::new("sh").arg("-ec").arg(archive).arg(&root).arg(&initramfs));
        let kernel = only_entry(&package.join("boot"), "vmlinuz-");
        Self { kernel, initramfs, _directory: directory }
    }
}

/// Copies modules with all they depend on, and notes the order to load them in.
fn install_modules(package: &Path, to: &Path) {
    let release = only_entry(&package.join("lib/modules"), "");
    let files = run(Command::new("find").arg(release).args(["-name", "*.ko"]));
    let files: BTreeMap<_, _> = files
        .lines()
        .filter_map(|path| Some((Path::new(path).file_stem()?.to_str()?.replace('-', "_"), path)))
        .collect();
    let (mut order, mut known) = (Vec::new(), BTreeSet::new());
    for module in MODULES {
        in_order(module, &files, &mut known, &mut order);
    }
    for module in &order {
        install(Path::new(files[module]), &to.join(format!("{module}.ko")));
    }
    must(fs::write(to.join("order"), order.join("\n")), "order");
}

/// Appends what a module needs, and then the module.
fn in_order(
    module: &str,
    files: &BTreeMap<String, &str>,
    known: &mut BTreeSet<String>,
    order: &mut Vec<String>,
) {
    let Some(file) = files.get(module) else { panic!("the kernel has no module {module}") };
    if !known.insert(module.to_owned()) {
        return;
    }
    let needed = run(Command::new("modinfo").args(["-F", "depends", file]));
    for needed in needed.trim().split(',').filter(|name| !name.is_empty()) {
        in_order(&needed.replace('-', "_"), files, known, order);
    }
    order.push(module.to_owned());
}

/// Copies a program, and the libraries that ldd(1) lists to where the loader looks for them.
fn install_with_libraries(program: &Path, root: &Path) {
    let Some(name) = program.file_name() else { panic!("{} has no name", program.display()) };
    install(program, &root.join("bin").join(name));
    // A program that is linked statically has none, and ldd(1) fails.
    let libraries = process::output(Command::new("ldd").arg(program)).stdout;
    let libraries = String::from_utf8_lossy(&libraries);
    for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(path.trim_start_matches('/'));
        if !to.exists() {
            must(fs::create_dir_all(to.parent().unwrap_or(root)), path);
            install(Path::new(path), &to);
        }
    }
}

fn install(from: &Path, to: &Path) {
    must(fs::copy(from, to), &to.display().to_string());
}

/// The only entry of a directory whose name begins so.
fn only_entry(directory: &Path, prefix: &str) -> PathBuf {
    let entries = must(fs::read_dir(directory), &directory.display().to_string());
    let found = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)));
    match found {
        Some(path) => path,
        None => panic!("{} has no {prefix}*", directory.display()),
    }
}

fn must<T>(result: std::io::Result<T>, what: &str) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("the guest's {what}: {error}"),
    }
}
