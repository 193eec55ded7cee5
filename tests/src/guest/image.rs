//! What a virtual machine boots: a kernel as Debian packages it, and a file system in memory with its
//! modules, a shell and whatever programs the test wants.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{output, run};
use crate::scratch::Scratch;

use super::Plan;

/// The guest's first and only process besides what it runs: a line at a time from the port
/// for it, and after what the line printed one with its status. Each line comes twice, with a tab between, because a guest
/// on a busy machine can lose characters of it, or get others.
///
/// The kernel's first root cannot be exchanged for another (pivot_root(2)), unlike that of a machine with a
/// disk, so all of it moves to one that can.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin
if [ ! -e /moved ]; then
	busybox mkdir /moved
	busybox mount -t tmpfs root /moved
	for part in /*; do [ "$part" = /moved ] || busybox cp -a "$part" /moved; done
	busybox touch /moved/moved
	exec busybox switch_root /moved /init
fi
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
for module in $(cat /modules/order); do insmod "/modules/$module.ko" || exit 1; done
ip link set lo up
ip link set eth0 up || exit 1
port=$(cat /port)
# Open before it is set: some ports forget their settings when the last one closes them.
exec <"$port" >"$port"
stty raw -echo
echo ready
while IFS='	' read -r line copy; do
	if [ "$line" != "$copy" ]; then
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

/// The configuration that the kernel of a package was built with.
pub(crate) fn config(package: &Path) -> String {
    let config = only_entry(&package.join("boot"), "config-");
    must(fs::read_to_string(config), "configuration")
}

impl Image {
    /// Puts the archive together.
    ///
    /// # Panics
    ///
    /// When the package or a program is not what it was.
    pub(super) fn build(plan: &Plan) -> Self {
        let directory = Scratch::new();
        let root = directory.join("root");
        for part in ["bin", "dev", "proc", "sys", "tmp", "lib", "modules", "run", "var/log"] {
            must(fs::create_dir_all(root.join(part)), part);
        }
        must(std::os::unix::fs::symlink("/run", root.join("var/run")), "var/run");
        install_modules(&plan.package, plan.modules, &root.join("modules"));
        for (from, to) in &plan.files {
            install(from, &root.join(to.trim_start_matches('/')));
        }
        must(fs::write(root.join("port"), plan.port), "port");
        let init = root.join("init");
        must(fs::write(&init, INIT), "init");
        must(fs::set_permissions(&init, Permissions::from_mode(0o755)), "init");
        let initramfs = directory.join("initramfs");
        let archive = "cd \"$0\" && find . | cpio --quiet -o -H newc >\"$1\"";
        run(Command::new("sh").arg("-ec").arg(archive).arg(&root).arg(&initramfs));
        let kernel = only_entry(&plan.package.join("boot"), "vmlinuz-");
        Self { kernel, initramfs, _directory: directory }
    }
}

/// Copies modules with all they depend on, and notes the order to load them in.
fn install_modules(package: &Path, modules: &[&str], to: &Path) {
    let release = only_entry(&package.join("lib/modules"), "");
    let files = run(Command::new("find").arg(release).args(["-name", "*.ko"]));
    let files: BTreeMap<_, _> = files
        .lines()
        .filter_map(|path| Some((Path::new(path).file_stem()?.to_str()?.replace('-', "_"), path)))
        .collect();
    let (mut order, mut known) = (Vec::new(), BTreeSet::new());
    for module in modules {
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

/// A program of this machine in `/bin`, and the libraries that ldd(1) lists where the loader looks for
/// them.
pub(crate) fn with_libraries(program: &Path) -> Vec<(PathBuf, String)> {
    let Some(name) = program.file_name() else { panic!("{} has no name", program.display()) };
    // A program that is linked statically has none, and ldd(1) fails.
    let libraries = output(Command::new("ldd").arg(program)).stdout;
    let libraries = String::from_utf8_lossy(&libraries).into_owned();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    let libraries = libraries.map(|path| (PathBuf::from(path), path.to_owned()));
    let program = (program.to_owned(), format!("bin/{}", name.to_string_lossy()));
    std::iter::once(program).chain(libraries).collect()
}

fn install(from: &Path, to: &Path) {
    let what = to.display().to_string();
    must(fs::create_dir_all(to.parent().unwrap_or(to)), &what);
    must(fs::copy(from, to), &what);
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
