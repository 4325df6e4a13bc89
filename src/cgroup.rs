//! Control groups of version 2, for workers whose memory or number of processes is limited: one group for each such worker.
//!
//! The kernel's interface is `Documentation/admin-guide/cgroup-v2.rst`. Only folders that were delegated are used: the one that the configuration or the environment names, or, for
//! a host that is not root, the folder above its own group if it may write there. The host's own group and its limits are not touched.
//!
//! ```text
//! <delegated folder>             controllers enabled for its children, no processes of its own
//! ├── <the host's group>         where the host is; nothing is changed here
//! └── hotcell-<ns>-<host>-<start>-<number>    one worker: memory.max, memory.swap.max, memory.oom.group, pids.max
//! ```
//!
//! A group's name says which host made it (pid namespace, process id and start time), so that whoever comes later can remove what a killed host left behind.

use crate::monitor::lock;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The environment variable that names the folder when the configuration names none.
pub const CGROUP_VARIABLE: &str = "HOTCELL_CGROUP";

/// What every group's name starts with.
const PREFIX: &str = "hotcell-";

/// Groups that could not be removed yet, because a process was still ending in them.
static LEFT: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A worker's group. Whatever is still in it is killed, and the group removed, when this drops.
#[derive(Debug)]
pub(crate) struct Group {
    folder: PathBuf,
}

/// What a group limits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) processes: Option<u64>,
}

impl Wanted {
    fn controllers(self) -> impl Iterator<Item = &'static str> {
        let memory = self.memory_bytes.map(|_| "memory");
        memory.into_iter().chain(self.processes.map(|_| "pids"))
    }
}

/// The folder that the configuration or the environment names.
pub(crate) fn named(configured: Option<&Path>) -> Option<PathBuf> {
    let variable = || std::env::var_os(CGROUP_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
    configured.map(Path::to_owned).or_else(variable)
}

/// The folder above the host's own group, if the host is not root. (Root may write everywhere, which says nothing about what is meant for it.)
pub(crate) fn above_own() -> Result<PathBuf, String> {
    if nix::unistd::geteuid().is_root() {
        return Err(format!("root has to name the control group's folder ({CGROUP_VARIABLE} or cgroup(..))"));
    }
    let read = |path: &str| std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
    let mount =
        mount_point(&read("/proc/self/mountinfo")?).ok_or("no control groups of version 2 are mounted")?;
    let own = own_group(&read("/proc/self/cgroup")?).ok_or("the host is in no control group of version 2")?;
    let parent = own.parent().ok_or("the host is in the root control group")?;
    Ok(mount.join(parent.strip_prefix("/").unwrap_or(parent)))
}

/// Where version 2 is mounted, by `/proc/self/mountinfo`. Spaces and the like are octal there; such a mount is not looked for.
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        (filesystem.starts_with("cgroup2 ") && root == "/" && !point.contains('\\')).then(|| point.into())
    })
}

/// The host's group, by `/proc/self/cgroup`: the line of hierarchy 0.
fn own_group(cgroup: &str) -> Option<PathBuf> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::")).map(PathBuf::from)
}

fn lists(folder: &Path, file: &str, word: &str) -> bool {
    let text = std::fs::read_to_string(folder.join(file)).unwrap_or_default();
    text.split_ascii_whitespace().any(|listed| listed == word)
}

fn write(folder: &Path, file: &str, text: &str) -> Result<(), String> {
    let path = folder.join(file);
    // Not `fs::write`: it would make a file where the kernel has none.
    let done = std::fs::OpenOptions::new().write(true).open(&path).and_then(|mut file| {
        use std::io::Write;
        file.write_all(text.as_bytes())
    });
    done.map_err(|e| format!("writing {text} to {}: {e}", path.display()))
}

/// The name's part that says who made it: pid namespace, process, and its start time.
fn maker(pid: u32) -> Option<String> {
    let namespace = std::fs::metadata("/proc/self/ns/pid").ok()?.ino();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows its last parenthesis does not.
    let start = stat[stat.rfind(')')? + 1..].split_whitespace().nth(19)?;
    Some(format!("{PREFIX}{namespace}-{pid}-{start}-"))
}

impl Group {
    /// Makes a group in `parent`, with these limits.
    pub(crate) fn create(parent: &Path, wanted: Wanted) -> Result<Group, String> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        if !parent.join("cgroup.controllers").exists() {
            return Err(format!("{} is not a control group of version 2", parent.display()));
        }
        for controller in wanted.controllers() {
            if !lists(parent, "cgroup.controllers", controller) {
                return Err(format!("{} has no {controller} controller", parent.display()));
            }
            if !lists(parent, "cgroup.subtree_control", controller) {
                write(parent, "cgroup.subtree_control", &format!("+{controller}"))?;
            }
        }
        let maker = maker(std::process::id()).ok_or("the host's own start time cannot be read in /proc")?;
        sweep(parent);
        let folder = parent.join(format!("{maker}{}", NEXT.fetch_add(1, Relaxed)));
        std::fs::create_dir(&folder).map_err(|e| format!("making {}: {e}", folder.display()))?;
        let group = Group { folder };
        if let Some(bytes) = wanted.memory_bytes {
            write(&group.folder, "memory.max", &bytes.to_string())?;
            // Without swap accounting there is no such file, and no swap to speak of.
            if group.folder.join("memory.swap.max").exists() {
                write(&group.folder, "memory.swap.max", "0")?;
            }
            write(&group.folder, "memory.oom.group", "1")?;
        }
        if let Some(processes) = wanted.processes {
            write(&group.folder, "pids.max", &processes.to_string())?;
        }
        Ok(group)
    }

    /// Puts a process into the group, with all its threads.
    pub(crate) fn place(&self, pid: u32) -> Result<(), String> {
        write(&self.folder, "cgroup.procs", &pid.to_string())
    }

    /// How many processes the kernel has killed here because memory was used up.
    pub(crate) fn memory_kills(&self) -> u64 {
        let events = std::fs::read_to_string(self.folder.join("memory.events")).unwrap_or_default();
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Processes that native code has started and left behind (Linux 5.14; before, they keep their group).
        let _ = write(&self.folder, "cgroup.kill", "1");
        let mut left = lock(&LEFT);
        left.push(std::mem::take(&mut self.folder));
        remove_empty(&mut left);
    }
}

/// Removes the groups that nothing lives in any more, and keeps the others on the list.
fn remove_empty(left: &mut Vec<PathBuf>) {
    left.retain(|folder| match std::fs::remove_dir(folder) {
        Ok(()) => false,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    });
}

/// Removes what this host could not remove before, and groups of hosts that are gone.
fn sweep(parent: &Path) {
    remove_empty(&mut lock(&LEFT));
    let Ok(groups) = std::fs::read_dir(parent) else { return };
    for group in groups.flatten() {
        let name = group.file_name();
        if name.to_str().is_some_and(is_of_the_dead) {
            let _ = write(&group.path(), "cgroup.kill", "1");
            let _ = std::fs::remove_dir(group.path());
        }
    }
}

/// Whether a group's name says that a process of this pid namespace made it that does not run any more. Processes of other namespaces cannot be looked for.
fn is_of_the_dead(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else { return false };
    let mut parts = rest.split('-');
    let (Some(namespace), Some(pid)) = (parts.next(), parts.next().and_then(|pid| pid.parse().ok())) else {
        return false;
    };
    let own = std::fs::metadata("/proc/self/ns/pid").map(|namespace| namespace.ino().to_string());
    own.is_ok_and(|own| own == namespace) && !maker(pid).is_some_and(|maker| name.starts_with(&maker))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_and_the_hosts_group_are_found() {
        let mountinfo = "24 1 0:22 / /proc rw,relatime - proc proc rw\n\
                         31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mountinfo), Some("/sys/fs/cgroup".into()));
        assert_eq!(mount_point("31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"), None);
        let cgroup = "4:memory:/x\n0::/user.slice/a.scope\n";
        assert_eq!(own_group(cgroup), Some("/user.slice/a.scope".into()));
        assert_eq!(own_group("4:memory:/x\n"), None);
    }

    #[test]
    fn only_groups_of_dead_hosts_of_this_namespace_are_swept() {
        let own = maker(std::process::id()).unwrap();
        assert!(!is_of_the_dead(&format!("{own}7")), "this process lives");
        let mut parts: Vec<&str> = own.split('-').collect();
        let (namespace, pid) = (parts[1].to_owned(), parts[2].to_owned());
        assert!(
            is_of_the_dead(&format!("{PREFIX}{namespace}-{pid}-1-1")),
            "an earlier process of this number"
        );
        parts[1] = "1";
        assert!(!is_of_the_dead(&parts.join("-")), "another namespace");
        for foreign in ["hotcell", "hotcell-", "hotcell-x", "user.slice", ""] {
            assert!(!is_of_the_dead(foreign), "{foreign:?}");
        }
    }

    #[test]
    fn a_folder_that_is_no_group_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = Group::create(folder.path(), Wanted::default()).unwrap_err();
        assert!(error.contains("not a control group"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_group_is_made_holds_a_process_and_is_gone_with_it() {
        let mounted =
            std::fs::read_to_string("/proc/self/mountinfo").ok().and_then(|text| mount_point(&text));
        let group = mounted.ok_or("no version 2".to_owned()).and_then(|root| {
            let group = Group::create(&root, Wanted::default())?;
            Ok((root, group))
        });
        let (root, group) = match group {
            Ok(made) => made,
            Err(why) => return eprintln!("NOT TESTED: no control group can be made here: {why}"),
        };
        let folder = group.folder.clone();
        let no_memory = Group::create(&root, Wanted { memory_bytes: Some(1 << 20), processes: None });
        eprintln!("a group with a memory limit: {:?}", no_memory.as_ref().map(|group| &group.folder));
        drop(no_memory);
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        group.place(child.id()).unwrap();
        let inside = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap();
        assert_eq!(inside.trim(), child.id().to_string());
        assert_eq!(group.memory_kills(), 0);
        drop(group);
        // Killed by the drop; the wait collects it.
        assert!(!child.wait().unwrap().success());
        for _ in 0..10_000 {
            sweep(&root);
            if !folder.exists() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
        panic!("{} is still there", folder.display());
    }
}
