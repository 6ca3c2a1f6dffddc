//! tc filters below a clsact qdisc, for kernels without TCX (before 6.6). They are not pinned: priority and handle are
//! ours, so that a restart replaces the program in place and a cleanup finds it.

use std::io;

use aya::programs::tc::{NlOptions, SchedClassifier, SchedClassifierLink, TcAttachOptions, TcAttachType, TcError};
use aya::programs::{ProgramError, TcHandle, tc};

/// "SH": ours on every interface.
const PRIORITY: u16 = 0x5348;
const HANDLE: TcHandle = TcHandle::new(0, 0x5348);

/// Replaces the program of our filter. False if there is none.
pub(super) fn replace(program: &mut SchedClassifier, interface: &str, hook: TcAttachType) -> io::Result<bool> {
    add_qdisc(interface)?;
    let link = SchedClassifierLink::attached(interface, hook, PRIORITY, HANDLE, None)?;
    match program.attach_to_link(link) {
        Ok(id) => keep(program, id).map(|()| true),
        Err(error) => match os_error(error) {
            error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(false),
            error => Err(error),
        },
    }
}

/// Adds our filter.
pub(super) fn create(program: &mut SchedClassifier, interface: &str, hook: TcAttachType) -> io::Result<()> {
    add_qdisc(interface)?;
    let options = TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, classid: None });
    let id = program.attach_with_options(interface, hook, options).map_err(os_error)?;
    keep(program, id)
}

/// Removes our filter; it need not be there. The qdisc stays, others may use it.
pub(super) fn remove(interface: &str, hook: TcAttachType) -> io::Result<()> {
    // A link that is dropped detaches; that there is no such filter is the aim.
    drop(SchedClassifierLink::attached(interface, hook, PRIORITY, HANDLE, None)?);
    Ok(())
}

/// aya detaches a link when its program is dropped: this one is to outlive the process.
fn keep(program: &mut SchedClassifier, id: tc::SchedClassifierLinkId) -> io::Result<()> {
    std::mem::forget(program.take_link(id).map_err(os_error)?);
    Ok(())
}

fn add_qdisc(interface: &str) -> io::Result<()> {
    match tc::qdisc_add_clsact(interface).map_err(tc_error) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

fn tc_error(error: TcError) -> io::Error {
    match error {
        TcError::NetlinkError(error) => {
            error.raw_os_error().map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
        }
        TcError::IoError(error) => error,
        error => io::Error::other(error),
    }
}

fn os_error(error: ProgramError) -> io::Error {
    match error {
        ProgramError::TcError(error) => tc_error(error),
        ProgramError::SyscallError(error) => error.io_error,
        error => io::Error::other(error),
    }
}
