//! Why the dataplane could not do something, and what to do about it.

use std::io;
use std::path::PathBuf;

use super::definitions::definitions;
use crate::config::MapSizes;

/// A map could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The pin can't be opened.
    #[error("cannot open the pinned map {}", pin.display())]
    Open {
        /// The pin.
        pin: PathBuf,
        /// BPF_OBJ_GET's error.
        source: io::Error,
    },
    /// The pin is of another version.
    #[error("{} has keys or values of another size; this program and the pins differ in version", pin.display())]
    Layout {
        /// The pin.
        pin: PathBuf,
    },
    /// No room.
    #[error("map {map} is full ({max_entries} entries){}", raise(map))]
    Full {
        /// The map.
        map: &'static str,
        /// Its size.
        max_entries: u32,
        /// BPF_MAP_UPDATE_ELEM's error.
        source: io::Error,
    },
    /// There is room, but no memory for another element.
    #[error(
        "no memory for another element of map {map}; its elements count as this process's memory: raise its limit \
         (resources.limits.memory)"
    )]
    NoMemory {
        /// The map.
        map: &'static str,
        /// BPF_MAP_UPDATE_ELEM's error.
        source: io::Error,
    },
    /// Another failure.
    #[error("cannot {action} map {map}")]
    Access {
        /// What was tried.
        action: &'static str,
        /// The map.
        map: &'static str,
        /// The system call's error.
        source: io::Error,
    },
}

fn raise(map: &str) -> String {
    let definitions = definitions(&MapSizes::default());
    let flag = definitions.iter().find(|definition| definition.name == map).and_then(|found| found.size_flag);
    flag.map(|flag| format!("; raise {flag}")).unwrap_or_default()
}

/// The dataplane could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// A map could not be read or written.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The kernel lacks what the programs need.
    #[error("this kernel is {release}; Linux 5.10 or later is needed")]
    KernelTooOld {
        /// uname's release.
        release: String,
    },
    /// No BPF file system.
    #[error("{} is not on a BPF file system; run `mount -t bpf bpf /sys/fs/bpf`", path.display())]
    NotBpfFileSystem {
        /// --pin-path
        path: PathBuf,
    },
    /// Another instance has it.
    #[error("another instance of sheave uses {}; stop it, or give another --pin-path", path.display())]
    Busy {
        /// --pin-path
        path: PathBuf,
    },
    /// A map that is pinned has another size than a flag asks for, and this kernel can't put another in its place.
    #[error(
        "the pinned map {} has {pinned} entries, not {asked}; kernels before 6.6 can't have it replaced under traffic: leave \
         {flag} as it was, or run `sheave cleanup` first, which ends all connections through Services",
        pin.display()
    )]
    CannotResize {
        /// The pin.
        pin: PathBuf,
        /// Its maximum entries.
        pinned: u32,
        /// The flag.
        flag: &'static str,
        /// What it says.
        asked: u32,
    },
    /// What a map holds doesn't fit the size that a flag asks for.
    #[error(
        "the pinned map {} holds {held} elements, more than the {asked} that {flag} asks for; give a larger number, or run \
         `sheave cleanup` first, which ends all connections through Services",
        pin.display()
    )]
    TooSmall {
        /// The pin.
        pin: PathBuf,
        /// Elements that it holds; all those of an array.
        held: usize,
        /// The flag.
        flag: &'static str,
        /// What it says.
        asked: u32,
    },
    /// A map of another shape is pinned.
    #[error("the pinned map {} is incompatible: {difference}; run `sheave cleanup` first", pin.display())]
    IncompatiblePin {
        /// The pin.
        pin: PathBuf,
        /// What differs.
        difference: String,
    },
    /// The pins were made by another version.
    #[error(
        "the maps pinned in {} have layout version {found}, this program's is {expected}; run `sheave cleanup` first",
        path.display()
    )]
    IncompatibleLayout {
        /// --pin-path
        path: PathBuf,
        /// What the pinned config says.
        found: u32,
        /// [`sheave_common::LAYOUT_VERSION`]
        expected: u32,
    },
    /// EPERM.
    #[error("not permitted to {action}; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    NotPermitted {
        /// What was tried.
        action: String,
    },
    /// The object file does not load.
    #[error("cannot load the BPF object")]
    Load(#[source] Box<aya::EbpfError>),
    /// The maps, or the programs beside them, do not fit into the memory that this process may use.
    #[error(
        "no memory for the maps and programs; they count as this process's: raise its memory limit \
         (resources.limits.memory), or give smaller maps (--max-conntrack takes most)"
    )]
    NoMemory(#[source] Box<aya::EbpfError>),
    /// The verifier or the kernel refuses a program.
    #[error("cannot load program {program}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why; includes the verifier's log.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object has no such program of this type.
    #[error("the BPF object has no program {program} of the right type")]
    NoProgram {
        /// Its name.
        program: &'static str,
    },
    /// A program could not be attached.
    #[error("cannot attach {program} to {target}")]
    Attach {
        /// The program.
        program: &'static str,
        /// Interface or cgroup.
        target: String,
        /// The system call's error.
        source: io::Error,
    },
    /// No cgroup v2 hierarchy.
    #[error("no cgroup v2 hierarchy is mounted; mount one, give --cgroup, or use --connect off")]
    NoCgroup,
    /// The cgroup can't be used.
    #[error(
        "cannot open the cgroup {}; give a directory of the cgroup v2 hierarchy as --cgroup, or use --connect off",
        path.display()
    )]
    Cgroup {
        /// Directory.
        path: PathBuf,
        /// What open or stat said.
        source: io::Error,
    },
    /// Something else failed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The system call's error.
        source: io::Error,
    },
    /// This thread's network namespace can't be identified.
    #[error("cannot read the network namespace's cookie")]
    NetnsCookie(#[source] io::Error),
}

impl DataplaneError {
    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted { action: format!("{action} {}", path.display()) },
            _ => Self::File { action, path, source },
        }
    }
}
